"""Rows that stay with the picture while crops of it move.

A row has the h x w cells of the whole picture that a clip was cut from. Cell
p of a crop is another place in every epoch; where it was cut, and whether it
was mirrored, says which cell of the picture lies under its centre (after
`rows_frame='crop'` of PMD; our choice, the published text has the cells of the
crop).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Size = tuple[int, int]
Rows = Float[Array, 'B t N']  # N = h * w cells


def read(
  rows: Rows, crop: Float[Array, 'B 4'], flip: Bool[Array, 'B'], size: Size
) -> Rows:
  """Returns the values of the picture's cells under those of the crop.

  Args:
    rows: of whole pictures.
    crop: top, left, bottom, right of the clip, fractions of the picture.
    flip: whether left and right changed places inside the crop.
    size: (h, w) of the grid.
  """
  down, across = _cells(crop, flip, size)
  under = down[:, :, None] * size[1] + across[:, None, :]
  under = under.reshape(under.shape[0], 1, -1)
  return jnp.take_along_axis(rows, under, axis=2)


def write(
  rows: Rows,
  values: Rows,
  written: Bool[Array, 'B t N'],
  crop: Float[Array, 'B 4'],
  flip: Bool[Array, 'B'],
  size: Size,
) -> Rows:
  """Returns rows with the mean of the crop's cells that lie on each of theirs.

  Cells that nothing lies on keep their value.

  Args:
    rows: of whole pictures.
    values: of the crop's cells.
    written: which of the values count.
    crop: as in `read`.
    flip: as in `read`.
    size: (h, w) of the grid.
  """
  h, w = size
  down, across = _cells(crop, flip, size)
  down, across = jax.nn.one_hot(down, h), jax.nn.one_hot(across, w)

  def gathered(cells: Array) -> Array:
    cells = cells.reshape(*cells.shape[:2], h, w)
    found = jnp.einsum(
      'btij,biy,bjx->btyx', cells, down, across, precision='highest'
    )
    return found.reshape(rows.shape)

  count = gathered(written.astype(jnp.float32))
  total = gathered(jnp.where(written, values, 0.0))
  return jnp.where(count > 0, total / jnp.maximum(count, 1), rows)


def _cells(
  crop: Float[Array, 'B 4'], flip: Bool[Array, 'B'], size: Size
) -> tuple[Int[Array, 'B h'], Int[Array, 'B w']]:
  """Returns the picture's row and column under the centres of the crop's."""
  h, w = size
  top, left, bottom, right = (crop[:, i, None] for i in range(4))
  y, x = (((jnp.arange(n) + 0.5) / n)[None] for n in size)
  x = jnp.where(flip[:, None], 1 - x, x)
  y, x = top + (bottom - top) * y, left + (right - left) * x
  return tuple(
    jnp.clip(jnp.floor(v * n).astype(jnp.int32), 0, n - 1)
    for v, n in ((y, h), (x, w))
  )
