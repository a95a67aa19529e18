"""Predictor of SALT and V-JEPA: predicts masked tokens from visible ones."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vssl_jax.masks import sampling, tubelets
from vssl_jax.models import blocks, layers, positions


class Predictor(nn.Module):
  """Narrow transformer over visible tokens and mask tokens.

  With pixels as output it is SALT's pixel decoder.

  Attributes:
    out_width: channels of the predictions: a teacher's width, or the values of
      a patch.
    width: channels of the predictor's tokens.
    depth: number of blocks.
    num_heads: attention heads.
    mlp_width: hidden channels of the MLPs; None for 4 * width.
    num_mask_tokens: learned mask tokens; one per mask, or one for all masks.
    positions: one of `positions.NAMES`.
    rope_pairing: `paired`, or `vjepa2` for weights of V-JEPA 2.
    qkv_bias: `full` or `qv`.
    init_family: family of initial values, `vjepa` or `videomae`.
    gelu: `exact` or `tanh`.
    norm_eps: added to variances in layer norms.
    dtype: dtype of activations and matrix products.
    remat: `none`, `dots` or `full`.
    attention: `auto`, `xla`, `cudnn` or `splash`.
  """

  out_width: int
  width: int = 384
  depth: int = 12
  num_heads: int = 16
  mlp_width: int | None = None
  num_mask_tokens: int = 2
  positions: str = 'rope_3d'
  rope_pairing: str = 'paired'
  qkv_bias: str = 'full'
  init_family: str = 'vjepa'
  gelu: str = 'exact'
  norm_eps: float = 1e-6
  dtype: str = 'bfloat16'
  remat: str = 'none'
  attention: str = 'auto'

  @property
  def block_spec(self) -> blocks.Spec:
    """Options shared by the blocks."""
    return blocks.Spec(
      num_heads=self.num_heads,
      mlp_width=self.mlp_width or 4 * self.width,
      qkv_bias=self.qkv_bias,
      gelu=self.gelu,
      norm_eps=self.norm_eps,
      init=self.init_family,
      dtype=self.dtype,
      remat=self.remat,
      attention=self.attention,
      rope_on='qk' if self.positions == 'rope_3d' else 'norm',
    )

  @nn.compact
  def __call__(
    self,
    z: Float[Array, 'B V D'],
    mask: sampling.Mask,
    grid: tubelets.Grid,
    token: int = 0,
  ) -> Float[Array, 'B M out']:
    """Predicts the masked tokens.

    Args:
      z: the encoder's visible tokens.
      mask: indices of the visible tokens and of the tokens to predict.
      grid: tokens of the whole clip along (time, height, width).
      token: index of the mask token, modulo `num_mask_tokens`.

    Returns:
      float32 predictions in the order of `mask.masked`.
    """
    head = layers.kernel_init(self.init_family, 'head')
    z = layers.dense(self.width, 'embed', kernel=head, dtype=self.dtype)(z)
    # Create all of them, so that the parameters do not depend on the mask.
    learned = [
      self.param(
        f'mask_token_{i}', nn.initializers.zeros, (1, self.width), jnp.float32
      )
      for i in range(self.num_mask_tokens)
    ]
    table = positions.table(self, self.positions, grid, self.width)
    token = learned[token % self.num_mask_tokens]
    x = join(z, jnp.asarray(token), mask, table)
    rope = positions.rope(
      self.positions,
      jnp.concatenate([mask.visible, mask.masked], axis=1),
      grid,
      self.width,
      self.num_heads,
      self.rope_pairing,
    )
    x = blocks.run(self.block_spec, self.depth, x, rope)[-1]
    x = x[:, mask.visible.shape[1] :]
    x = layers.layer_norm('norm', self.norm_eps, self.dtype)(x)
    x = layers.dense(self.out_width, 'head', kernel=head, dtype=self.dtype)(x)
    return x.astype(jnp.float32)


def join(
  z: Float[Array, 'B V D'],
  token: Float[Array, '1 D'],
  mask: sampling.Mask,
  table: Float[Array, 'N D'] | None,
) -> Float[Array, 'B VM D']:
  """Concatenates visible tokens and mask tokens, with positions added.

  Attention does not depend on token order, so this equals the sorting of the
  published code.

  Args:
    z: visible tokens.
    token: the learned mask token.
    mask: indices of visible and masked tokens.
    table: position embeddings, added by token index; None to add nothing.
  """
  batch, masked = mask.masked.shape
  shape = (batch, masked, z.shape[-1])
  mask_tokens = jnp.broadcast_to(token[None], shape).astype(z.dtype)
  x = jnp.concatenate([z, mask_tokens], axis=1)
  if table is None:
    return x
  index: Int[Array, 'B VM'] = jnp.concatenate([mask.visible, mask.masked], 1)
  return x + table[index].astype(x.dtype)
