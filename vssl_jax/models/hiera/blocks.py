"""Hiera's block: attention per mask unit or over all tokens, with pooling."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vssl_jax.models import attention, blocks, layers
from vssl_jax.models.hiera import stages, token_order


class Attention(nn.Module):
  """Self-attention with optional pooling of the queries.

  Attributes:
    spec: options of the blocks of this stage.
    index: index of the block, from 0.
    step: options of this block: width, pooling, range of attention.
  """

  spec: blocks.Spec
  index: int
  step: stages.Step

  @nn.compact
  def __call__(
    self, x: Float[Array, 'B N C'], units: int
  ) -> Float[Array, 'B M D']:
    """Returns the attended tokens of `units` mask units.

    Raises:
      ValueError: the number of heads does not divide the width.
    """
    spec, width = self.spec, self.step.width
    if width % spec.num_heads:
      raise ValueError(
        f'num_heads: found {spec.num_heads} for a width of {width}, wanted a '
        'number that divides it; set num_heads or channels of that section'
      )
    split = (spec.num_heads, width // spec.num_heads)
    kernel = layers.kernel_init(spec.init, 'qkv')
    q, k, v = (
      blocks.dense(spec, width, name, kernel)(x).reshape(*x.shape[:2], *split)
      for name in 'qkv'
    )
    if self.step.pooled:
      q = token_order.pool(q, units)
    if self.step.windowed:
      y = _within(q, k, v, units)
    else:
      y = attention.attend(q, k, v, spec.attention)
    kernel = layers.kernel_init(spec.init, 'out', self.index + 1)
    y = y.reshape(*y.shape[:2], width)
    return blocks.dense(spec, width, 'out', kernel)(y)


def _within(
  q: Float[Array, 'B M H d'],
  k: Float[Array, 'B N H d'],
  v: Float[Array, 'B N H d'],
  units: int,
) -> Float[Array, 'B M H d']:
  """Computes attention within each unit, with the softmax in float32."""
  shape = q.shape
  q, k, v = (x.reshape(shape[0], units, -1, *shape[2:]) for x in (q, k, v))
  scores = jnp.einsum(
    'bunhd,bumhd->buhnm', q, k, preferred_element_type=jnp.float32
  )
  weights = jax.nn.softmax(scores / math.sqrt(shape[3])).astype(v.dtype)
  return jnp.einsum('buhnm,bumhd->bunhd', weights, v).reshape(shape)


class Block(nn.Module):
  """x = shortcut(x) + attention(norm(x)); x += mlp(norm(x)).

  The shortcut is the identity if the width does not change. Otherwise it is a
  linear layer of the normed tokens, pooled like the queries.

  Attributes:
    spec: options of the blocks of this stage.
    index: index of the block, from 0.
    step: options of this block: width, pooling, range of attention.
    drop_path: probability of dropping each branch, per example.
  """

  spec: blocks.Spec
  index: int
  step: stages.Step
  drop_path: float = 0.0

  @nn.compact
  def __call__(
    self, x: Float[Array, 'B N C'], units: int
  ) -> Float[Array, 'B M D']:
    """Returns the output tokens of the same units."""
    spec, step = self.spec, self.step
    bias = layers.bias_init(spec.init)
    y = layers.layer_norm('norm_1', spec.norm_eps, spec.dtype, bias)(x)
    if step.in_width != step.width:
      kernel = layers.kernel_init(spec.init, 'shortcut')
      x = blocks.dense(spec, step.width, 'shortcut', kernel)(y)
      x = token_order.pool(x, units) if step.pooled else x
    y = Attention(spec, self.index, step, name='attn')(y, units)
    x = x + blocks.drop(self, y, self.drop_path)
    y = layers.layer_norm('norm_2', spec.norm_eps, spec.dtype, bias)(x)
    y = blocks.Mlp(spec, self.index, name='mlp')(y)
    return x + blocks.drop(self, y, self.drop_path)
