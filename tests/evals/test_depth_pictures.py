import numpy as np
from PIL import Image

from vssl_jax.evals.depth import pictures

TRUTH = np.linspace(1, 3, 4 * 6 * 8).reshape(4, 6, 8)


def test_near_is_dark_and_what_is_unknown_is_grey():
  known = np.ones(TRUTH.shape, bool)
  known[0, 0, 0] = False
  found = pictures.colours(TRUTH, 1.0, 3.0, known)
  assert (found[0, 0, 0] == pictures.UNKNOWN).all()
  light = found.astype(int).sum(-1).ravel()[1:]
  assert light[0] < light[len(light) // 2] < light[-1]
  # Beyond the ends there is no further colour.
  ends = pictures.colours(np.asarray([[[-5.0, 1.0, 3.0, 9.0]]]), 1.0, 3.0)[0, 0]
  np.testing.assert_array_equal(ends[0], ends[1])
  np.testing.assert_array_equal(ends[2], ends[3])


def test_colours_end_where_the_truth_does_and_holes_do_not_count():
  truth = TRUTH.copy()
  truth[0] = 0
  low, high = pictures.ends(truth)
  assert truth[truth > 0].min() <= low < 1.6
  assert 2.9 < high <= 3
  assert pictures.ends(np.zeros_like(TRUTH)) == (0.0, 1.0)
  flat = pictures.ends(np.full_like(TRUTH, 2.0))
  assert flat[0] == 2 < flat[1]


def test_rows_are_input_truth_prediction_and_error(tmp_path):
  video = np.full((4, 6, 8, 1), 200, np.uint8)
  truth = TRUTH.copy()
  truth[:, 0] = 0
  guess = np.where(truth > 0, truth, 2.0)
  guess[0, 1, 0] *= 1.5
  rows = list(pictures.rows(video, truth, guess).values())
  assert [len(row) for row in rows] == [4] * 4
  assert (rows[0][0] == 200).all()
  assert (rows[1][0][0] == pictures.UNKNOWN).all()
  assert not (rows[2][0][0] == pictures.UNKNOWN).all()
  # Where it is right the error is dark, where it is half off it is bright.
  assert rows[3][0][1, 0].sum() > rows[3][0][1, 1].sum() + 200
  np.testing.assert_array_equal(rows[1][0][2:], rows[2][0][2:])
  path = tmp_path / 'new' / 'depth.png'
  pictures.save(path, video, truth, guess, 'what it is')
  with Image.open(path) as picture:
    assert picture.size[0] > 400
