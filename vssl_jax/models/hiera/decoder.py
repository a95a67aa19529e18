"""Decoder of Hiera-MAE: multi-scale fusion, then a plain transformer.

Source: Hiera, arXiv 2306.00989, released code. It predicts the tokens of masked
units: pixels in Hiera-MAE, or other targets of `out_width` values per token.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Num

from vssl_jax import losses
from vssl_jax.masks import hiera_units, sampling, tubelets
from vssl_jax.models import blocks, framewise, layers, positions, predictor
from vssl_jax.models.hiera import encoder as encoder_lib
from vssl_jax.models.hiera import token_order


class Decoder(nn.Module):
  """Fuses the stages of the visible units and predicts the masked units.

  A convolution with stride equal to its kernel reduces each larger stage to the
  size of the last stage. The sum of the reduced stages and the last stage is
  normed. Earlier stages of that same size, such as the third with `q_pool` 2,
  are not used.

  Attributes:
    out_width: values to predict per token.
    width: channels of the decoder's tokens.
    depth: number of blocks.
    num_heads: attention heads: 8 in the paper (Table 11), 16 in its code.
      Parameters have the same shapes.
    mlp_width: hidden channels of the MLPs; None for 4 * width.
    gelu: `exact` or `tanh`.
    norm_eps: added to variances in layer norms.
    dtype: dtype of activations and matrix products.
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
    """Options shared by the blocks: Glorot initial values, all biases."""
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
    mask: sampling.Mask,
    unit_grid: tubelets.Grid,
  ) -> Float[Array, 'B M out']:
    """Predicts the tokens of the masked units.

    Args:
      ends: outputs of the encoder's stages, for the visible units.
      mask: indices of the visible units and of the units to predict.
      unit_grid: units of the whole clip along (time, height, width).

    Returns:
      float32 predictions, 2 x 2 tokens per masked unit, in the order of
      `hiera_units.expand_units`.
    """
    head = layers.kernel_init('mae', 'head')
    z = layers.layer_norm('fuse_norm', self.norm_eps, self.dtype)(
      self._fuse(ends)
    )
    z = layers.dense(self.width, 'embed', kernel=head, dtype=self.dtype)(z)
    init = nn.initializers.normal(0.02)
    token = self.param('mask_token', init, (1, self.width), jnp.float32)
    t, h, w = unit_grid
    grid = (t, hiera_units.SIDE * h, hiera_units.SIDE * w)
    table = positions.table(self, 'learned', grid, self.width)
    tokens = sampling.Mask(
      *(hiera_units.expand_units(index, unit_grid) for index in mask)
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
    """Returns the sum over scales, with 2 x 2 tokens per unit."""
    *earlier, last = ends
    side, width = hiera_units.SIDE, last.shape[-1]
    if last.shape[3:5] != (side, side):
      raise ValueError(
        f'the last stage has {last.shape[3]} x {last.shape[4]} tokens in a '
        f'unit, wanted {side} x {side}; Hiera leaves these with q_pool=2'
      )
    total = token_order.cells(last, side)
    for i, end in enumerate(earlier, 1):
      cells = token_order.cells(end, side)
      if cells.shape[2] > end.shape[-1]:  # a larger stage than the last
        total = total + layers.dense(
          width,
          f'fuse_{i}',
          kernel=layers.fan_in_uniform,
          bias=layers.fan_in_bias(cells.shape[2]),
          dtype=self.dtype,
        )(cells)
    return total


def targets(
  video: Num[Array | np.ndarray, 'B T H W C'],
  encoder: encoder_lib.Hiera | framewise.Framewise,
  pixel_norm: str = 'patch',
) -> Float[Array, 'B N P']:
  """Returns the pixel targets of every token of a clip.

  The targets are the pixels of a token's first frame. They are first normalised
  by the encoder's mean and standard deviation per colour, then by
  `losses.pixel_targets`, as in Hiera and MAE (arXiv 2111.06377, released code:
  images are normalised before they are cut into patches).

  Args:
    video: uint8, or floats in [0, 1].
    encoder: encoder of the tokens.
    pixel_norm: `patch` as published, all values of a patch together; or
      another of `losses.PIXEL_NORMS`.

  Returns:
    (row, column, channel) values of each token, in raster order.
  """
  stride, *side = encoder.patch
  frames = tubelets.to_unit(video[:, ::stride])
  frames = tubelets.normalise(frames, encoder.mean, encoder.std)
  return losses.pixel_targets(frames, (1, *side), pixel_norm)


def as_raw(
  predicted: Float[Array, 'B M P'],
  index: Int32[Array, 'B M'],
  video: Num[Array | np.ndarray, 'B T H W C'],
  encoder: encoder_lib.Hiera | framewise.Framewise,
  pixel_norm: str = 'patch',
) -> Float[Array, 'B M P']:
  """Converts predictions to pixel targets of the raw clip, for pictures.

  Args:
    predicted: predictions in the units of `targets`.
    index: indices of their tokens.
    video: uint8, or floats in [0, 1].
    encoder: encoder of the tokens.
    pixel_norm: option of `targets`.

  Returns:
    Predictions in the units of `losses.pixel_targets` of the raw clip.
  """
  if pixel_norm == 'patch_channel':  # removes any mean and std of colours
    return predicted
  mean, std = (jnp.tile(jnp.asarray(x), predicted.shape[2] // len(x))
               for x in (encoder.mean, encoder.std))  # fmt: skip
  mean, std = mean.reshape(1, 1, -1), std.reshape(1, 1, -1)
  if pixel_norm == 'none':
    return predicted * std + mean
  stride, *side = encoder.patch
  raw = tubelets.patchify(tubelets.to_unit(video[:, ::stride]), (1, *side))
  raw = sampling.gather(raw, index)
  (m, s), (normed_m, normed_s) = (
    (
      jnp.mean(x, axis=2, keepdims=True),
      jnp.sqrt(jnp.var(x, axis=2, ddof=1, keepdims=True) + 1e-6),
    )
    for x in (raw, (raw - mean) / std)
  )
  return ((predicted * normed_s + normed_m) * std + mean - m) / s
