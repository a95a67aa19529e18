"""Teachers in 8 bits: against numpy, and how far their targets are off."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests.train import toy
from vssl_jax.methods import phase as phase_lib
from vssl_jax.models import fp8_matmul, framewise, mvd_student, vit
from vssl_jax.train import run

VIDEO = (2, 4, 32, 32, 3)
# Relative RMS error of the last block of a random ViT, small and 12 blocks
# deep; README has those of sizes S and B.
BOUND = {'bfloat16': 0.02, 'float8': 0.12}
SOURCE = phase_lib.FromWeights('somewhere')


def _dot(x, w):
  dimensions = (((x.ndim - 1,), (0,)), ((), ()))
  return fp8_matmul.dot_general(jnp.asarray(x), jnp.asarray(w), dimensions)


def _rounded(x, axis):
  """To float8 and back, one number after the other."""
  scale = np.abs(x).max(axis=axis, keepdims=True) / 448
  scale = np.where(scale > 0, scale, 1)
  return (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


def test_products_are_those_of_rounded_factors():
  """One scale for each token, one for each column of the weight."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 5, 32)) * 10.0 ** np.arange(-2, 3)[:, None]
  x = x.astype(np.float32)
  w = rng.normal(size=(32, 6)) * 10.0 ** np.arange(-3, 3)
  w = w.astype(np.float32)
  w[:, 2] = 0
  want = _rounded(x, -1).reshape(10, 32) @ _rounded(w, 0)
  got = _dot(x, w)
  assert got.dtype == jnp.float32
  scale = np.abs(want).max(axis=0, keepdims=True) + 1e-9
  np.testing.assert_allclose(
    got.reshape(10, 6) / scale, want / scale, atol=2e-5
  )
  assert (np.asarray(got)[..., 2] == 0).all()
  exact = x.reshape(10, 32) @ w
  assert 1e-3 < (np.abs(want - exact) / scale).max() < 0.1


def test_no_clip_depends_on_its_neighbours():
  """To the bit, also beside one that is much brighter."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 5, 32)).astype(np.float32)
  x[1] *= 37
  w = rng.normal(size=(32, 6)).astype(np.float32)
  both = np.asarray(_dot(x, w))
  for i in range(2):
    np.testing.assert_array_equal(both[i], _dot(x[i : i + 1], w)[0])


def test_no_value_is_too_large_for_8_bits():
  x = np.float32([[1e30, -1e30, 3e-30, 0]])
  values, scale = fp8_matmul.quantise(jnp.asarray(x))
  back = values.astype(jnp.float32) * scale
  np.testing.assert_allclose(back, [[1e30, -1e30, 0, 0]], rtol=1e-6)
  zero, scale = fp8_matmul.quantise(jnp.zeros((2, 3)))
  assert not zero.astype(jnp.float32).any() and scale == 1


def _model(kind, depth=12):
  fields = dict(dtype='float32', layer_scale=False)
  size = dict(width=96, depth=depth, num_heads=3)
  if kind == 'video':
    return vit.make(size, patch=(2, 8, 8), **fields)
  image = vit.make(size, patch=(1, 8, 8), positions='sincos_2d', **fields)
  return framewise.Framewise(image)


def _said(module, params, video, dtype):
  teacher = phase_lib.Teacher(module, SOURCE, dtype=dtype)
  wanted = 'float32' if dtype == 'float32' else 'bfloat16'
  if dtype != 'float32':
    teacher = phase_lib.Teacher(module.clone(dtype=wanted), SOURCE, dtype=dtype)
  found = jax.jit(lambda p, v: teacher(p, v, features=True)[-1])(params, video)
  return np.asarray(found, np.float64)


@pytest.mark.parametrize(
  'kind', ['video', pytest.param('image', marks=pytest.mark.slow)]
)
def test_what_a_teacher_says_of_a_clip_is_of_that_clip_alone(kind):
  """Its targets may be kept by the clip's number, whatever the batch was."""
  module = _model(kind, depth=1)
  video = np.random.default_rng(1).integers(0, 255, VIDEO, np.uint8)
  video[1] //= 16
  params = module.init(jax.random.key(0), video)['params']
  both = _said(module, params, video, 'float8_emulated')
  for i in range(2):
    alone = _said(module, params, video[i : i + 1], 'float8_emulated')
    np.testing.assert_array_equal(both[i], alone[0])


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['video', 'image'])
def test_targets_in_8_bits_are_within_their_bound(kind):
  module = _model(kind)
  video = np.random.default_rng(1).integers(0, 255, VIDEO, np.uint8)
  params = module.init(jax.random.key(0), video)['params']
  # Branches as large as in a trained model, where the init has small ones.
  params = jax.tree.map(lambda x: 3 * x if x.ndim == 2 else x, params)
  exact = _said(module, params, video, 'float32')
  errors = {}
  for dtype in ('bfloat16', 'float8_emulated'):
    off = _said(module, params, video, dtype) - exact
    errors[dtype] = np.sqrt(np.square(off).mean() / np.square(exact).mean())
  assert errors['bfloat16'] < BOUND['bfloat16']
  # Twice as far off at least: else nothing was rounded to 8 bits.
  found = errors['float8_emulated']
  assert 2 * errors['bfloat16'] < found < BOUND['float8'], errors


def test_what_is_no_type_or_no_vit_is_refused():
  module = _model('video')
  with pytest.raises(ValueError, match=r"dtype='float9', wanted one of \('fl"):
    phase_lib.Teacher(module, SOURCE, dtype='float9')
  guide = mvd_student.Student(module, {})
  with pytest.raises(ValueError, match=r"'float8' for a Student, which is no"):
    phase_lib.Teacher(guide, SOURCE, '', 'float8')


@pytest.mark.parametrize(
  ('platform', 'capability', 'able'),
  [
    ('gpu', '9.0', True),
    ('gpu', '8.9', True),
    ('gpu', '8.0', False),
    ('cpu', None, False),
    ('tpu', None, False),
  ],
)
def test_devices_with_units_for_8_bits_are_known(platform, capability, able):
  class Device:
    compute_capability = capability

  Device.platform, Device.device_kind = platform, 'this device'
  assert fp8_matmul.has_units(Device()) == able
  teacher = phase_lib.Teacher(_model('video'), SOURCE, dtype='float8')
  phase = toy.phase(teachers={'wise': teacher})
  if able:
    run.check_units((phase,), Device())
    return
  with pytest.raises(ValueError, match="'wise' has dtype float8, and this dev"):
    run.check_units((phase,), Device())
