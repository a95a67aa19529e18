"""Where a token stands: tables that are added, and rotations of channels.

The tables share no formula and are not interchangeable. They are constants:
no gradient, no weight decay, not in a checkpoint.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vssl_jax.models import layers

BASE = 10000.0


class Rope(NamedTuple):
  """Cosines and sines that rotate the channels of one head, or of a token.

  Attributes:
    cos: 1 where a channel does not turn. A leading 1 serves every example.
    sin: 0 where a channel does not turn.
  """

  cos: Float[Array, 'B N d']
  sin: Float[Array, 'B N d']


def coordinates(grid: layers.Grid) -> Int[np.ndarray, 'N 3']:
  """Returns time, row and column of every token."""
  return np.stack([axis.ravel() for axis in np.indices(grid)], axis=-1)


def _sincos_1d(position: np.ndarray, size: int) -> np.ndarray:
  """Returns [N, size]: a block of sines, then a block of cosines."""
  omega = BASE ** (-np.arange(size // 2) / (size / 2))
  angle = position[:, None].astype(np.float64) * omega[None, :]
  return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def sinusoid_1d(grid: layers.Grid, width: int) -> Float[np.ndarray, 'N D']:
  """Returns VideoMAE's table over the flat token index.

  Channel j of row n holds the sine (j even) or cosine (j odd) of
  n / 10000^(2 * floor(j / 2) / D).

  Source: VideoMAE, arXiv 2203.12602, released code.
  """
  n = np.arange(np.prod(grid), dtype=np.float64)[:, None]
  j = np.arange(width)[None, :]
  angle = n / BASE ** (2 * (j // 2) / width)
  table = np.where(j % 2 == 0, np.sin(angle), np.cos(angle))
  return table.astype(np.float32)


def sincos_3d_vjepa(
  grid: layers.Grid, width: int, uniform_power: bool = False
) -> Float[np.ndarray, 'N D']:
  """Returns V-JEPA's table: a part for time, one for rows, one for columns.

  Args:
    grid: tokens along (time, height, width).
    width: channels; a multiple of 8, so that every part is even.
    uniform_power: three equal parts, cut to the width, and not a half and
      two quarters.

  Source: V-JEPA, arXiv 2404.08471, released code.

  Raises:
    ValueError: the width cannot be cut into even parts.
  """
  if width % 8:
    raise ValueError(
      f'sincos_3d_vjepa needs a width that is a multiple of 8, found {width}'
    )
  parts = (width // 2, width // 4, width // 4)
  if uniform_power:
    parts = (2 * -(-width // 6),) * 3
  where = coordinates(grid)
  table = np.concatenate(
    [_sincos_1d(where[:, axis], part) for axis, part in enumerate(parts)],
    axis=1,
  )
  return table[:, :width].astype(np.float32)


def sincos_3d_vjepa_uniform(
  grid: layers.Grid, width: int
) -> Float[np.ndarray, 'N D']:
  """Returns V-JEPA's table with three equal parts (its released ViT-L, H)."""
  return sincos_3d_vjepa(grid, width, uniform_power=True)


def sincos_3d_mvd(grid: layers.Grid, width: int) -> Float[np.ndarray, 'N D']:
  """Returns MVD's table: a quarter for time, then columns, then rows.

  Columns and rows get three eighths of the channels each.

  Source: MVD, arXiv 2212.04500, released code.

  Raises:
    ValueError: the width cannot be cut into even parts.
  """
  if width % 16:
    raise ValueError(
      f'sincos_3d_mvd needs a width that is a multiple of 16, found {width}'
    )
  where = coordinates(grid)
  parts = ((0, width // 4), (2, width * 3 // 8), (1, width * 3 // 8))
  return np.concatenate(
    [_sincos_1d(where[:, axis], part) for axis, part in parts], axis=1
  ).astype(np.float32)


def sincos_2d(grid: layers.Grid, width: int) -> Float[np.ndarray, 'N D']:
  """Returns MAE's table: a half for columns, then rows; the same at any time.

  Source: MAE, arXiv 2111.06377, released code.

  Raises:
    ValueError: the width cannot be cut into even parts.
  """
  if width % 4:
    raise ValueError(
      f'sincos_2d needs a width that is a multiple of 4, found {width}'
    )
  where = coordinates(grid)
  return np.concatenate(
    [_sincos_1d(where[:, axis], width // 2) for axis in (2, 1)], axis=1
  ).astype(np.float32)


TABLES = {
  'sinusoid_1d': sinusoid_1d,
  'sincos_2d': sincos_2d,
  'sincos_3d_mvd': sincos_3d_mvd,
  'sincos_3d_vjepa': sincos_3d_vjepa,
  'sincos_3d_vjepa_uniform': sincos_3d_vjepa_uniform,
}
ROTATIONS = ('rope_3d', 'rope_post_norm', 'both')
LEARNED = ('learned', 'both')  # `both`: the learned table and rope_post_norm
NAMES = tuple(dict.fromkeys((*TABLES, *ROTATIONS, *LEARNED, 'none')))
# Shares of a token's channels that turn with time, row and column.
# Source: LayerLock, arXiv 2509.10156; that segments are even is ours.
POST_NORM_SHARES = (0.1, 0.25, 0.25)


def table(
  module: nn.Module, kind: str, grid: layers.Grid, width: int
) -> Float[Array, 'N D'] | None:
  """Returns what is added to the tokens of a grid, or None for nothing.

  Args:
    module: gets the parameter `positions` [t, h, w, D] if it is learned.
    kind: one of `NAMES`.
    grid: tokens along (time, height, width).
    width: channels of a token.

  Raises:
    ValueError: an unknown kind, or learned positions of another grid.
  """
  if kind not in NAMES:
    raise ValueError(f'positions is {kind!r}, wanted one of {sorted(NAMES)}')
  if kind in LEARNED:
    found = module.get_variable('params', 'positions')
    if found is not None and found.shape[:3] != tuple(grid):
      raise ValueError(
        f'the learned positions are for a grid of {found.shape[:3]} tokens and '
        f'the clip has {tuple(grid)}; load the weights for this grid, which '
        'resizes the table'
      )
    init = nn.initializers.normal(0.02)
    learned = module.param('positions', init, (*grid, width), jnp.float32)
    return jnp.asarray(learned).reshape(-1, width)
  return jnp.asarray(TABLES[kind](grid, width)) if kind in TABLES else None


def class_row(
  module: nn.Module, kind: str, width: int
) -> Float[Array, '1 D'] | None:
  """Returns what is added to a class token, or None for nothing.

  Learned tables have a row for it. In fixed ones it stands nowhere: MAE's has
  a row of zeros.

  Args:
    module: gets the parameter `class_position` [1, D] if it is learned.
    kind: one of `NAMES`.
    width: channels of a token.

  Raises:
    ValueError: the kind turns tokens by where they stand.
  """
  if kind in ROTATIONS:
    raise ValueError(
      f'positions={kind!r} turns tokens by where they stand and a class token '
      'stands nowhere; set class_token=False, or positions to one of '
      f'{sorted({*TABLES, *LEARNED} - set(ROTATIONS))}'
    )
  if kind not in LEARNED:
    return None
  init = nn.initializers.normal(0.02)
  row = module.param('class_position', init, (1, width), jnp.float32)
  return jnp.asarray(row)


def rope_segment(head_dim: int) -> int:
  """Returns the channels of a head that turn with each of the three axes."""
  return 2 * ((head_dim // 3) // 2)


def rope_3d(
  indices: Int[Array, 'B N'],
  grid: layers.Grid,
  head_dim: int,
  pairing: str = 'paired',
) -> Rope:
  """Returns the rotation of tokens by time, row and column.

  Each axis turns `rope_segment` channels; what is left stays as it is.
  Neighbouring channels (2i, 2i+1) form a pair.

  Args:
    indices: flat token indices.
    grid: tokens along (time, height, width).
    head_dim: channels of one head.
    pairing: `paired` turns both channels of a pair by the same angle;
      `vjepa2` reproduces the released code, which lists the frequencies twice
      in a row over the pairs, so that partners differ. Needed for its weights.

  Source: V-JEPA 2, arXiv 2506.09985, section 2.1.

  Raises:
    ValueError: an unknown pairing.
  """
  size = rope_segment(head_dim)
  omega = BASE ** (-np.arange(size // 2) / max(size / 2, 1))
  if pairing == 'paired':
    omega = np.repeat(omega, 2)
  elif pairing == 'vjepa2':
    omega = np.tile(omega, 2)
  else:
    raise ValueError(
      f"rope_pairing is {pairing!r}, wanted 'paired' or 'vjepa2'"
    )
  return _turn(indices, grid, (omega,) * 3, head_dim)


def rope_post_norm(
  indices: Int[Array, 'B N'], grid: layers.Grid, width: int
) -> Rope:
  """Returns LayerLock's rotation of a block's normed tokens.

  10, 25 and 25 % of the channels turn with time, row and column, in this
  order from the first channel; neighbours (2i, 2i+1) form a pair with one
  frequency, base 10000. The rest stays as it is. The shares are published;
  base, order and even segments are our choice.

  Args:
    indices: flat token indices.
    grid: tokens along (time, height, width).
    width: channels of a token.

  Source: LayerLock, arXiv 2509.10156.
  """
  sizes = [2 * round(share * width / 2) for share in POST_NORM_SHARES]
  omegas = tuple(
    np.repeat(BASE ** (-np.arange(size // 2) / max(size / 2, 1)), 2)
    for size in sizes
  )
  return _turn(indices, grid, omegas, width)


def rope_of(
  encoder: Any, index: Int[Array, 'R N'], grid: layers.Grid
) -> Rope | None:
  """Returns the rotation of an encoder's tokens; arguments as in `rope`."""
  return rope(
    encoder.positions,
    index,
    grid,
    encoder.width,
    encoder.num_heads,
    encoder.rope_pairing,
  )


def rope(
  kind: str,
  indices: Int[Array, 'B N'],
  grid: layers.Grid,
  width: int,
  num_heads: int,
  pairing: str = 'paired',
) -> Rope | None:
  """Returns the rotation of a kind in `NAMES`; None where nothing turns.

  `rope_3d` is of one head's channels, the others of a token's.
  """
  if kind not in ROTATIONS:
    return None
  if kind == 'rope_3d':
    return rope_3d(indices, grid, width // num_heads, pairing)
  return rope_post_norm(indices, grid, width)


def _turn(
  indices: Int[Array, 'B N'],
  grid: layers.Grid,
  omegas: tuple[np.ndarray, ...],
  channels: int,
) -> Rope:
  """Returns the rotation by time, row and column times their frequencies."""
  _, h, w = grid
  where = (indices // (h * w), indices % (h * w) // w, indices % w)
  angles = [
    p[:, :, None].astype(jnp.float32)
    * jnp.asarray(omega, jnp.float32).reshape(1, 1, -1)
    for p, omega in zip(where, omegas, strict=True)
  ]
  angle = jnp.concatenate(angles, axis=-1)
  rest = channels - angle.shape[-1]
  angle = jnp.pad(angle, ((0, 0), (0, 0), (0, rest)))
  return Rope(jnp.cos(angle), jnp.sin(angle))


def rotate(x: Float[Array, 'B N H d'], rope: Rope) -> Float[Array, 'B N H d']:
  """Turns pairs of channels (2i, 2i+1) by their angles, in float32.

  Raises:
    ValueError: an odd number of channels.
  """
  if x.shape[-1] % 2:
    raise ValueError(
      f'num_heads: found {x.shape[2]} heads of {x.shape[-1]} channels, wanted '
      'an even number of channels in each, as positions turn pairs of them; '
      'set num_heads or width of that encoder or predictor'
    )
  pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
  turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1)
  cos, sin = rope.cos[:, :, None, :], rope.sin[:, :, None, :]
  out = x.astype(jnp.float32) * cos + turned.reshape(x.shape) * sin
  return out.astype(x.dtype)
