"""The closed forms of the cost of a phase, against its traced program."""

import jax
import jax.numpy as jnp
import pytest

from vssl_jax import config as config_lib
from vssl_jax import demo, encoder, flops, methods
from vssl_jax.data import options
from vssl_jax.methods import cost

# Every kind of phase, at sizes that trace fast.
DEMOS = ('salt', 'layerlock', 'pmd', 'kdhiera')
# Pages whose teachers are trained by the run, so that no weights are needed.
PAGES = (
  'salt.py:L',
  'layerlock_2b.py:G',
  'layerlock_2b.py:L-vjepa',
  'layerlock_4b.py',
  'videomae_k400.py',
  'pmd_scratch_ucf101.py',
  'kdhiera_scratch.py',
  'hiera_mae_k400.py',
)


def _phases(config):
  video = options.spec(config.data.to_dict()).shape
  phases = methods.build(
    config.method, video, encoder.module_of, options.colours_of(config.data)
  )
  return video, phases


def _hold(phase, video):
  traced = sum(cost.traced_flops(phase, video))
  assert phase.cost(video).total == pytest.approx(traced, rel=_scores(phase))


def _scores(phase):
  """Returns the relative tolerance: closed forms leave token scores out.

  The attention of a class token costs a mask teacher a part of a block more.
  """
  return 0.01 if phase.mask_teacher else 1e-6


@pytest.mark.parametrize('name', DEMOS)
def test_closed_forms_are_the_traced_count(name):
  config = config_lib.complete('demo', demo.get_config(name), [])
  video, phases = _phases(config)
  last = {type(phase): phase for phase in phases}
  for phase in {p.name: p for p in (phases[0], *last.values())}.values():
    _hold(phase, video)


@pytest.mark.slow
@pytest.mark.parametrize('page', PAGES)
def test_closed_forms_of_pages(page):
  video, phases = _phases(config_lib.resolve(f'configs/{page}', []))
  chosen = (phases[0], phases[len(phases) // 2], phases[-1])
  for phase in {p.name: p for p in chosen}.values():
    _hold(phase, video)


def test_a_loop_counts_as_often_as_it_runs():
  x = jnp.ones((4, 4))

  def body(carry, _):
    return jax.lax.cond(carry[0, 0] > 0, lambda c: c @ x, lambda c: c, carry), 0

  program = jax.make_jaxpr(lambda c: jax.lax.scan(body, c, length=5))(x)
  assert flops.count(program) == 5 * 2 * 4**3


def test_a_strided_convolution_in_closed_form():
  clips, kernel = jnp.ones((1, 8, 8, 3)), jnp.ones((4, 4, 3, 5))
  program = jax.make_jaxpr(
    lambda x, k: jax.lax.conv_general_dilated(
      x, k, (2, 2), 'VALID', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
  )(clips, kernel)
  assert flops.count(program) == 2 * (3 * 3 * 5) * (4 * 4 * 3)


def test_activations_are_those_of_one_clip_without_the_weights():
  config = config_lib.complete('demo', demo.get_config('salt'), [])
  video, phases = _phases(config)
  phase = phases[-1]
  traced = cost.traced(phase, video)
  assert traced.total == pytest.approx(phase.cost(video).total)
  # The estimate in closed form is of fused layers; a trace keeps every value
  # that a layer alone needs, such as the weights of attention.
  ratio = traced.activations / phase.cost(video).activations
  assert 1 < ratio < 4
