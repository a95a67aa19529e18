import numpy as np
import pytest

from vssl_jax.evals import multi_view


def add(found, rows):
  """Adds (video, view, label, probabilities) of one head."""
  video, view, label, chance = zip(*rows, strict=True)
  found.add(
    np.asarray(chance, np.float32)[:, None],
    *(np.asarray(x) for x in (label, video, view)),
    np.ones(len(video)),
  )


def softmax(x):
  x = np.exp(np.asarray(x, np.float64))
  return x / x.sum()


def test_probabilities_are_averaged_not_logits():
  # Logits add to (9, 10, 0): class 1. Probabilities add to class 0.
  logits = [[3.0, 0.0, 0.0], [3.0, 0.0, 0.0], [3.0, 10.0, 0.0]]
  assert np.argmax(np.sum(logits, axis=0)) == 1
  found = multi_view.Predictions(3)
  add(found, [(7, v, 0, softmax(x)) for v, x in enumerate(logits)])
  assert found.predictions()[2].tolist() == [[0]]
  assert found.correct().tolist() == [1]


def test_order_of_views_and_batches_changes_nothing():
  rng = np.random.default_rng(0)
  rows = [
    (video, view, video % 3, softmax(rng.normal(size=3)))
    for video in range(20)
    for view in range(3)
  ]
  whole, parts = multi_view.Predictions(3), multi_view.Predictions(3)
  add(whole, rows)
  order = rng.permutation(len(rows))
  for start in range(0, len(rows), 7):
    add(parts, [rows[i] for i in order[start : start + 7]])
  for a, b in zip(whole.predictions(), parts.predictions(), strict=True):
    np.testing.assert_array_equal(a, b)
  np.testing.assert_array_equal(whole.correct(), parts.correct())
  np.testing.assert_allclose(whole.loss(), parts.loss(), rtol=1e-12)


def test_padding_counts_for_nothing():
  found = multi_view.Predictions()
  found.add(
    np.asarray([[[0.9, 0.1]], [[0.9, 0.1]]]),
    np.asarray([0, 0]),
    np.asarray([4, 4]),
    np.asarray([0, 0]),
    np.asarray([1.0, 0.0]),
  )
  assert found.total == 1


def test_missing_and_double_views_are_errors():
  found = multi_view.Predictions(2)
  add(found, [(0, 0, 0, [1.0, 0.0])])
  with pytest.raises(ValueError, match=r'video 0 has views \[0\], wanted 2'):
    found.correct()
  with pytest.raises(ValueError, match='occurred twice'):
    add(found, [(0, 0, 0, [1.0, 0.0])])
  add(found, [(0, 1, 0, [1.0, 0.0])])
  with pytest.raises(ValueError, match='occurred twice'):
    add(found, [(0, 0, 0, [1.0, 0.0])])


def test_top_5_and_loss():
  found = multi_view.Predictions()
  chance = np.asarray([0.3, 0.25, 0.2, 0.1, 0.08, 0.07])
  add(found, [(i, 0, i, chance) for i in range(6)])
  assert found.correct().tolist() == [1]
  assert found.correct(5).tolist() == [5]
  np.testing.assert_allclose(found.loss(), -np.log(chance).mean(), rtol=1e-6)


def test_equal_chances_go_to_the_lower_class():
  found = multi_view.Predictions()
  add(found, [(0, 0, 0, [0.5, 0.5]), (1, 0, 1, [0.5, 0.5])])
  assert found.correct().tolist() == [1]


def test_a_head_that_diverged_is_wrong():
  found = multi_view.Predictions()
  found.add(
    np.asarray([[[np.nan, np.nan], [0.8, 0.2]]]),
    np.asarray([0]),
    np.asarray([0]),
    np.asarray([0]),
    np.ones(1),
  )
  assert found.correct().tolist() == [0, 1]
  assert np.isfinite(found.loss()).all()
