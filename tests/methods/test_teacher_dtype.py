"""The type that teachers compute in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssl_jax.methods import phase
from vssl_jax.models import decoder, framewise, layers, mvd_student, vit

VIDEO = (4, 16, 16, 3)
SMALL = {'width': 32, 'depth': 2, 'num_heads': 2, 'mlp_width': 64}
VIT = vit.make(SMALL, patch=(2, 8, 8))
IMAGE = framewise.Framewise(
  vit.make(SMALL, patch=(1, 8, 8), positions='sincos_2d', class_token=True)
)
PAIR = mvd_student.Student(
  VIT.clone(positions='sinusoid_1d'),
  {'image': decoder.VideoMaeDecoder(32, width=16, depth=1, num_heads=2)},
)


def _largest(tree):
  return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


@pytest.mark.slow
@pytest.mark.parametrize(
  'module', [VIT, IMAGE, PAIR], ids=['vit', 'image', '2']
)
def test_a_float32_teacher_computes_in_float32(module):
  """Not only its parameters: targets were some per cent off."""
  video = np.random.default_rng(0).random((1, *VIDEO), np.float32)
  exact = layers.with_dtype(module, 'float32')
  params = jax.jit(exact.init)(jax.random.key(0), video)['params']

  def error(dtype):
    teacher = phase.Teacher(module, phase.FromPhase('before'), '', dtype)
    out = jax.jit(lambda params: teacher(params, video))(params)
    wanted = jax.jit(lambda params: exact.apply({'params': params}, video))(
      params
    )
    return _largest(jax.tree.map(jnp.subtract, out, wanted)) / _largest(wanted)

  assert error('float32') < 1e-6
  assert error('bfloat16') > 1e-3


def test_every_module_inside_computes_in_the_type():
  for module in (PAIR, IMAGE):
    exact = layers.with_dtype(module, 'float32')
    assert "dtype = 'bfloat16'" in repr(module)
    assert "dtype = 'bfloat16'" not in repr(exact)
    assert layers.with_dtype(exact, 'bfloat16') == module
