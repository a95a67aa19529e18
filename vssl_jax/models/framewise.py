"""Image models applied to each frame of a clip.

`Framewise` can replace a `vit.Vit` encoder, and `FramewiseDecoder` a decoder.
Their parameters are those of the image model, under the same names. Frames are
part of the batch axis, so they are encoded independently.
"""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float, Int, Num, Shaped

from vssl_jax.masks import sampling, tubelets


class Framewise(nn.Module):
  """Image encoder for every `every`-th frame of a clip, starting at frame 0.

  Its tokens are in raster order of (t, h, w), as those of a video encoder whose
  patches have `every` frames. Of these frames only the first is encoded.

  Attributes:
    image: the image encoder; its patches have one frame.
    every: stride in frames between encoded frames.
    cell: side in pixels of the frame area of one token. Frames are resized so
      that the encoder's patches cover these areas: with cell=16, a model with
      patches of 14 encodes 224 x 224 frames at 196 x 196. None: frames are not
      resized.
  """

  image: nn.Module  # Vit or Hiera
  every: int = 2
  cell: int | None = None

  def setup(self) -> None:
    """Shares the parameter scope of the image encoder.

    Raises:
      ValueError: the patches have several frames, or `every` or `cell` is
        below 1.
    """
    cell = 1 if self.cell is None else self.cell
    if self.image.patch[0] != 1 or self.every < 1 or cell < 1:
      raise ValueError(
        f'framewise: found image patches {self.image.patch}, every '
        f'{self.every} and cell {self.cell}; wanted an encoder of one frame, '
        f'such as patch {(1, *self.image.patch[1:])}, every of at least 1, and '
        'cells of at least one pixel or None'
      )
    nn.share_scope(self, self.image)

  @nn.nowrap
  def clone(self, **fields: Any) -> 'Framewise':
    """Returns a copy; also replaces fields of the image encoder."""
    known = set(self.image.__dataclass_fields__) - {'parent', 'name'}
    inner = {n: fields.pop(n) for n in [*fields] if n in known}
    if inner:
      fields['image'] = self.image.clone(**inner)
    return super().clone(**fields)

  @property
  def patch(self) -> tubelets.Grid:
    """Frames and pixels of one token."""
    if self.cell is None:
      return (self.every, *self.image.patch[1:])
    return (self.every, self.cell, self.cell)

  @property
  def width(self) -> int:
    """Channels of a token."""
    return self.image.width

  @property
  def depth(self) -> int:
    """Number of blocks."""
    return self.image.depth

  @property
  def encoder_depth(self) -> int:
    """Number of blocks before the decoding blocks."""
    return self.image.encoder_depth

  @property
  def final_norm(self) -> bool:
    """Whether there is a layer norm after the last block."""
    return self.image.final_norm

  @property
  def dtype(self) -> str:
    """Dtype of activations and matrix products."""
    return self.image.dtype

  @property
  def mean(self) -> tuple[float, ...]:
    """Subtracted from pixels in [0, 1], per channel."""
    return self.image.mean

  @property
  def std(self) -> tuple[float, ...]:
    """Divisor of the pixels after that, per channel."""
    return self.image.std

  @property
  def products(self) -> str:
    """Dtype of matrix products with the blocks' weights, see `vit.Vit`."""
    return getattr(self.image, 'products', 'same')

  def __call__(
    self,
    video: Num[Array | np.ndarray, 'B T H W C'],
    visible: Int[Array, 'B V'] | None = None,
    **options: Any,
  ) -> Any:
    """Encodes the tokens of a clip, frame by frame.

    Args:
      video: uint8, or floats in [0, 1].
      visible: flat indices of the tokens to embed (for Hiera, of the units),
        ascending, equally many per frame; None for all.
      **options: `depth`, `upto`, `features`, `attention_to`, `deterministic`
        and others of the image encoder.

    Returns:
      The output of the image encoder, with the tokens of all frames
      concatenated; for the stages of Hiera, frames are along time.

    Raises:
      ValueError: the number of visible tokens is no multiple of the frames.
    """
    grid = tubelets.grid_of(video.shape, self.patch)
    if visible is not None:
      cells = grid
      if hasattr(self.image, 'unit'):  # of Hiera
        side = self.image.unit[1] // 2**self.image.q_pool
        cells = (grid[0], grid[1] // side, grid[2] // side)
      visible = _within(visible, cells)
    frames = video[:, :: self.every]
    frames = frames.reshape(-1, 1, *frames.shape[2:])
    if self.patch[1:] != self.image.patch[1:]:
      frames = _resized(frames, grid, self.image.patch)
    outputs = self.image(frames, visible, **options)
    return jax.tree.map(lambda x: _together(x, grid[0]), outputs)


class FramewiseDecoder(nn.Module):
  """Image decoder applied to the tokens of each frame separately.

  Attributes:
    decoder: the image decoder: (z, mask, grid, token) -> float32 [B, M, out].
  """

  decoder: nn.Module

  def setup(self) -> None:
    """Shares the parameter scope of the image decoder."""
    nn.share_scope(self, self.decoder)

  @property
  def out_width(self) -> int:
    """Channels of the predictions."""
    return self.decoder.out_width

  @property
  def width(self) -> int:
    """Channels of the decoder's tokens."""
    return self.decoder.width

  @property
  def depth(self) -> int:
    """Number of blocks."""
    return self.decoder.depth

  @property
  def dtype(self) -> str:
    """Dtype of activations and matrix products."""
    return self.decoder.dtype

  def __call__(
    self,
    z: Float[Array, 'B V D'],
    mask: sampling.Mask,
    grid: tubelets.Grid,
    token: int = 0,
    **options: Any,
  ) -> Float[Array, 'B M out']:
    """Predicts the masked tokens of each frame from its visible ones.

    Args:
      z: the encoder's visible tokens.
      mask: indices of visible tokens and of tokens to predict; ascending,
        equally many per frame.
      grid: tokens of the whole clip along (time, height, width).
      token: index of the mask token.
      **options: further options of the image decoder.

    Returns:
      float32 predictions in the order of `mask.masked`.

    Raises:
      ValueError: a number of tokens is no multiple of the frames.
    """
    t, h, w = grid
    mask = sampling.Mask(*(_within(index, grid) for index in mask))
    z = z.reshape(-1, z.shape[1] // t, z.shape[2])
    predictions = self.decoder(z, mask, (1, h, w), token, **options)
    return _together(predictions, t)


def _resized(
  frames: Num[Array | np.ndarray, 'Bt 1 H W C'],
  grid: tubelets.Grid,
  patch: tubelets.Grid,
) -> Float[Array, 'Bt 1 y x C']:
  """Resizes frames to one patch per token of the grid, bilinear."""
  batch, channels = frames.shape[0], frames.shape[-1]
  size = (grid[1] * patch[1], grid[2] * patch[2])
  return jax.image.resize(
    tubelets.to_unit(frames), (batch, 1, *size, channels), 'linear'
  )


def _within(
  index: Int[Array, 'B K'], grid: tubelets.Grid
) -> Int[Array, 'Bt k']:
  """Returns token indices within each frame, one row per frame."""
  t, h, w = grid
  if index.shape[1] % t:
    raise ValueError(
      f'framewise: found {index.shape[1]} tokens for {t} frames, wanted as '
      'many of each; use a mask such as frames:0.75 or tube:0.9'
    )
  return index.reshape(-1, index.shape[1] // t) % (h * w)


def _together(x: Shaped[Array, 'Bt k ...'], t: int) -> Shaped[Array, 'B K ...']:
  """Concatenates the tokens of the t frames of each clip."""
  return x.reshape(-1, t * x.shape[1], *x.shape[2:])
