"""Token order inside Hiera: grouped by mask unit.

A unit is 2^L x 2^L tokens of one time step. Inside it, tokens are sorted by
the last bit of their row and column, then by the bit before it, and so on:

    token (row y, column x) of a unit -> ((s_1 * 4 + s_2) * 4 + ...) + s_L
    s_k = 2 * (bit k - 1 of y) + (bit k - 1 of x)

At any stage, tokens that are pooled together are a quarter of a unit apart, and
pooling preserves the order. Units are the slower axis: the tokens of a window
are contiguous, and selecting units selects whole rows. (The released code of
arXiv 2306.00989 has the same order with units as the faster axis.)
"""

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from vssl_jax.masks import tubelets


def unroll(
  x: Shaped[Array, 'B t h w D'], levels: int
) -> Shaped[Array, 'B U n D']:
  """Groups tokens by unit, in Hiera's order; units in raster order.

  Args:
    x: tokens of a clip in raster order; h and w are multiples of 2^levels.
    levels: L; a unit has n = 4^L tokens.
  """
  batch, t, h, w, width = x.shape
  side, bits = 2**levels, (2,) * levels
  x = x.reshape(batch, t, h // side, *bits, w // side, *bits, width)
  row, column = 2 + levels, 3 + 2 * levels  # axes of the last bits
  order = [a - k for k in range(levels) for a in (row, column)]
  x = x.transpose(0, 1, 2, 3 + levels, *order, x.ndim - 1)
  return x.reshape(batch, -1, side * side, width)


def reroll(x: Shaped[Array, 'B U n D']) -> Shaped[Array, 'B U 1 s s D']:
  """Reorders the tokens of each unit to rows and columns."""
  batch, units, tokens, width = x.shape
  levels = (tokens.bit_length() - 1) // 2
  x = x.reshape(batch, units, *(2,) * (2 * levels), width)
  rows = [2 * k for k in range(levels, 0, -1)]  # first bits: last axes
  x = x.transpose(0, 1, *rows, *(a + 1 for a in rows), x.ndim - 1)
  return x.reshape(batch, units, 1, 2**levels, 2**levels, width)


def together(
  x: Shaped[Array, 'B U 1 s s D'], unit_grid: tubelets.Grid
) -> Shaped[Array, 'B t h w D']:
  """Reorders the tokens of all units of a clip to rows and columns."""
  t, h, w = unit_grid
  batch, side, width = x.shape[0], x.shape[3], x.shape[-1]
  x = x.reshape(batch, t, h, w, side, side, width)
  x = x.transpose(0, 1, 2, 4, 3, 5, 6)
  return x.reshape(batch, t, h * side, w * side, width)


def pool(x: Shaped[Array, 'B N ...'], units: int) -> Shaped[Array, 'B M ...']:
  """Max-pools each 2 x 2 tokens.

  Args:
    x: tokens in Hiera's order.
    units: number of units.
  """
  x = x.reshape(x.shape[0], units, 4, -1, *x.shape[2:])
  return jnp.max(x, axis=2).reshape(x.shape[0], -1, *x.shape[4:])


def cells(x: Shaped[Array, 'B K 1 h w D'], side: int) -> Shaped[Array, 'B N P']:
  """Cuts each unit into side x side cells, as a strided convolution does.

  Returns:
    One row of (row, column, channel) values per cell, grouped by unit, in
    raster order inside a unit.

  Raises:
    ValueError: `side` does not divide the height or width of a unit.
  """
  batch, count, _, h, w, width = x.shape
  if h % side or w % side:
    raise ValueError(
      f'a unit has {h} x {w} tokens, which cannot be cut into {side} x {side}; '
      'Hiera leaves 2 x 2 of a unit with q_pool=2'
    )
  x = x.reshape(batch, count, side, h // side, side, w // side, width)
  x = x.transpose(0, 1, 2, 4, 3, 5, 6)
  return x.reshape(batch, count * side * side, -1)
