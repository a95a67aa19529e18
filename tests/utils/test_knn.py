import numpy as np
import pytest

from vssl_jax.utils import knn

RNG = np.random.default_rng(0)


def gaussians(n, gap=6.0):
  label = np.arange(n) % 2
  x = RNG.normal(size=(n, 5)).astype(np.float32)
  x[:, 0] += gap * (2 * label - 1)
  return x, label.astype(np.int32)


def test_separable_classes_are_told_apart_and_shuffled_ones_are_not():
  bank, labels = gaussians(400)
  queries, wanted = gaussians(200)
  assert knn.accuracy(bank, labels, queries, wanted) == 1.0
  # Apart or not, the two clouds are told by nothing once labels are mixed up.
  bank, queries = gaussians(400, gap=0)[0], gaussians(400, gap=0)[0]
  shuffled = RNG.permutation(labels)
  found = knn.accuracy(bank, shuffled, queries, RNG.permutation(labels))
  assert abs(found - 0.5) < 0.1


def test_three_bank_clips_by_hand():
  """Similarities .8, .6, 0: one near neighbour against two farther ones."""
  bank = np.asarray([[0.8, 0.6], [0.6, 0.8], [0.0, 1.0]], np.float32)
  labels = np.asarray([0, 1, 1], np.int32)
  query = np.asarray([[2.0, 0.0]], np.float32)
  # exp(.8/T) against exp(.6/T) + exp(0): T = .07 for class 0; at T = 1 the
  # two of class 1 win, 1.822 + 1 to 2.226.
  common = (bank, labels, query, (1, 3))
  assert knn.predict(*common)[3] == [0]
  assert knn.predict(*common, temperature=1.0)[3] == [1]
  assert knn.predict(*common, temperature=1.0)[1] == [0]


def test_one_neighbour_is_the_nearest():
  bank, queries = RNG.normal(size=(2, 60, 8)).astype(np.float32)
  labels = np.arange(60, dtype=np.int32)
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  wanted = (unit(queries) @ unit(bank).T).argmax(1)
  for k, temperature in ((1, 0.07), (20, 1e-4)):
    found = knn.predict(bank, labels, queries, (k,), temperature=temperature)
    np.testing.assert_array_equal(found[k], wanted)


def test_chunks_change_nothing():
  bank, labels = gaussians(90, gap=0.3)
  queries, _ = gaussians(37, gap=0.3)
  ks = (1, 5, 20)
  whole = knn.predict(bank, labels, queries, ks)
  parts = knn.predict(bank, labels, queries, ks, chunk=16)
  for k in ks:
    np.testing.assert_array_equal(whole[k], parts[k])


def test_the_weights_come_from_200_neighbours_whatever_k():
  """Scaling all weights alike changes no vote; k cuts the sum only."""
  bank, labels = gaussians(300, gap=0.2)
  queries, _ = gaussians(40, gap=0.2)
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  similar = unit(queries) @ unit(bank).T
  found = knn.predict(bank, labels, queries, (10, 200))
  for k in (10, 200):
    votes = np.zeros((40, 2))
    for row, s in enumerate(similar):
      for i in np.argsort(-s)[:k]:
        votes[row, labels[i]] += np.exp(s[i] / 0.07)
    np.testing.assert_array_equal(found[k], votes.argmax(1))


def test_ks_above_the_bank_are_left_out_and_none_is_an_error():
  bank, labels = gaussians(12)
  assert set(knn.predict(bank, labels, bank, (5, 20))) == {5}
  with pytest.raises(ValueError, match='bank of 12 clips'):
    knn.predict(bank, labels, bank, (20,))
  with pytest.raises(ValueError, match='without a label'):
    knn.predict(bank, labels - 1, bank, (1,))
