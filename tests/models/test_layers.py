"""Patches, pixel scaling and initial values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssl_jax.masks import tubelets
from vssl_jax.models import layers


def test_to_unit_scales_bytes_and_leaves_floats_alone():
  pixels = np.array([0, 51, 255], np.uint8)
  np.testing.assert_allclose(tubelets.to_unit(pixels), [0, 0.2, 1], rtol=1e-6)
  floats = np.array([0.25, 7.0], np.float32)
  np.testing.assert_array_equal(tubelets.to_unit(floats), floats)
  with pytest.raises(TypeError, match='int32'):
    tubelets.to_unit(np.array([1], np.int32))


def test_grid_of():
  assert tubelets.grid_of((1, 16, 224, 224, 3), (2, 16, 16)) == (8, 14, 14)
  with pytest.raises(ValueError, match=r'\(16, 224, 220\)'):
    tubelets.grid_of((1, 16, 224, 220, 3), (2, 16, 16))
  with pytest.raises(ValueError, match='batch axis'):
    tubelets.grid_of((16, 224, 224, 3), (2, 16, 16))
  with pytest.raises(ValueError, match='multiple of the patch'):
    tubelets.grid_of((1, 0, 32, 32, 3), (2, 16, 16))


def test_patchify_orders_tokens_and_values_in_raster_order():
  video = np.arange(4 * 4 * 6 * 3, dtype=np.int32).reshape(1, 4, 4, 6, 3)
  rows = np.asarray(tubelets.patchify(video, (2, 2, 3)))
  assert rows.shape == (1, 8, 36)
  n = 0
  for t in range(2):
    for y in range(2):
      for x in range(2):
        cube = video[0, 2 * t : 2 * t + 2, 2 * y : 2 * y + 2, 3 * x : 3 * x + 3]
        np.testing.assert_array_equal(rows[0, n], cube.ravel())
        n += 1


def test_normalise_is_per_colour():
  patch = jnp.array([[[0.5, 0.2, 1.0, 0.1, 0.6, 0.0]]])
  out = tubelets.normalise(patch, (0.5, 0.2, 0.0), (0.1, 0.2, 0.5))
  np.testing.assert_allclose(out[0, 0], [0, 0, 2, -4, 2, 0], atol=1e-6)


def deviation(family, role, shape, block=1):
  init = layers.kernel_init(family, role, block)
  x = init(jax.random.key(0), shape, jnp.float32)
  return float(jnp.std(x)), float(jnp.abs(x).max())


def test_vjepa_start():
  for role in ('embed', 'qkv', 'fc1', 'head'):
    assert deviation('vjepa', role, (256, 256), 8)[0] == pytest.approx(
      0.02, rel=0.02
    )
  for role in ('out', 'fc2'):  # block 8: 0.02 / sqrt(16)
    assert deviation('vjepa', role, (256, 256), 8)[0] == pytest.approx(
      0.005, rel=0.02
    )


def test_videomae_start():
  glorot = (6 / (256 + 512)) ** 0.5
  largest = deviation('videomae', 'fc1', (256, 512))[1]
  assert largest <= glorot
  assert largest == pytest.approx(glorot, rel=1e-3)
  fused = (6 / (256 + 3 * 256)) ** 0.5  # torch draws one [3D, D] kernel
  largest = deviation('videomae', 'qkv', (256, 256))[1]
  assert largest == pytest.approx(fused, rel=1e-3)
  largest = deviation('videomae', 'embed', (1536, 64))[1]
  assert largest == pytest.approx(1536**-0.5, rel=1e-3)


def test_mae_start():
  glorot = (6 / (768 + 64)) ** 0.5  # of the embedding too
  assert deviation('mae', 'embed', (768, 64))[1] == pytest.approx(
    glorot, rel=1e-3
  )
  for role in ('qkv', 'out', 'fc1'):
    shape = (256, 256)
    assert deviation('mae', role, shape) == deviation('videomae', role, shape)


def test_unknown_family():
  with pytest.raises(ValueError, match="'moco'"):
    layers.kernel_init('moco', 'qkv')
