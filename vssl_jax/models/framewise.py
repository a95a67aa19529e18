"""Image models on the frames of a clip.

`Framewise` stands wherever a `vit.Vit` encoder does, and `FramewiseDecoder`
wherever a decoder does. Their parameters are those of the image model, under
the same names. Frames are batched, so nothing passes from one to another.
"""

from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float, Int, Num, Shaped

from vssl_jax import masking
from vssl_jax.models import hiera, layers, vit


class Framewise(nn.Module):
  """An image encoder on frames 0, every, 2 * every, ... of a clip.

  Its tokens stand in raster order of (t, h, w), as those of a video encoder
  whose patches last `every` frames; only the first of these is looked at.

  Attributes:
    image: the image encoder; its patches last one frame.
    every: frames from one that is looked at to the next.
    cell: side in pixels of the part of a frame that becomes one token; frames
      are resized so that the encoder's patches cover these. A model with
      patches of 14 gets frames of 196 instead of 224 by cell=16. None: the
      encoder's patches, and frames as they are.
  """

  image: vit.Vit | hiera.Hiera
  every: int = 2
  cell: int | None = None

  def setup(self) -> None:
    """Names the parameters as the image encoder does.

    Raises:
      ValueError: patches of several frames, fewer than one frame apart, or
        cells without pixels.
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
    """Returns a copy; fields of the image encoder are replaced there."""
    known = set(self.image.__dataclass_fields__) - {'parent', 'name'}
    inner = {n: fields.pop(n) for n in [*fields] if n in known}
    if inner:
      fields['image'] = self.image.clone(**inner)
    return super().clone(**fields)

  @property
  def patch(self) -> layers.Grid:
    """Frames and pixels that one token stands for."""
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
    """Blocks before those that decode."""
    return self.image.encoder_depth

  @property
  def final_norm(self) -> bool:
    """Whether there is a layer norm after the last block."""
    return self.image.final_norm

  @property
  def dtype(self) -> str:
    """Type of activations and matrix products."""
    return self.image.dtype

  @property
  def mean(self) -> tuple[float, ...]:
    """Subtracted from pixels in [0, 1], per channel."""
    return self.image.mean

  @property
  def std(self) -> tuple[float, ...]:
    """Pixels are then divided by this."""
    return self.image.std

  @property
  def products(self) -> str:
    """Type of the blocks' products with their weights, see `vit.Vit`."""
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
      visible: flat indices of the tokens to embed, of Hiera of the units to
        keep, ascending, as many of each frame; None for all.
      **options: `depth`, `upto`, `features`, `attention_to`, `deterministic`
        and others of the image encoder.

    Returns:
      Tokens as from the image encoder, those of all frames in a row; stages of
      Hiera with the frames along time.

    Raises:
      ValueError: visible tokens that frames cannot share equally.
    """
    grid = layers.grid_of(video.shape, self.patch)
    if visible is not None:
      cells = grid
      if isinstance(self.image, hiera.Hiera):
        left = self.image.unit[1] // 2**self.image.q_pool
        cells = (grid[0], grid[1] // left, grid[2] // left)
      visible = _within(visible, cells)
    frames = video[:, :: self.every]
    frames = frames.reshape(-1, 1, *frames.shape[2:])
    if self.patch[1:] != self.image.patch[1:]:
      frames = _resized(frames, grid, self.image.patch)
    found = self.image(frames, visible, **options)
    return jax.tree.map(lambda x: _together(x, grid[0]), found)


class FramewiseDecoder(nn.Module):
  """A decoder of images on the tokens of each frame alone.

  Attributes:
    decoder: takes (z, mask, grid, token) and gives float32 [B, M, out].
  """

  decoder: nn.Module

  def setup(self) -> None:
    """Names the parameters as the decoder of images does."""
    nn.share_scope(self, self.decoder)

  @property
  def out_width(self) -> int:
    """Channels of the result."""
    return self.decoder.out_width

  @property
  def width(self) -> int:
    """Channels inside."""
    return self.decoder.width

  @property
  def depth(self) -> int:
    """Number of blocks."""
    return self.decoder.depth

  @property
  def dtype(self) -> str:
    """Type of activations and matrix products."""
    return self.decoder.dtype

  def __call__(
    self,
    z: Float[Array, 'B V D'],
    mask: masking.Mask,
    grid: layers.Grid,
    token: int = 0,
    **options: Any,
  ) -> Float[Array, 'B M out']:
    """Predicts the masked tokens of each frame from its visible ones.

    Args:
      z: the encoder's visible tokens.
      mask: where those stand, and which tokens to predict; ascending, as many
        of each frame.
      grid: tokens of the whole clip along (time, height, width).
      token: which mask token.
      **options: others that the decoder of images takes.

    Returns:
      float32 predictions in the order of `mask.masked`.

    Raises:
      ValueError: tokens that frames cannot share equally.
    """
    t, h, w = grid
    mask = masking.Mask(*(_within(index, grid) for index in mask))
    z = z.reshape(-1, z.shape[1] // t, z.shape[2])
    found = self.decoder(z, mask, (1, h, w), token, **options)
    return _together(found, t)


def _resized(
  frames: Num[Array | np.ndarray, 'Bt 1 H W C'],
  grid: layers.Grid,
  patch: layers.Grid,
) -> Float[Array, 'Bt 1 y x C']:
  """Returns frames of as many patches as the grid has, bilinear."""
  batch, channels = frames.shape[0], frames.shape[-1]
  size = (grid[1] * patch[1], grid[2] * patch[2])
  return jax.image.resize(
    layers.to_unit(frames), (batch, 1, *size, channels), 'linear'
  )


def _within(index: Int[Array, 'B K'], grid: layers.Grid) -> Int[Array, 'Bt k']:
  """Returns where tokens stand in their own frame, one row per frame."""
  t, h, w = grid
  if index.shape[1] % t:
    raise ValueError(
      f'framewise: found {index.shape[1]} tokens for {t} frames, wanted as '
      'many of each; use a mask such as frames:0.75 or tube:0.9'
    )
  return index.reshape(-1, index.shape[1] // t) % (h * w)


def _together(x: Shaped[Array, 'Bt k ...'], t: int) -> Shaped[Array, 'B K ...']:
  """Returns the tokens of t frames in a row."""
  return x.reshape(-1, t * x.shape[1], *x.shape[2:])
