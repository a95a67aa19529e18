"""PMD's rows as patches of a step's clips, and back.

A row has one value for each patch of a clip, or one for each position of a
tube; its cells are those of the crop, or of the picture that it was cut from.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vssl_jax.methods import row_frame
from vssl_jax.models import layers


def hidden(masked: Int[Array, 'B M'], n: int) -> Bool[Array, 'B N']:
  """Returns which of n patches are masked."""
  rows = jnp.arange(len(masked))[:, None]
  return jnp.zeros((len(masked), n), bool).at[rows, masked].set(True)


def spread(
  values: Float[Array, 'B M'], masked: Int[Array, 'B M'], n: int
) -> Float[Array, 'B N']:
  """Returns values at masked patches, and 0 elsewhere."""
  rows = jnp.arange(len(masked))[:, None]
  return jnp.zeros((len(masked), n)).at[rows, masked].set(values)


def read(
  rows: Float[Array, 'B R'],
  batch: Mapping[str, Any],
  grid: layers.Grid,
  frame: str,
) -> Float[Array, 'B N']:
  """Returns rows as the patches of this step's clips.

  Args:
    rows: of the batch's examples; R is N, or h * w.
    batch: `crop` and `flip` are read where cells are the picture's.
    grid: (t, h, w) in tokens.
    frame: `grid` or `crop`, see `Pmd`.
  """
  t, h, w = grid
  cells = rows.reshape(len(rows), -1, h * w)
  if frame == 'crop':
    cells = row_frame.read(cells, batch['crop'], batch['flip'], (h, w))
  cells = jnp.broadcast_to(cells, (len(rows), t, h * w))
  return cells.reshape(len(rows), -1)


def write(
  rows: Float[Array, 'B R'],
  values: Float[Array, 'B N'],
  written: Bool[Array, 'B N'],
  batch: Mapping[str, Any],
  grid: layers.Grid,
  *,
  shape: str,
  frame: str,
) -> Float[Array, 'B R']:
  """Returns rows with this step's patches in them, without a gradient.

  Args:
    rows: as they were.
    values: of every patch.
    written: which of them count.
    batch: as in `read`.
    grid: (t, h, w) in tokens.
    shape: `patch`, or `tube`: the mean over the time steps that count.
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
    crop, flip = batch['crop'], batch['flip']
    cells = row_frame.write(cells, values, written, crop, flip, (h, w))
  else:
    cells = jnp.where(written, values, cells)
  return jax.lax.stop_gradient(cells.reshape(rows.shape))
