import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssl_jax.masks import sampling


@pytest.mark.parametrize(
  ('frame', 'scale', 'aspect', 'wanted'),
  [
    ((14, 14), 0.15, 0.75, (5, 6)),
    ((14, 14), 0.15, 1.0, (5, 5)),
    ((14, 14), 0.15, 1.25, (6, 5)),
    ((14, 14), 0.15, 1.5, (7, 4)),
    ((14, 14), 0.7, 0.75, (10, 14)),
    ((14, 14), 0.7, 1.0, (12, 12)),
    ((14, 14), 0.7, 1.25, (13, 10)),
    ((14, 14), 0.7, 1.5, (14, 10)),
    ((16, 16), 0.15, 0.75, (5, 7)),
    ((16, 16), 0.15, 1.5, (8, 5)),
    ((16, 16), 0.7, 0.75, (12, 15)),
    ((16, 16), 0.7, 1.5, (16, 11)),
  ],
)
def test_size_matches_hand_numbers(frame, scale, aspect, wanted):
  size = jax.jit(sampling.rectangle_size, static_argnums=(1, 2))
  height, width = size(jax.numpy.float32(aspect), frame, scale)
  assert (int(height), int(width)) == wanted


def test_one_rectangle_is_whole_and_reaches_every_corner():
  size = (jnp.int32(2), jnp.int32(3))
  union = jax.jit(
    jax.vmap(lambda k: sampling.rectangle_union(k, (5, 6), 1, *size))
  )
  frames = np.asarray(union(jax.random.split(jax.random.key(0), 400)))
  assert (frames.sum((1, 2)) == 6).all()
  places = set()
  for frame in frames:
    y, x = np.nonzero(frame)
    assert (np.ptp(y), np.ptp(x)) == (1, 2)
    places.add((y.min(), x.min()))
  assert places == {(y, x) for y in range(4) for x in range(4)}


@pytest.mark.parametrize(
  ('count', 'scale', 'mean', 'quantiles'),
  [
    (8, 0.15, 586, (320, 392, 584, 792)),
    (2, 0.7, 295, (48, 112, 320, 448)),
  ],
)
def test_uncovered_tokens_match_measured_statistics(
  count, scale, mean, quantiles
):
  def one(key):
    of_aspect, place = jax.random.split(key)
    aspect = jax.random.uniform(of_aspect, minval=0.75, maxval=1.5)
    size = sampling.rectangle_size(aspect, (14, 14), scale)
    return 196 - sampling.rectangle_union(place, (14, 14), count, *size).sum()

  keys = jax.random.split(jax.random.key(1), 20_000)
  free = 8 * np.asarray(jax.jit(jax.vmap(one))(keys))
  # The published collator draws again while nothing is visible.
  assert (free == 0).mean() < 0.03
  free = free[free > 0]
  assert abs(free.mean() - mean) < 3
  found = np.quantile(free, (0.01, 0.05, 0.5, 0.95))
  np.testing.assert_allclose(found, quantiles, atol=16)
