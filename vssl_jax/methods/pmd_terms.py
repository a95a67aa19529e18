"""Terms of PMD's loss: patch difficulty from memory, and feature alignment.

Pure functions. The example memory has one value per patch, or per position of a
tube. `read` and `write` convert between the memory and the patches of a step's
clips. With `memory_frame='crop'` the memory has the h x w cells of the full
frame that the clip was cut from. A cell of a crop covers another part of the
frame in every epoch, so it is mapped to the frame cell under its centre, by the
crop and the flip (our choice; in the published text, cells are those of the
crop). Source: PMD (CVPR 2026), secondary; `README.md` lists open details.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vssl_jax.data import batch as batch_lib
from vssl_jax.masks import tubelets


def hidden(masked: Int[Array, 'B M'], n: int) -> Bool[Array, 'B N']:
  """Returns a boolean array: True for the masked ones of n patches."""
  examples = jnp.arange(len(masked))[:, None]
  return jnp.zeros((len(masked), n), bool).at[examples, masked].set(True)


def spread(
  values: Float[Array, 'B M'], masked: Int[Array, 'B M'], n: int
) -> Float[Array, 'B N']:
  """Scatters values to the masked ones of n patches; the others are 0."""
  examples = jnp.arange(len(masked))[:, None]
  return jnp.zeros((len(masked), n)).at[examples, masked].set(values)


def read(
  rows: Float[Array, 'B R'],
  batch: batch_lib.Batch,
  grid: tubelets.Grid,
  frame: str,
) -> Float[Array, 'B N']:
  """Returns the memory value of each patch of this step's clips.

  Args:
    rows: memory of the batch's examples; R is N, or h * w for tubes.
    batch: `crop` and `flip` are read if `frame` is `crop`.
    grid: (t, h, w) in tokens.
    frame: `memory_frame`, `grid` or `crop`, see `pmd.DistilPhase`.
  """
  t, h, w = grid
  cells = rows.reshape(len(rows), -1, h * w)
  if frame == 'crop':
    cells = cells_of_crop(cells, batch.crop, batch.flip, (h, w))
  cells = jnp.broadcast_to(cells, (len(rows), t, h * w))
  return cells.reshape(len(rows), -1)


def write(
  rows: Float[Array, 'B R'],
  values: Float[Array, 'B N'],
  written: Bool[Array, 'B N'],
  batch: batch_lib.Batch,
  grid: tubelets.Grid,
  *,
  shape: str,
  frame: str,
) -> Float[Array, 'B R']:
  """Returns the memory updated with the patches of a step, without gradients.

  Args:
    rows: memory of the batch's examples before the update.
    values: new value of every patch.
    written: True for patches whose value is written.
    batch: as in `read`.
    grid: (t, h, w) in tokens.
    shape: `memory_shape`: `patch`, or `tube` for the mean over the written time
      steps.
    frame: as in `read`.
  """
  t, h, w = grid
  values, written = (x.reshape(-1, t, h * w) for x in (values, written))
  if shape == 'tube':
    count = jnp.sum(written, axis=1, keepdims=True)
    values = jnp.sum(jnp.where(written, values, 0.0), axis=1, keepdims=True)
    values, written = values / jnp.maximum(count, 1), count > 0
  cells = rows.reshape(len(rows), -1, h * w)
  if frame == 'crop':
    crop, flip = batch.crop, batch.flip
    cells = cells_of_frame(cells, values, written, crop, flip, (h, w))
  else:
    cells = jnp.where(written, values, cells)
  return jax.lax.stop_gradient(cells.reshape(rows.shape))


PARTS = ('both', 'smooth', 'weights')


class Difficulty(NamedTuple):
  """Difficulty-aware loss of each clip.

  Attributes:
    loss: [B], loss per clip.
    smoothed: [B, N], new memory; unchanged for visible patches.
    weights: [B, N], weights that sum to 1 per clip; 0 for visible patches.
  """

  loss: Float[Array, 'B']
  smoothed: Float[Array, 'B N']
  weights: Float[Array, 'B N']


def weigh(
  loss: Float[Array, 'B N'],
  hidden: Bool[Array, 'B N'],
  value: Float[Array, 'B N'],
  window: Float[Array, 'B N'],
  *,
  alpha: float,
  tau: float,
  parts: str = 'both',
) -> Difficulty:
  """Returns the sum of smoothed patch losses, weighted by difficulty (DARE).

  Lhat = alpha * loss + (1 - alpha) * value; w = softmax(window / tau) over the
  hidden patches; the loss is sum(w * Lhat). Memory and weights are constants:
  the gradient is that of w * alpha * loss.

  Args:
    loss: loss of each patch; only hidden patches are used.
    hidden: True for patches that are predicted.
    value: smoothed loss after the last visit; 0 before the first visit.
    window: smoothed loss at the end of the last window.
    alpha: weight of the new loss.
    tau: temperature.
    parts: `both`; `smooth` uses uniform weights; `weights` does not smooth the
      loss.

  Raises:
    ValueError: `parts` is unknown.
  """
  if parts not in PARTS:
    raise ValueError(f'dare: found {parts!r}, wanted one of {PARTS}')
  value, window = jax.lax.stop_gradient((value, window))
  smoothed = alpha * loss + (1 - alpha) * value
  score = jnp.zeros_like(window) if parts == 'smooth' else window / tau
  weights = jax.nn.softmax(score, axis=1, where=hidden)
  weights = jnp.where(hidden, weights, 0.0)
  term = loss if parts == 'weights' else smoothed
  return Difficulty(
    jnp.sum(weights * jnp.where(hidden, term, 0.0), axis=1),
    jax.lax.stop_gradient(jnp.where(hidden, smoothed, value)),
    weights,
  )


def evenness(
  weights: Float[Array, 'B N'], hidden: Bool[Array, 'B N']
) -> Float[Array, '']:
  """Returns the mean entropy of weights, divided by that of uniform weights."""
  logs = jnp.log(jnp.where(weights > 0, weights, 1.0))
  max_entropy = jnp.log(jnp.sum(hidden, axis=1).astype(jnp.float32))
  entropy = -jnp.sum(weights * logs, axis=1)
  return jnp.mean(entropy / jnp.maximum(max_entropy, 1e-6))


def align(
  mapped: Mapping[int, Float[Array, 'B V D']],
  groups: tuple[tuple[range, Float[Array, 'B V D']], ...],
) -> Float[Array, '']:
  """Returns CLFA's distance of student layers to deeper teacher layers.

  The distance is the mean square difference to the mean of a group of teacher
  layers. The mean square difference over all pairs of layers is this distance
  plus the spread returned by `condense`, which is a constant.

  Args:
    mapped: student layer (from 1) -> its tokens in the teacher's width.
    groups: (student layers, mean of their group of teacher layers) pairs.
  """
  total = jnp.zeros(())
  for students, mean in groups:
    distances = [jnp.mean(jnp.square(mapped[n] - mean)) for n in students]
    total += jnp.mean(jnp.stack(distances))
  return total


def condense(
  layers: Sequence[Float[Array, 'B N D']],
) -> tuple[Float[Array, 'B N D'], Float[Array, 'B N']]:
  """Returns the mean over layers, and the mean square deviation from it."""
  stacked = jnp.stack([x.astype(jnp.float32) for x in layers])
  mean = jnp.mean(stacked, axis=0, keepdims=True)
  return mean[0], jnp.mean(jnp.square(stacked - mean), axis=(0, 3))


def thirds(depth: int) -> tuple[range, range, range]:
  """Returns the layers (from 1) of the shallow, middle and deep third.

  Raises:
    ValueError: fewer than three layers.
  """
  if depth < 3:
    raise ValueError(
      f'alignment needs encoders of 3 blocks or more, found {depth}; set '
      'lambda_al=0 or take a deeper encoder'
    )
  a, b = depth // 3, 2 * depth // 3
  return range(1, a + 1), range(a + 1, b + 1), range(b + 1, depth + 1)


def aligned(depth: int) -> tuple[int, ...]:
  """Returns the student's layers (from 1) that are aligned with a teacher."""
  shallow, middle, _ = thirds(depth)
  return (*shallow, *middle)


Size = tuple[int, int]
Rows = Float[Array, 'B t N']  # N = h * w cells


def cells_of_crop(
  rows: Rows, crop: Float[Array, 'B 4'], flip: Bool[Array, 'B'], size: Size
) -> Rows:
  """Returns the value of the frame cell under each cell of the crop.

  Args:
    rows: values of the cells of full frames.
    crop: top, left, bottom, right of the clip, as fractions of the frame.
    flip: True if the crop is flipped horizontally.
    size: (h, w) of the grid.
  """
  down, across = _cells(crop, flip, size)
  indices = down[:, :, None] * size[1] + across[:, None, :]
  indices = indices.reshape(indices.shape[0], 1, -1)
  return jnp.take_along_axis(rows, indices, axis=2)


def cells_of_frame(
  rows: Rows,
  values: Rows,
  written: Bool[Array, 'B t N'],
  crop: Float[Array, 'B 4'],
  flip: Bool[Array, 'B'],
  size: Size,
) -> Rows:
  """Returns frame cells, set to the mean of the crop cells that map to each.

  Frame cells without a written crop cell keep their value.

  Args:
    rows: values of the cells of full frames.
    values: values of the cells of the crop.
    written: True for values that are written.
    crop: as in `cells_of_crop`.
    flip: as in `cells_of_crop`.
    size: (h, w) of the grid.
  """
  h, w = size
  down, across = _cells(crop, flip, size)
  down, across = jax.nn.one_hot(down, h), jax.nn.one_hot(across, w)

  def sum_to_frame(cells: Array) -> Array:
    cells = cells.reshape(*cells.shape[:2], h, w)
    sums = jnp.einsum(
      'btij,biy,bjx->btyx', cells, down, across, precision='highest'
    )
    return sums.reshape(rows.shape)

  count = sum_to_frame(written.astype(jnp.float32))
  total = sum_to_frame(jnp.where(written, values, 0.0))
  return jnp.where(count > 0, total / jnp.maximum(count, 1), rows)


def _cells(
  crop: Float[Array, 'B 4'], flip: Bool[Array, 'B'], size: Size
) -> tuple[Int[Array, 'B h'], Int[Array, 'B w']]:
  """Returns rows and columns of the frame under the centres of crop cells."""
  h, w = size
  top, left, bottom, right = (crop[:, i, None] for i in range(4))
  y, x = (((jnp.arange(n) + 0.5) / n)[None] for n in size)
  x = jnp.where(flip[:, None], 1 - x, x)
  y, x = top + (bottom - top) * y, left + (right - left) * x
  return tuple(
    jnp.clip(jnp.floor(v * n).astype(jnp.int32), 0, n - 1)
    for v, n in ((y, h), (x, w))
  )
