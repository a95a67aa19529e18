"""Errors of depth: hand numbers, masks, and no trace of the batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssl_jax.evals.depth import errors

RNG = np.random.default_rng(0)


def clip(values):
  return jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1)


def figures(predicted, truth):
  total = errors.Total()
  total.add(errors.sums(predicted, truth), np.ones(len(predicted)))
  return total.figures()


def test_hand_numbers():
  found = figures(clip([1, 2, 4]), clip([2, 2, 2]))
  np.testing.assert_allclose(found['abs_rel'], 0.5, rtol=1e-5)
  np.testing.assert_allclose(found['delta_1'], 1 / 3, rtol=1e-5)
  np.testing.assert_allclose(found['rmse'], 1.2910, rtol=1e-4)
  assert found['pixels'] == 3
  found = figures(clip([1, 2, 4]), clip([2, 2, 0]))
  np.testing.assert_allclose(found['abs_rel'], 0.25, rtol=1e-5)
  found = figures(clip([1, 2, 4]), clip([1, 2, 4]))
  assert (found['abs_rel'], found['delta_1'], found['rmse']) == (0, 1, 0)


def test_depth_behind_the_camera_is_clipped_for_delta_alone():
  found = figures(clip([-2.0]), clip([2.0]))
  np.testing.assert_allclose(found['abs_rel'], 2, rtol=1e-5)
  assert found['delta_1'] == 0
  np.testing.assert_allclose(found['rmse'], 4, rtol=1e-5)


def random(rows):
  truth = RNG.uniform(0.5, 5, (rows, 2, 4, 4))
  truth[RNG.random(truth.shape) < 0.3] = 0
  predicted = truth + RNG.normal(0, 1, truth.shape)
  return jnp.asarray(predicted, jnp.float32), jnp.asarray(truth, jnp.float32)


def test_figures_do_not_depend_on_the_batches():
  predicted, truth = random(7)
  together = figures(predicted, truth)
  total = errors.Total()
  for start, size in ((0, 1), (1, 4), (5, 2)):
    rows = slice(start, start + size)
    total.add(errors.sums(predicted[rows], truth[rows]), np.ones(size))
  # Nor on padding, not even where it is worse than wrong.
  bad = jnp.full((2, 2, 4, 4), jnp.nan)
  total.add(errors.sums(bad, jnp.ones_like(bad)), np.zeros(2))
  for name, value in total.figures().items():
    np.testing.assert_allclose(value, together[name], rtol=1e-6)
  p, g = (np.asarray(x, np.float64) for x in (predicted, truth))
  p, g = p[g > 0], g[g > 0]
  np.testing.assert_allclose(
    together['abs_rel'], np.mean(np.abs(p - g) / g), rtol=1e-5
  )
  near = np.maximum(p / g, g / np.maximum(p, 1e-9)) < 1.25
  np.testing.assert_allclose(together['delta_1'], near.mean(), rtol=1e-6)
  np.testing.assert_allclose(
    together['rmse'], np.sqrt(np.mean((p - g) ** 2)), rtol=1e-5
  )


def test_aligning_undoes_a_scale_per_clip():
  _, truth = random(3)
  factors = jnp.asarray([0.5, 2.0, 7.0])[:, None, None, None]
  # What stands where nothing was measured must not matter.
  predicted = jnp.where(truth > 0, truth * factors, 1e3)
  aligned = errors.align(predicted, truth)
  found = figures(aligned, truth)
  np.testing.assert_allclose(found['abs_rel'], 0, atol=1e-5)
  assert figures(predicted, truth)['abs_rel'] > 1
  lost = errors.align(-truth, truth)
  np.testing.assert_array_equal(lost, -truth)
  blank = errors.align(truth, jnp.zeros_like(truth))
  assert np.isfinite(blank).all()


@pytest.mark.parametrize(
  ('loss', 'wanted', 'slope'),
  [('mse', (1 + 0.25 + 9) / 3, [-2 / 3, 1 / 3, 6 / 3, 0]),
   ('l1', 4.5 / 3, [-1 / 3, 1 / 3, 1 / 3, 0])],
)  # fmt: skip
def test_losses_and_their_gradients(loss, wanted, slope):
  function = getattr(errors, loss)
  truth = jnp.concatenate([clip([2, 2, 2, 0]), clip([1, 1, 1, 1])])
  predicted = jnp.concatenate([clip([1, 2.5, 5, 9]), clip([3, 3, 3, 3])])
  weight = jnp.asarray([1.0, 0.0])
  value, gradient = jax.value_and_grad(function)(predicted, truth, weight)
  np.testing.assert_allclose(value, wanted, rtol=1e-5)
  np.testing.assert_allclose(gradient[0, 0, 0], slope, atol=1e-6)
  np.testing.assert_array_equal(gradient[1], 0)
  assert function(predicted, jnp.zeros_like(truth), weight) == 0


def test_no_depth_at_all_is_an_error():
  with pytest.raises(ValueError, match=r'data\.depth_units'):
    figures(clip([1.0]), clip([0.0]))
