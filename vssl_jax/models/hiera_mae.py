"""The decoder of Hiera-MAE: all scales together, then a plain transformer.

Source: Hiera, arXiv 2306.00989, released code. It predicts tokens of hidden
mask units: pixels in Hiera-MAE, or whatever has `out_width` values a token.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Num

from vssl_jax import losses, masking, unit_masks
from vssl_jax.models import (
  blocks,
  framewise,
  hiera,
  layers,
  positions,
  predictor,
  unrolled,
)


class Decoder(nn.Module):
  """Fuses the stages of the visible units and predicts the masked ones.

  Where Hiera has pooled, a convolution whose stride is its kernel brings an
  earlier stage to the size of the last; their sum is normed. Stages of the
  last one's size, such as the third with `q_pool` 2, are not used.

  Attributes:
    out_width: values to predict for a token.
    width: channels inside.
    depth: number of blocks.
    num_heads: attention heads: 8 in the paper (Table 11), 16 in its code.
      Parameters have the same shapes.
    mlp_width: hidden channels of the MLPs; None for 4 * width.
    gelu: `exact` or `tanh`.
    norm_eps: added to variances in layer norms.
    dtype: of activations and matrix products.
    remat: `none`, `dots` or `full`.
    attention: `auto`, `xla`, `cudnn` or `splash`.
  """

  out_width: int
  width: int = 512
  depth: int = 8
  num_heads: int = 8
  mlp_width: int | None = None
  gelu: str = 'exact'
  norm_eps: float = 1e-6
  dtype: str = 'bfloat16'
  remat: str = 'none'
  attention: str = 'auto'

  @property
  def block_spec(self) -> blocks.Spec:
    """What the blocks share: Glorot start, all biases."""
    return blocks.Spec(
      num_heads=self.num_heads,
      mlp_width=self.mlp_width or 4 * self.width,
      gelu=self.gelu,
      norm_eps=self.norm_eps,
      init='mae',
      dtype=self.dtype,
      remat=self.remat,
      attention=self.attention,
    )

  @nn.compact
  def __call__(
    self,
    ends: Sequence[Float[Array, 'B K 1 _ _ _']],
    mask: masking.Mask,
    unit_grid: layers.Grid,
  ) -> Float[Array, 'B M out']:
    """Predicts the tokens of the masked units.

    Args:
      ends: of the encoder's stages, of the visible units.
      mask: which units these are, and which to predict.
      unit_grid: units of the whole clip along (time, height, width).

    Returns:
      float32 predictions, 2 x 2 tokens of one masked unit after another, as
      `unit_masks.expand_units` has them.
    """
    head = layers.kernel_init('mae', 'head')
    z = layers.layer_norm('fuse_norm', self.norm_eps, self.dtype)(
      self._fuse(ends)
    )
    z = layers.dense(self.width, 'embed', kernel=head, dtype=self.dtype)(z)
    init = nn.initializers.normal(0.02)
    token = self.param('mask_token', init, (1, self.width), jnp.float32)
    t, h, w = unit_grid
    grid = (t, unit_masks.SIDE * h, unit_masks.SIDE * w)
    table = positions.table(self, 'learned', grid, self.width)
    tokens = masking.Mask(
      *(unit_masks.expand_units(index, unit_grid) for index in mask)
    )
    x = predictor.join(z, jnp.asarray(token), tokens, table)
    x = blocks.run(self.block_spec, self.depth, x, None)[-1]
    x = x[:, tokens.visible.shape[1] :]
    x = layers.layer_norm('norm', self.norm_eps, self.dtype)(x)
    x = layers.dense(self.out_width, 'head', kernel=head, dtype=self.dtype)(x)
    return x.astype(jnp.float32)

  def _fuse(
    self, ends: Sequence[Float[Array, 'B K 1 _ _ _']]
  ) -> Float[Array, 'B N D']:
    """Returns the sum of all scales, 2 x 2 tokens of each unit."""
    *earlier, last = ends
    side, width = unit_masks.SIDE, last.shape[-1]
    if last.shape[3:5] != (side, side):
      raise ValueError(
        f'the last stage has {last.shape[3]} x {last.shape[4]} tokens in a '
        f'unit, wanted {side} x {side}; Hiera leaves these with q_pool=2'
      )
    total = unrolled.cells(last, side)
    for i, end in enumerate(earlier, 1):
      rows = unrolled.cells(end, side)
      if rows.shape[2] > end.shape[-1]:  # larger than the last
        total = total + layers.dense(
          width,
          f'fuse_{i}',
          kernel=layers.fan_in_uniform,
          bias=layers.fan_in_bias(rows.shape[2]),
          dtype=self.dtype,
        )(rows)
    return total


def targets(
  video: Num[Array | np.ndarray, 'B T H W C'],
  encoder: hiera.Hiera | framewise.Framewise,
  pixel_norm: str = 'patch',
) -> Float[Array, 'B N P']:
  """Returns the pixels to predict for every token of a clip.

  They are those of a token's first frame, as the encoder sees them: its mean
  and deviation of colours come first, then `losses.pixel_targets`. So do MAE
  (arXiv 2111.06377, released code: images are normalised before they are cut
  into patches) and Hiera.

  Args:
    video: uint8, or floats in [0, 1].
    encoder: that makes the tokens.
    pixel_norm: `patch` as published, all values of a patch together; or
      another of `losses.PIXEL_NORMS`.

  Returns:
    (row, column, channel) values of each token, in raster order.
  """
  every, *side = encoder.patch
  frames = layers.to_unit(video[:, ::every])
  frames = layers.normalise(frames, encoder.mean, encoder.std)
  return losses.pixel_targets(frames, (1, *side), pixel_norm)


def as_raw(
  predicted: Float[Array, 'B M P'],
  index: Int32[Array, 'B M'],
  video: Num[Array | np.ndarray, 'B T H W C'],
  encoder: hiera.Hiera | framewise.Framewise,
  pixel_norm: str = 'patch',
) -> Float[Array, 'B M P']:
  """Returns predictions as if colours had not been normalised, for pictures.

  Args:
    predicted: in the units of `targets`.
    index: of the tokens that they are for.
    video: uint8, or floats in [0, 1].
    encoder: that makes the tokens.
    pixel_norm: of `targets`.

  Returns:
    The same in the units of `losses.pixel_targets` of the clip itself.
  """
  if pixel_norm == 'patch_channel':  # takes colours' mean and deviation out
    return predicted
  mean, std = (jnp.tile(jnp.asarray(x), predicted.shape[2] // len(x))
               for x in (encoder.mean, encoder.std))  # fmt: skip
  mean, std = mean.reshape(1, 1, -1), std.reshape(1, 1, -1)
  if pixel_norm == 'none':
    return predicted * std + mean
  every, *side = encoder.patch
  raw = layers.patchify(layers.to_unit(video[:, ::every]), (1, *side))
  raw = masking.gather(raw, index)
  (m, s), (seen_m, seen_s) = (
    (
      jnp.mean(x, axis=2, keepdims=True),
      jnp.sqrt(jnp.var(x, axis=2, ddof=1, keepdims=True) + 1e-6),
    )
    for x in (raw, (raw - mean) / std)
  )
  return ((predicted * seen_s + seen_m) * std + mean - m) / s
