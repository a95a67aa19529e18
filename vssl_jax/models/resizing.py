"""Resizes tables of learned positions to another grid of tokens.

Released codes differ in the filter, in the scale of source coordinates, and in
antialiasing when a table shrinks:

| name | as in |
|---|---|
| `trilinear` | this package, along time, height and width |
| `bicubic` | `transformers`' DINO (ViT) and DINOv2 |
| `bicubic_offset` | DINO and DINOv2: the scale is that of .1 more tokens |
| `bicubic_antialias` | DINOv2 with registers, both codes |

Source: torch.nn.functional.interpolate and the released position code of DINO
(arXiv 2104.14294), DINOv2 (arXiv 2304.07193) and registers (arXiv 2309.16588).
"""

import jax
import numpy as np
from jaxtyping import Float

NAMES = ('trilinear', 'bicubic', 'bicubic_offset', 'bicubic_antialias')
# DINO and DINOv2 add this to the number of tokens along an axis, so that
# rounding does not lose a token. It shifts every source coordinate.
OFFSET = 0.1


def resize(
  table: Float[np.ndarray, 't h w D'],
  grid: tuple[int, int, int],
  kind: str = 'trilinear',
) -> Float[np.ndarray, 'T H W D']:
  """Resizes learned positions to another grid.

  Bicubic kinds resize height and width. Time is always resized linearly.

  Args:
    table: positions, float.
    grid: new number of tokens along (time, height, width).
    kind: one of `NAMES`.

  Raises:
    ValueError: `kind` is unknown.
  """
  if kind not in NAMES:
    raise ValueError(f'resize is {kind!r}, wanted one of {NAMES}')
  table = np.asarray(table, np.float32)
  if kind == 'trilinear':
    return _linear(table, (*grid, table.shape[3]))
  if table.shape[1:3] != grid[1:]:
    # Also along an axis of equal length, which the offset shifts.
    rows, columns = (
      _cubic_weights(table.shape[axis], grid[axis], kind) for axis in (1, 2)
    )
    table = np.einsum('hy,wx,tyxd->thwd', rows, columns, table, optimize=True)
    table = table.astype(np.float32)
  return _linear(table, (*grid, table.shape[3]))


def _linear(table: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  if table.shape == shape:
    return table
  return np.asarray(
    jax.image.resize(table, shape, 'trilinear', antialias=False)
  )


def _cubic_weights(
  length: int, wanted: int, kind: str
) -> Float[np.ndarray, 'wanted length']:
  """Returns the weights of the stored tokens in each new token."""
  scale = length / wanted  # stored tokens per new token
  if kind == 'bicubic_offset':
    scale = length / (wanted + OFFSET)
  centres = (np.arange(wanted) + 0.5) * scale
  if kind == 'bicubic_antialias':
    # A wider filter if the table shrinks, cut and normalised at the edges.
    stretch = max(scale, 1.0)
    stored = np.arange(length) + 0.5
    distance = (stored[None] - centres[:, None]) / stretch
    weights = _keys(distance, a=-0.5)
    return weights / weights.sum(axis=1, keepdims=True)
  source = centres - 0.5
  first = np.floor(source).astype(int) - 1
  taps = first[:, None] + np.arange(4)[None]
  values = _keys(source[:, None] - taps, a=-0.75)
  weights = np.zeros((wanted, length))
  rows = np.broadcast_to(np.arange(wanted)[:, None], taps.shape)
  # Indices beyond an edge are clipped to the edge.
  np.add.at(weights, (rows, taps.clip(0, length - 1)), values)
  return weights


def _keys(x: np.ndarray, a: float) -> np.ndarray:
  """Returns Keys' cubic convolution kernel at distances `x`."""
  x = np.abs(x)
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = a * (((x - 5) * x + 8) * x - 4)
  return np.where(x < 1, near, np.where(x < 2, far, 0.0))
