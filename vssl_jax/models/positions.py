"""Position embeddings: tables added to tokens, and rotations of channels.

The formulas of the tables differ, so they are not interchangeable. Fixed tables
are constants: no gradient, no weight decay, not in a checkpoint.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vssl_jax.masks import tubelets

BASE = 10000.0


class Rope(NamedTuple):
  """Cosines and sines that rotate the channels of one head, or of a token.

  Attributes:
    cos: 1 for channels that are not rotated. A batch axis of 1 is broadcast.
    sin: 0 for channels that are not rotated.
  """

  cos: Float[Array, 'B N d']
  sin: Float[Array, 'B N d']


def coordinates(grid: tubelets.Grid) -> Int[np.ndarray, 'N 3']:
  """Returns the time step, row and column of every token."""
  return np.stack([axis.ravel() for axis in np.indices(grid)], axis=-1)


def _sincos_1d(position: np.ndarray, size: int) -> np.ndarray:
  """Returns [N, size]: a block of sines, then a block of cosines."""
  omega = BASE ** (-np.arange(size // 2) / (size / 2))
  angle = position[:, None].astype(np.float64) * omega[None, :]
  return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def sinusoid_1d(grid: tubelets.Grid, width: int) -> Float[np.ndarray, 'N D']:
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
  grid: tubelets.Grid, width: int, uniform_power: bool = False
) -> Float[np.ndarray, 'N D']:
  """Returns V-JEPA's table: channels for time, then rows, then columns.

  Args:
    grid: tokens along (time, height, width).
    width: channels; a multiple of 8, so that every part is even.
    uniform_power: three equal parts, cut to the width, instead of a half and
      two quarters.

  Source: V-JEPA, arXiv 2404.08471, released code.

  Raises:
    ValueError: the width cannot be split into even parts.
  """
  if width % 8:
    raise ValueError(
      f'sincos_3d_vjepa needs a width that is a multiple of 8, found {width}'
    )
  parts = (width // 2, width // 4, width // 4)
  if uniform_power:
    parts = (2 * -(-width // 6),) * 3
  coords = coordinates(grid)
  table = np.concatenate(
    [_sincos_1d(coords[:, axis], part) for axis, part in enumerate(parts)],
    axis=1,
  )
  return table[:, :width].astype(np.float32)


def sincos_3d_vjepa_uniform(
  grid: tubelets.Grid, width: int
) -> Float[np.ndarray, 'N D']:
  """Returns V-JEPA's table with three equal parts (its released ViT-L, H)."""
  return sincos_3d_vjepa(grid, width, uniform_power=True)


def sincos_3d_mvd(grid: tubelets.Grid, width: int) -> Float[np.ndarray, 'N D']:
  """Returns MVD's table: a quarter for time, then columns, then rows.

  Columns and rows get three eighths of the channels each.

  Source: MVD, arXiv 2212.04500, released code.

  Raises:
    ValueError: the width cannot be split into even parts.
  """
  if width % 16:
    raise ValueError(
      f'sincos_3d_mvd needs a width that is a multiple of 16, found {width}'
    )
  coords = coordinates(grid)
  parts = ((0, width // 4), (2, width * 3 // 8), (1, width * 3 // 8))
  return np.concatenate(
    [_sincos_1d(coords[:, axis], part) for axis, part in parts], axis=1
  ).astype(np.float32)


def sincos_2d(grid: tubelets.Grid, width: int) -> Float[np.ndarray, 'N D']:
  """Returns MAE's table, equal at all time steps: half columns, half rows.

  Source: MAE, arXiv 2111.06377, released code.

  Raises:
    ValueError: the width cannot be split into even parts.
  """
  if width % 4:
    raise ValueError(
      f'sincos_2d needs a width that is a multiple of 4, found {width}'
    )
  coords = coordinates(grid)
  return np.concatenate(
    [_sincos_1d(coords[:, axis], width // 2) for axis in (2, 1)], axis=1
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
# Fractions of a token's channels that are rotated by time, row and column.
# Source: LayerLock, arXiv 2509.10156; even segments are our choice.
POST_NORM_SHARES = (0.1, 0.25, 0.25)


def table(
  module: nn.Module, kind: str, grid: tubelets.Grid, width: int
) -> Float[Array, 'N D'] | None:
  """Returns the table that is added to the tokens of a grid, or None.

  Args:
    module: calling module; owns the parameter `positions` [t, h, w, D] if the
      table is learned.
    kind: one of `NAMES`.
    grid: tokens along (time, height, width).
    width: channels of a token.

  Raises:
    ValueError: `kind` is unknown, or the learned table has another grid.
  """
  if kind not in NAMES:
    raise ValueError(f'positions is {kind!r}, wanted one of {sorted(NAMES)}')
  if kind in LEARNED:
    param = module.get_variable('params', 'positions')
    if param is not None and param.shape[:3] != tuple(grid):
      raise ValueError(
        f'the learned positions are for a grid of {param.shape[:3]} tokens and '
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
  """Returns the position embedding that is added to a class token, or None.

  Learned tables have a row for the class token. Fixed tables have none, which
  equals the row of zeros in MAE's table.

  Args:
    module: calling module; owns the parameter `class_position` [1, D] if the
      table is learned.
    kind: one of `NAMES`.
    width: channels of a token.

  Raises:
    ValueError: `kind` is rotary, which needs a position for every token.
  """
  if kind in ROTATIONS:
    raise ValueError(
      f'positions={kind!r} rotates tokens by position, and a class token has '
      'none; set class_token=False, or positions to one of '
      f'{sorted({*TABLES, *LEARNED} - set(ROTATIONS))}'
    )
  if kind not in LEARNED:
    return None
  init = nn.initializers.normal(0.02)
  row = module.param('class_position', init, (1, width), jnp.float32)
  return jnp.asarray(row)


def rope_segment(head_dim: int) -> int:
  """Returns the channels of a head that are rotated by each of three axes."""
  return 2 * ((head_dim // 3) // 2)


def rope_3d(
  indices: Int[Array, 'B N'],
  grid: tubelets.Grid,
  head_dim: int,
  pairing: str = 'paired',
) -> Rope:
  """Returns the rotary embedding of tokens by time, row and column.

  Each axis rotates `rope_segment` channels; the remaining channels are
  unchanged. Neighbouring channels (2i, 2i+1) form a pair.

  Args:
    indices: flat token indices.
    grid: tokens along (time, height, width).
    head_dim: channels of one head.
    pairing: `paired` rotates both channels of a pair by the same angle.
      `vjepa2` reproduces the released code, which repeats the list of
      frequencies instead of each frequency, so the two channels of a pair have
      different angles; required for V-JEPA 2 weights.

  Source: V-JEPA 2, arXiv 2506.09985, section 2.1.

  Raises:
    ValueError: `pairing` is unknown.
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
  indices: Int[Array, 'B N'], grid: tubelets.Grid, width: int
) -> Rope:
  """Returns LayerLock's rotary embedding of a block's normed tokens.

  Time, row and column rotate 10, 25 and 25 % of the channels, in this order
  from the first channel. Neighbours (2i, 2i+1) form a pair with one frequency,
  base 10000. The remaining channels are unchanged. The fractions are
  published; base, order and even segments are our choice.

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
  encoder: Any, index: Int[Array, 'R N'], grid: tubelets.Grid
) -> Rope | None:
  """Returns the rotary embedding of an encoder; arguments as in `rope`."""
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
  grid: tubelets.Grid,
  width: int,
  num_heads: int,
  pairing: str = 'paired',
) -> Rope | None:
  """Returns the rotary embedding of a kind in `NAMES`, or None.

  `rope_3d` rotates the channels of one head; `rope_post_norm` and `both`
  rotate the channels of a token.
  """
  if kind not in ROTATIONS:
    return None
  if kind == 'rope_3d':
    return rope_3d(indices, grid, width // num_heads, pairing)
  return rope_post_norm(indices, grid, width)


def _turn(
  indices: Int[Array, 'B N'],
  grid: tubelets.Grid,
  omegas: tuple[np.ndarray, ...],
  channels: int,
) -> Rope:
  """Returns rotations by time, row and column times their frequencies."""
  _, h, w = grid
  coords = (indices // (h * w), indices % (h * w) // w, indices % w)
  angles = [
    position[:, :, None].astype(jnp.float32)
    * jnp.asarray(omega, jnp.float32).reshape(1, 1, -1)
    for position, omega in zip(coords, omegas, strict=True)
  ]
  angle = jnp.concatenate(angles, axis=-1)
  unrotated = channels - angle.shape[-1]
  angle = jnp.pad(angle, ((0, 0), (0, 0), (0, unrotated)))
  return Rope(jnp.cos(angle), jnp.sin(angle))


def rotate(x: Float[Array, 'B N H d'], rope: Rope) -> Float[Array, 'B N H d']:
  """Rotates pairs of channels (2i, 2i+1) by their angles, in float32.

  Raises:
    ValueError: the number of channels is odd.
  """
  if x.shape[-1] % 2:
    raise ValueError(
      f'num_heads: found {x.shape[2]} heads of {x.shape[-1]} channels, wanted '
      'an even number of channels in each, as positions rotate pairs of them; '
      'set num_heads or width of that encoder or predictor'
    )
  pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
  rotated = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1)
  cos, sin = rope.cos[:, :, None, :], rope.sin[:, :, None, :]
  out = x.astype(jnp.float32) * cos + rotated.reshape(x.shape) * sin
  return out.astype(x.dtype)
