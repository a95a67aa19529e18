"""What the devices of a sharded step send each other, counted.

A small twin of configs/layerlock_4b.py, compiled for 8 devices. Whatever a
device gathers is a weight that it is about to use, and whatever they sum is
the gradient of one: no optimizer state, no activations.
"""

import collections
import math
import pathlib
import re

import jax
import pytest

from vssl_jax import config as config_lib
from vssl_jax import encoders, methods, sharding, trees
from vssl_jax.train import ahead
from vssl_jax.train import run as run_lib

PAGE = pathlib.Path(__file__).parents[2] / 'configs/layerlock_4b.py'
VIDEO, BATCH, TOKENS = (4, 32, 32, 3), 16, 32
DEPTH, DECODER, LOCKED, WIDTH, MLP = 6, 2, 2, 128, 640
KINDS = 'all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute'


def _twin(layout='loops', target='latent'):
  _, c = config_lib.load(str(PAGE))
  c.batch_size = BATCH
  c.data.frames, c.data.stride, c.data.size = *VIDEO[:1], 1, VIDEO[1:3]
  m = c.method
  m.encoder.update(dict(width=WIDTH, depth=DEPTH, num_heads=4, mlp_width=MLP))
  m.vit.patch, m.decoder_blocks, m.masks = (2, 8, 8), DECODER, 'random:0.75'
  m.total, m.schedule = 4, f'((0, 2), ({LOCKED}, 2))'
  m.layout, m.target = layout, target
  c.optim.warmup = 0
  return c


def _collectives(config, phase):
  """Returns {kind: Counter of arrays by their sides} and the parameters."""
  method = methods.build(config.method, VIDEO, encoders.module_of)
  mesh = sharding.make_mesh()
  shapes = ahead.outline(config, method, run_lib.spans(method)[phase], VIDEO)
  lowered = ahead.lower(config, method, shapes, VIDEO, mesh)
  found = collections.defaultdict(collections.Counter)
  for line in lowered.compile().as_text().splitlines():
    match = re.search(rf'= (.*?) ({KINDS})(?:-start)?\(', line)
    if match:
      arrays = re.findall(r'\w\[([\d,]*)\]', match[1])
      found[match[2]].update(_sides(a.split(',')) for a in arrays if a)
  return found, shapes


def _sides(shape):
  """An array by its sides: a layout may turn them or add one of length 1."""
  return tuple(sorted(int(n) for n in shape if int(n) != 1))


def _split(shapes, block):
  """Returns the sides of a block's weights that devices share out."""
  tree = trees.subtree(shapes.state.params, block)
  sizes = {'data': 1, 'fsdp': jax.device_count()}
  return collections.Counter(
    _sides(x.shape)
    for name, x in trees.named_leaves(tree)
    if sharding.spec(name, x.shape, sizes)
  )


def _times(counter, factor):
  return collections.Counter({k: n * factor for k, n in counter.items()})


@pytest.fixture(scope='module')
def locked():
  return _collectives(_twin(), 1)


def test_a_weight_is_gathered_once_for_each_use(locked):
  """Loops: the locked stretch for tokens seen and for the target; the free
  one and the decoding one forward and where they are computed again."""
  found, shapes = locked
  wanted = _times(_split(shapes, 'encoder/block_00'), 2 + 2 + 2)
  wanted += _split(shapes, 'encoder/embed') + _split(shapes, 'latent_head')
  assert sum(wanted.values()) == 6 * 6 + 2
  gathered = found['all-gather']
  noise = gathered.pop((BATCH, TOKENS), 0)  # that masks are drawn from
  assert noise <= 2
  assert gathered == wanted


def test_only_gradients_of_trained_weights_are_summed(locked):
  found, shapes = locked
  wanted = _times(_split(shapes, 'encoder/block_00'), 2)  # free and decoding
  wanted += _split(shapes, 'latent_head')
  summed = found['all-reduce'] + found['reduce-scatter']
  large = {k: n for k, n in summed.items() if math.prod(k) > MLP}
  latents = large.pop((TOKENS, WIDTH), 0)  # too few to be shared out
  assert large == wanted and latents == 1


def test_activations_stay_where_their_clips_are(locked):
  found, _ = locked
  assert not found['all-to-all'] and not found['collective-permute']
  assert all(
    BATCH not in sides[:-1] or sides == (BATCH, TOKENS)
    for counter in found.values()
    for sides in counter
  )
