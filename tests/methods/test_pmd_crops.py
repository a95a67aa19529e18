"""Rows in the frame of the picture: against loops, and on a moving crop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssl_jax.methods import pmd_terms

READ = jax.jit(pmd_terms.cells_of_crop, static_argnames='size')
WRITE = jax.jit(pmd_terms.cells_of_frame, static_argnames='size')


def _call(function, *arrays, size):
  return np.asarray(function(*map(jnp.asarray, arrays), size=size))


def _boxes(rng, count, smallest=0.3):
  """Boxes of random sides and places, float32 as the pipeline has them."""
  sides = rng.uniform(smallest, 1.0, (count, 2))
  corner = rng.uniform(size=(count, 2)) * (1 - sides)
  return np.concatenate([corner, corner + sides], axis=1).astype(np.float32)


def _cell(box, flip, i, j, size):
  """The picture's cell whose centre is nearest to that of the crop's (i, j)."""
  top, left, bottom, right = box.astype(np.float64)
  h, w = size
  column = w - 1 - j if flip else j
  y = top + (i + 0.5) / h * (bottom - top)
  x = left + (column + 0.5) / w * (right - left)
  centres_y = (np.arange(h) + 0.5) / h
  centres_x = (np.arange(w) + 0.5) / w
  return np.abs(centres_y - y).argmin(), np.abs(centres_x - x).argmin()


def _draw(size, count=6, times=2):
  rng = np.random.default_rng(0)
  cells = size[0] * size[1]
  rows, values = rng.normal(size=(2, count, times, cells)).astype(np.float32)
  written = rng.random((count, times, cells)) < 0.5
  values[~written] = np.nan  # what does not count is not looked at
  flip = np.arange(count) % 2 == 1
  return rows, values, written, _boxes(rng, count), flip


@pytest.mark.parametrize('size', [(4, 4), (3, 5)])
def test_reading_is_a_loop_over_cells(size):
  rows, _, _, crop, flip = _draw(size)
  want = np.empty_like(rows)
  for b, (box, turned) in enumerate(zip(crop, flip, strict=True)):
    for i in range(size[0]):
      for j in range(size[1]):
        y, x = _cell(box, turned, i, j, size)
        want[b, :, i * size[1] + j] = rows[b, :, y * size[1] + x]
  got = _call(READ, rows, crop, flip, size=size)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('size', [(4, 4), (3, 5)])
def test_writing_is_a_loop_over_cells(size):
  rows, values, written, crop, flip = _draw(size)
  found = {}
  for b, t, c in np.argwhere(written):
    y, x = _cell(crop[b], flip[b], *divmod(c, size[1]), size)
    found.setdefault((b, t, y * size[1] + x), []).append(values[b, t, c])
  want = rows.copy()
  for place, several in found.items():
    want[place] = np.mean(several)
  assert max(map(len, found.values())) > 1 and len(found) < rows.size
  got = _call(WRITE, rows, values, written, crop, flip, size=size)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  kept = np.ones(rows.shape, bool)
  kept[tuple(np.transpose(list(found)))] = False
  np.testing.assert_array_equal(got[kept], rows[kept])


def test_the_whole_picture_is_its_own_frame():
  rows, values, written, _, _ = _draw((4, 4))
  whole = np.tile(np.float32([0, 0, 1, 1]), (6, 1))
  plain = np.zeros(6, bool)
  np.testing.assert_array_equal(
    _call(READ, rows, whole, plain, size=(4, 4)), rows
  )
  np.testing.assert_array_equal(
    _call(WRITE, rows, values, written, whole, plain, size=(4, 4)),
    np.where(written, values, rows),
  )
  turned = _call(READ, rows, whole, ~plain, size=(4, 4))
  mirrored = rows.reshape(6, 2, 4, 4)[..., ::-1].reshape(rows.shape)
  np.testing.assert_array_equal(turned, mirrored)


SIDE, FINE = 8, 32  # cells of a side, pixels of a cell


def _losses(picture, box, flip):
  """What is hard of each cell of a crop: the mean of its pixels."""
  points = (np.arange(SIDE * 4) + 0.5) / (SIDE * 4)
  y = box[0] + (box[2] - box[0]) * points
  x = box[1] + (box[3] - box[1]) * (1 - points if flip else points)
  pixels = picture[
    np.ix_((y * SIDE * FINE).astype(int), (x * SIDE * FINE).astype(int))
  ]
  return pixels.reshape(SIDE, 4, SIDE, 4).mean(axis=(1, 3)).reshape(1, 1, -1)


def test_what_is_hard_is_found_again_in_the_picture():
  """A hard region of a picture, seen through crops that move and mirror."""
  rng = np.random.default_rng(1)
  hard = np.zeros((SIDE, SIDE), bool)
  hard[1:4, 4:7] = True
  picture = np.kron(hard, np.ones((FINE, FINE))).astype(np.float32)
  frame = grid = np.zeros((1, 1, SIDE * SIDE), np.float32)
  told = []
  for box in _boxes(rng, 150, smallest=0.5)[:, None]:
    flip = rng.random(1) < 0.5
    loss = _losses(picture, box[0], flip[0]).astype(np.float32)
    written = rng.random(loss.shape) < 0.8
    expected = _call(READ, frame, box, flip, size=(SIDE, SIDE))
    told.append((expected[written], loss[written]))
    value = 0.3 * loss + 0.7 * expected
    frame = _call(WRITE, frame, value, written, box, flip, size=(SIDE, SIDE))
    grid = np.where(written, 0.3 * loss + 0.7 * grid, grid)
  again = [(x.reshape(SIDE, SIDE) > 0.5) for x in (frame, grid)]
  overlap = [(x & hard).sum() / (x | hard).sum() for x in again]
  assert overlap[0] > 0.9 and overlap[1] < 0.6
  before, then = (np.concatenate(x) for x in zip(*told[50:], strict=True))
  assert np.corrcoef(before, then)[0, 1] > 0.8  # what was hard is so again
