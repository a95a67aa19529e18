"""Decoders of VideoMAE (pixels) and MVD (teacher features)."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vssl_jax.masks import sampling, tubelets
from vssl_jax.models import blocks, layers, positions, predictor

# Decoders by encoder size. Source: VideoMAE (arXiv 2203.12602), released code;
# its four-block decoders, and twelve blocks for L.
SIZES = {
  'S': dict(width=192, depth=4, num_heads=3),
  'B': dict(width=384, depth=4, num_heads=6),
  'L': dict(width=512, depth=12, num_heads=8),
  'H': dict(width=640, depth=12, num_heads=8),
}
# MVD's decoders by encoder size (a student has one per teacher), and its fields
# that differ from VideoMAE's. Source: MVD (arXiv 2212.04500), released code.
MVD_SIZES = {
  'S': dict(width=384, depth=2, num_heads=6),
  'B': dict(width=768, depth=2, num_heads=12),
  'L': dict(width=512, depth=4, num_heads=8),
  'H': dict(width=640, depth=8, num_heads=8),
}
MVD = dict(positions='sincos_3d_mvd', embed_bias=True, embed_init='glorot')


class VideoMaeDecoder(nn.Module):
  """Transformer over visible tokens and mask tokens, with added positions.

  Attributes:
    out_width: values of a patch, or of a teacher's token.
    positions: a fixed table, one of `positions.NAMES`.
    embed_bias: whether the projection of the encoder's tokens has a bias.
    embed_init: initial values of that projection: `fan_in`, the default of
      torch, as in VideoMAE, or `glorot`, as in MVD and MAE.
    drop_path: drop rate of the last block, linear from 0.
    width: channels of the decoder's tokens.
    depth: number of blocks.
    num_heads: attention heads.
    mlp_width: hidden channels of the MLPs; None for 4 * width.
    gelu: `exact` or `tanh`.
    norm_eps: added to variances in layer norms.
    dtype: dtype of activations and matrix products.
    remat: `none`, `dots` or `full`.
    attention: `auto`, `xla`, `cudnn` or `splash`.
  """

  out_width: int
  positions: str = 'sinusoid_1d'
  embed_bias: bool = False
  embed_init: str = 'fan_in'
  drop_path: float = 0.0
  width: int = 384
  depth: int = 4
  num_heads: int = 6
  mlp_width: int | None = None
  gelu: str = 'exact'
  norm_eps: float = 1e-6
  dtype: str = 'bfloat16'
  remat: str = 'none'
  attention: str = 'auto'

  @property
  def block_spec(self) -> blocks.Spec:
    """Options shared by the blocks: no key bias, Glorot initial values."""
    return blocks.Spec(
      num_heads=self.num_heads,
      mlp_width=self.mlp_width or 4 * self.width,
      qkv_bias='qv',
      gelu=self.gelu,
      norm_eps=self.norm_eps,
      init='videomae',
      dtype=self.dtype,
      remat=self.remat,
      attention=self.attention,
      drop_path=self.drop_path,
    )

  @nn.compact
  def __call__(
    self,
    z: Float[Array, 'B V D'],
    mask: sampling.Mask,
    grid: tubelets.Grid,
    token: int = 0,
    *,
    at: Int[Array, 'B K'] | None = None,
    deterministic: bool = True,
  ) -> Float[Array, 'B K out']:
    """Predicts the masked patches, or the patches at given positions.

    Args:
      z: the encoder's visible tokens.
      mask: indices of the visible tokens and of the tokens to predict.
      grid: tokens of the whole clip along (time, height, width).
      token: not used: there is one mask token for all masks.
      at: flat indices of the tokens to predict, which may include visible
        tokens; None for `mask.masked`.
      deterministic: no drop path.

    Returns:
      float32 predictions in the order of `at`.
    """
    del token
    head = layers.kernel_init('videomae', 'head')
    embed = {'fan_in': layers.fan_in_uniform, 'glorot': head}
    z = layers.dense(
      self.width,
      'embed',
      kernel=embed[self.embed_init],
      dtype=self.dtype,
      use_bias=self.embed_bias,
    )(z)
    # The released code truncates at one standard deviation.
    init = nn.initializers.truncated_normal(0.02, lower=-1, upper=1)
    learned = self.param('mask_token', init, (1, self.width), jnp.float32)
    table = positions.table(self, self.positions, grid, self.width)
    x = predictor.join(z, jnp.asarray(learned), mask, table)
    x = blocks.run(
      self.block_spec, self.depth, x, None, deterministic=deterministic
    )[-1]
    if at is None:
      x = x[:, mask.visible.shape[1] :]
    else:  # tokens are in the order visible, masked
      order = jnp.concatenate(mask, axis=1)
      x = sampling.gather(x, sampling.gather(jnp.argsort(order, axis=1), at))
    x = layers.layer_norm('norm', self.norm_eps, self.dtype)(x)
    x = layers.dense(self.out_width, 'head', kernel=head, dtype=self.dtype)(x)
    return x.astype(jnp.float32)
