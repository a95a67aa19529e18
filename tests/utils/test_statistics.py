import numpy as np
import pytest

from vssl_jax.utils import statistics


@pytest.mark.parametrize('rank', [1, 3, 8])
def test_rankme_counts_equal_singular_values(rank):
  features = np.zeros((20, 8))
  features[:rank, :rank] = 5 * np.eye(rank)
  np.testing.assert_allclose(statistics.rankme(features), rank, rtol=1e-4)


def test_rankme_of_two_unequal_values():
  # Shares 3/4 and 1/4: entropy .5623, rank 1.7548.
  found = statistics.rankme(np.diag([3.0, 1.0]))
  np.testing.assert_allclose(found, 1.7548, atol=1e-4)


def test_rankme_of_constant_features_is_one_and_of_none_zero():
  np.testing.assert_allclose(
    statistics.rankme(np.full((50, 16), 2.0)), 1, atol=1e-4
  )
  assert statistics.rankme(np.zeros((50, 16))) == 0


def test_interval_hand_numbers():
  # Wilson's for 8 of 10: centre .7166, half width .2268.
  low, high = statistics.interval(8, 10)
  np.testing.assert_allclose((low, high), (0.4902, 0.9433), atol=1e-4)
  assert statistics.interval(0, 10)[0] == 0
  assert statistics.interval(10, 10)[1] == 1


def test_intervals_cover_the_truth_as_often_as_they_say():
  rng = np.random.default_rng(0)
  hits = []
  for count in rng.binomial(40, 0.3, size=2000):
    low, high = statistics.interval(int(count), 40)
    hits.append(low < 0.3 < high)
  assert 0.93 < np.mean(hits) < 0.97
