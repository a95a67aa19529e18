"""Tubelets: cuts video into patches of several frames, one per token."""

from collections.abc import Sequence

import einops
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

Grid = tuple[int, int, int]


def to_unit(
  video: Num[Array | np.ndarray, '*shape'],
) -> Float[Array | np.ndarray, '*shape']:
  """Returns uint8 pixels as float32 in [0, 1]; floats pass through.

  Raises:
    TypeError: the pixels are neither uint8 nor floats.

  Example:
    >>> to_unit(np.array([0, 255], np.uint8)).tolist()
    [0.0, 1.0]
  """
  if jnp.issubdtype(video.dtype, jnp.floating):
    return video
  if video.dtype != jnp.uint8:
    raise TypeError(
      f'video has dtype {video.dtype}, wanted uint8 (0..255) or floats in '
      '[0, 1]; convert it before the call'
    )
  return jnp.asarray(video, jnp.float32) / 255.0


def grid_of(video_shape: Sequence[int], patch: Grid) -> Grid:
  """Returns (t, h, w), the numbers of tokens along time, height and width.

  Args:
    video_shape: (B, T, H, W, C).
    patch: frames and pixels of one token, (pt, py, px).

  Raises:
    ValueError: the shape has not five axes, or is no multiple of the patch.

  Example:
    >>> grid_of((8, 16, 224, 224, 3), (2, 16, 16))
    (8, 14, 14)
  """
  if len(video_shape) != 5:
    raise ValueError(
      f'video has shape {tuple(video_shape)}, wanted [B, T, H, W, C]; add a '
      'batch axis to a single clip'
    )
  size = tuple(video_shape[1:4])
  if any(n % p or n < p for n, p in zip(size, patch, strict=True)):
    raise ValueError(
      f'video of (T, H, W) = {size} cannot be cut into patches of '
      f'{tuple(patch)}; each side must be a multiple of the patch: set '
      '--config.data.frames and --config.data.size, or the patch'
    )
  t, h, w = (n // p for n, p in zip(size, patch, strict=True))
  return t, h, w


def patchify(
  video: Num[Array | np.ndarray, 'B T H W C'], patch: Grid
) -> Num[Array, 'B N P']:
  """Cuts a clip into non-overlapping patches, in raster order.

  Args:
    video: pixels of any dtype; the dtype is preserved.
    patch: frames and pixels of one token, (pt, py, px).

  Returns:
    One row of (pt, py, px, c) values per token.

  Example:
    >>> patchify(np.zeros((1, 16, 224, 224, 3)), (2, 16, 16)).shape
    (1, 1568, 1536)
  """
  t, h, w = grid_of(video.shape, patch)
  return einops.rearrange(
    jnp.asarray(video),
    'b (t pt) (h py) (w px) c -> b (t h w) (pt py px c)',
    t=t,
    h=h,
    w=w,
  )


def normalise(
  patches: Float[Array | np.ndarray, 'B N *P'],
  mean: tuple[float, ...],
  std: tuple[float, ...],
) -> Float[Array, 'B N *P']:
  """Subtracts the mean and divides by the standard deviation per channel.

  Args:
    patches: patches or a clip; channels are the innermost axis, or the fastest
      part of it.
    mean: one value per channel.
    std: one value per channel.

  Example:
    >>> normalise(jnp.ones((1, 1, 2)), (0.5,), (0.25,)).tolist()
    [[[2.0, 2.0]]]
  """
  colours = patches.reshape(*patches.shape[:2], -1, len(mean))
  shape = (1, 1, 1, len(mean))
  colours = colours - jnp.asarray(mean, jnp.float32).reshape(shape)
  colours = colours / jnp.asarray(std, jnp.float32).reshape(shape)
  return colours.reshape(patches.shape)
