"""What a lock saves: the closed form against the page's table and XLA's count.

The table is that of the method: 16x224x224 clips, 78 of 1,568 tokens visible,
TFLOP per clip and step.
"""

import functools

import jax
import numpy as np
import pytest

from vssl_jax import config as config_lib
from vssl_jax import encoder, methods, sharding
from vssl_jax.methods import layerlock_config
from vssl_jax.train import phase_setup
from vssl_jax.train import run as run_lib

CLIP = (16, 224, 224, 3)
# Pixels; then at a third and at two thirds of the layers: pixel target, latent
# target at all positions, latent target at 5 % of them. Then the GiB that the
# backward pass keeps, before and at two thirds.
TABLE = {
  'B': (0.418, (0.409, 0.526, 0.403), (0.400, 0.636, 0.398), (0.165, 0.151)),
  'L': (0.765, (0.733, 1.129, 0.735), (0.701, 1.493, 0.719), (0.249, 0.210)),
  'G': (2.551, (2.358, 4.553, 2.431), (2.165, 6.546, 2.335), (0.554, 0.416)),
  'e': (4.601, (4.218, 8.380, 4.385), (3.814, 12.357, 4.183), (0.893, 0.651)),
}
VARIANTS = (
  dict(target='pixels'),
  dict(target='latent'),
  dict(target='latent', positions='subset'),
)


def _phases(size, schedule, total, **knobs):
  config = layerlock_config.default()
  config.encoder.size, config.total, config.schedule = size, total, schedule
  config.vit.update(knobs.pop('vit', {}))
  config.update(knobs)
  return methods.build(config, CLIP, encoder.module_of)


@pytest.mark.parametrize('size', TABLE)
def test_table_of_costs(size):
  before, third, two_thirds, kept = TABLE[size]
  depth = {'B': 12, 'L': 24, 'G': 48, 'e': 56}[size]
  locks = (0, depth // 3, 2 * depth // 3)
  schedule = ', '.join(f'({k}, 1)' for k in locks)
  for i, knobs in enumerate(VARIANTS):
    phases = _phases(size, f'({schedule})', 3, **knobs)
    costs = [phase.cost(CLIP) for phase in phases]
    found = [cost.total / 1e12 for cost in costs]
    wanted = [before, third[i], two_thirds[i]]
    assert found == pytest.approx(wanted, rel=5e-3)
  gib = [cost.activations / 2**30 for cost in costs]
  assert (gib[0], gib[2]) == pytest.approx(kept, rel=5e-3)


SLOW = pytest.mark.slow
SMALL = (4, 64, 64, 3)
PIXELS = dict(target='pixels')


@functools.cache
def _compiled(depth, batch=16, **knobs):
  """Returns the FLOPs of a step by XLA's count, and by the closed form.

  The optimizer's arithmetic per parameter does not grow with the batch, which
  nothing is allocated for.
  """
  _, c = config_lib.load('configs/layerlock_2b.py:L')
  c.batch_size = batch
  c.data.frames, c.data.stride, c.data.size = SMALL[0], 1, SMALL[1:3]
  size = dict(width=384, depth=8, num_heads=4, mlp_width=1536)
  c.method.encoder.update(size)
  vit = dict(patch=(2, 8, 8), dtype='float32', remat='none', attention='xla')
  c.method.vit.update(vit)
  c.method.update(dict(decoder_blocks=1, masks='random:0.75', total=2, **knobs))
  c.method.schedule = f'((0, 1), ({depth}, 1))' if depth else '((0, 2),)'
  c.optim.warmup = 0
  assert c.optim.clip  # neither clipping nor the logged norm needs them back
  phases = methods.build(c.method, SMALL, encoder.module_of)
  span = run_lib.spans(phases)[-1]
  shapes = phase_setup.build(c, span, SMALL)
  one = np.array(jax.devices()[:1]).reshape(1, 1)
  mesh = jax.sharding.Mesh(one, ('data', 'fsdp'), axis_types=sharding.AUTO)
  compiled = phase_setup.lower(c, shapes, SMALL, mesh).compile()
  closed = span.phase.cost(SMALL).total * batch
  return compiled.cost_analysis()['flops'], closed


@SLOW
@pytest.mark.parametrize('depth', [2, 6])
def test_the_backward_pass_of_locked_blocks_is_gone(depth):
  found, closed = _compiled(0, **PIXELS)
  locked_found, locked_closed = _compiled(depth, **PIXELS)
  saved = found - locked_found
  assert saved == pytest.approx(closed - locked_closed, rel=0.03)


@SLOW
def test_a_target_costs_its_own_forward_pass():
  for knobs in VARIANTS[1:]:
    found, closed = _compiled(4, **knobs)
    pixels, pixels_closed = _compiled(4, **PIXELS)
    assert found - pixels == pytest.approx(closed - pixels_closed, rel=0.03)
