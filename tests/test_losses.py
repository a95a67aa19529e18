import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from vssl_jax import losses

RNG = np.random.default_rng(0)


def normal(*shape):
  return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def check_gradient(function, *args):
  """Compares gradients with finite differences."""
  check_grads(
    lambda *x: function(*map(jnp.asarray, x)),
    args,
    order=1,
    modes=['rev'],
    atol=2e-2,
    rtol=2e-2,
  )


def test_distances_of_a_hand_case():
  # Differences -2, .5, 0, 1.
  prediction = jnp.asarray([[0.0, 1.5], [3.0, 2.0]])
  target = jnp.asarray([[2.0, 1.0], [3.0, 1.0]])
  assert float(losses.l1(prediction, target)) == 3.5 / 4
  assert float(losses.mse(prediction, target)) == 5.25 / 4
  assert float(losses.smooth_l1(prediction, target)) == (1.5 + 0.125 + 0.5) / 4


@pytest.mark.parametrize('name', losses.DISTANCES)
def test_distances_vanish_are_symmetric_and_have_right_gradients(name):
  distance = losses.DISTANCES[name]
  p, t = normal(2, 3, 4), normal(2, 3, 4)
  assert float(distance(t, t)) == 0
  assert float(distance(p, t)) == float(distance(t, p)) > 0
  check_gradient(distance, p, t)


def test_distances_are_float32_means_of_low_precision_inputs():
  p = jnp.full((1, 2000), 1.0, jnp.bfloat16)
  t = jnp.full((1, 2000), 0.25, jnp.bfloat16)
  for distance, wanted in ((losses.l1, 0.75), (losses.mse, 0.5625)):
    found = distance(p, t)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_layer_norm0_hand_case():
  found = losses.layer_norm0(jnp.asarray([1.0, 2.0, 3.0, 6.0]))
  np.testing.assert_allclose(found, [-1.0690, -0.5345, 0, 1.6036], atol=5e-5)


def test_layer_norm0_standardises_and_forgets_scale_and_shift():
  x = normal(2, 5, 64)
  found = losses.layer_norm0(x)
  np.testing.assert_allclose(found.mean(-1), 0, atol=1e-6)
  np.testing.assert_allclose(found.std(-1), 1, atol=1e-4)
  np.testing.assert_allclose(losses.layer_norm0(50 * x + 3), found, atol=1e-4)
  constant = losses.layer_norm0(jnp.full((1, 8), 3.0, jnp.bfloat16))
  assert constant.dtype == jnp.float32
  np.testing.assert_array_equal(constant, 0)


def test_predicting_nothing_costs_the_mean_absolute_target():
  target = losses.layer_norm0(normal(64, 512))
  found = losses.l1(jnp.zeros_like(target), target)
  np.testing.assert_allclose(found, np.abs(target).mean(), rtol=1e-6)
  np.testing.assert_allclose(found, np.sqrt(2 / np.pi), atol=0.01)


def test_patches_are_time_major_everywhere():
  b, t, h, w, c = 1, 4, 6, 8, 2
  video = np.arange(b * t * h * w * c, dtype=np.float32).reshape(b, t, h, w, c)
  found = np.asarray(losses.patchify(jnp.asarray(video), (2, 3, 4)))
  assert found.shape == (1, 2 * 2 * 2, 24, 2)
  for ti in range(2):
    for yi in range(2):
      for xi in range(2):
        patch = video[
          0, 2 * ti : 2 * ti + 2, 3 * yi : 3 * yi + 3, 4 * xi : 4 * xi + 4
        ]
        np.testing.assert_array_equal(
          found[0, (ti * 2 + yi) * 2 + xi], patch.reshape(24, 2)
        )


def test_pixel_target_hand_numbers():
  video = jnp.arange(8.0).reshape(1, 2, 2, 2, 1) / 8
  found = losses.pixel_targets(video, (2, 2, 2))
  wanted = [1.4289, 1.0206, 0.6124, 0.2041]
  wanted = [-x for x in wanted] + wanted[::-1]
  np.testing.assert_allclose(found[0, 0], wanted, atol=1e-4)
  raw = losses.pixel_targets(video, (2, 2, 2), 'none')
  np.testing.assert_array_equal(raw[0, 0], np.arange(8) / 8)


@pytest.mark.parametrize('kind', ['patch_channel', 'patch'])
def test_pixel_targets_match_numpy(kind):
  video = RNG.uniform(size=(2, 4, 8, 8, 3)).astype(np.float32)
  found = losses.pixel_targets(jnp.asarray(video), (2, 4, 4), kind)
  x = np.asarray(losses.patchify(jnp.asarray(video), (2, 4, 4)), np.float64)
  if kind == 'patch_channel':
    x = (x - x.mean(2, keepdims=True)) / (
      x.std(2, ddof=1, keepdims=True) + 1e-6
    )
    x = x.reshape(2, 8, -1)
  else:
    x = x.reshape(2, 8, -1)
    variance = x.var(-1, ddof=1, keepdims=True)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(variance + 1e-6)
  np.testing.assert_allclose(found, x, atol=1e-5)


@pytest.mark.parametrize(
  ('kind', 'channels'),
  [('patch_channel', 3), ('patch_channel', 1), ('patch', 1)],
)
def test_a_single_value_is_not_normalised(kind, channels):
  video = jnp.ones((1, 2, 2, 2, channels))
  with pytest.raises(ValueError, match=f"found '{kind}' for patches of one"):
    losses.pixel_targets(video, (1, 1, 1), kind)
  raw = losses.pixel_targets(video, (1, 1, 1), 'none')
  np.testing.assert_array_equal(raw, jnp.ones((1, 8, channels)))


def test_only_channel_targets_forget_an_affine_change_of_colours():
  video = jnp.asarray(RNG.uniform(size=(1, 2, 8, 8, 3)), jnp.float32)
  mean = jnp.asarray([0.485, 0.456, 0.406])[None, None, None, None]
  std = jnp.asarray([0.229, 0.224, 0.225])[None, None, None, None]
  changed = (video - mean) / std
  same, other = (
    np.abs(
      losses.pixel_targets(changed, (2, 4, 4), kind)
      - losses.pixel_targets(video, (2, 4, 4), kind)
    ).max()
    for kind in ('patch_channel', 'patch')
  )
  assert same < 1e-4
  assert other > 1e-2


def test_flat_patches_give_zero_and_not_nan():
  video = jnp.full((1, 2, 4, 4, 3), 0.25)
  for kind in ('patch_channel', 'patch'):
    np.testing.assert_array_equal(
      losses.pixel_targets(video, (2, 4, 4), kind), 0
    )


def test_unknown_pixel_norm_is_refused():
  with pytest.raises(ValueError, match='pixel_norm'):
    losses.pixel_targets(jnp.zeros((1, 2, 4, 4, 3)), (2, 4, 4), 'channel')


def test_masks_count_alike_whatever_their_lengths():
  """Salt averages the distances of its masks, not of all their tokens."""
  short, long = normal(1, 2, 4), normal(1, 5, 4)
  found = (losses.l1(short, 0 * short) + losses.l1(long, 0 * long)) / 2
  wanted = (np.abs(short).mean() + np.abs(long).mean()) / 2
  np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_layer_norm0_gradient():
  weight = normal(2, 8)
  check_gradient(lambda x: (weight * losses.layer_norm0(x)).sum(), normal(2, 8))
