"""Readouts: what a probe trains on the tokens of a frozen encoder."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vssl_jax.models import attention, blocks, layers

# The pooler of V-JEPA keeps its framework's default, unlike the encoder.
POOLER_EPS = 1e-5
# Share of a new batch in the running statistics, as in MAE's linear probe.
MOMENTUM = 0.1


class Attentive(nn.Module):
  """Self-attention blocks, then one learned query that attends to all tokens.

  The tokens of several clips of a video may be concatenated: there are no
  positions. Source: SALT (arXiv 2509.24317), appendix, and the code of
  V-JEPA 2, `src/models/attentive_pooler.py`.

  Attributes:
    classes: number of logits.
    num_heads: attention heads.
    self_blocks: blocks before the query's.
    dtype: of activations and matrix products; parameters are float32.
    attention: implementation, see `attention.attend`.
  """

  classes: int
  num_heads: int = 16
  self_blocks: int = 3
  dtype: str = 'bfloat16'
  attention: str = 'auto'

  @nn.compact
  def __call__(
    self,
    tokens: Float[Array, 'B N D'],
    weight: Float[Array, 'B'],
    train: bool = False,
  ) -> Float[Array, 'B K']:
    """Returns logits; `weight` and `train` are for other readouts."""
    del weight, train
    width = tokens.shape[-1]
    spec = blocks.Spec(
      num_heads=self.num_heads,
      mlp_width=4 * width,
      norm_eps=POOLER_EPS,
      dtype=self.dtype,
      attention=self.attention,
    )
    x = blocks.run(spec, self.self_blocks, tokens, None)[-1]
    y = self._pool(spec, x)
    kernel = layers.kernel_init('vjepa', 'head')
    head = layers.dense(self.classes, 'head', kernel=kernel, dtype='float32')
    return head(y[:, 0].astype(jnp.float32))

  def _pool(
    self, spec: blocks.Spec, x: Float[Array, 'B N D']
  ) -> Float[Array, 'B 1 D']:
    """Returns the query after it has seen the tokens."""
    width = x.shape[-1]
    split = (self.num_heads, width // self.num_heads)
    kernel = layers.kernel_init('vjepa', 'qkv')
    query = self.param('query', kernel, (1, width), jnp.float32)
    query = jnp.broadcast_to(query[None], (x.shape[0], 1, width))
    x = layers.layer_norm('norm_1', spec.norm_eps, self.dtype)(x)
    q, k, v = (
      layers.dense(width, name, kernel=kernel, dtype=self.dtype)(source)
      for name, source in (('q', query), ('k', x), ('v', x))
    )
    mixed = attention.attend(
      *(z.reshape(*z.shape[:2], *split) for z in (q, k, v)), self.attention
    )
    # No output projection here, in contrast to the blocks above.
    y = query + mixed.reshape(query.shape)
    z = layers.layer_norm('norm_2', spec.norm_eps, self.dtype)(y)
    # Numbered like the last block before it: V-JEPA scales fc2 by that.
    return y + blocks.Mlp(spec, max(self.self_blocks - 1, 0), name='mlp')(z)


class Linear(nn.Module):
  """Mean over tokens, batch norm without parameters, one linear layer.

  Source: MAE (arXiv 2111.06377), linear probing.

  Attributes:
    classes: number of logits.
    eps: added to the variance.
  """

  classes: int
  eps: float = 1e-6

  @nn.compact
  def __call__(
    self,
    tokens: Float[Array, 'B N D'],
    weight: Float[Array, 'B'],
    train: bool = False,
  ) -> Float[Array, 'B K']:
    """Returns logits.

    Args:
      tokens: features of the clips.
      weight: 0 keeps an example out of the batch's statistics.
      train: normalise by this batch and update the running statistics.
    """
    x = jnp.mean(tokens.astype(jnp.float32), axis=1)
    x = self._normalise(x, weight, train)
    kernel = layers.kernel_init('vjepa', 'head')
    return layers.dense(self.classes, 'head', kernel=kernel, dtype='float32')(x)

  def _normalise(
    self, x: Float[Array, 'B D'], weight: Float[Array, 'B'], train: bool
  ) -> Float[Array, 'B D']:
    shape = (1, x.shape[-1])
    running = {
      name: self.variable('stats', name, jnp.zeros, shape)
      for name in ('mean', 'variance')
    }
    seen = self.variable('stats', 'seen', jnp.zeros, (1, 1))
    if train:
      part = (weight / jnp.maximum(jnp.sum(weight), 1e-6))[:, None]
      mean = jnp.sum(part * x, axis=0, keepdims=True)
      variance = jnp.sum(part * jnp.square(x - mean), axis=0, keepdims=True)
      if not self.is_initializing():
        for name, new in (('mean', mean), ('variance', variance)):
          running[name].value += MOMENTUM * (new - running[name].value)
        seen.value += MOMENTUM * (1 - seen.value)
    else:
      # Divided by the total share of the batches seen, so that short runs do
      # not normalise by the zeros that the averages start from.
      total = jnp.maximum(seen.value, 1e-6)
      mean = running['mean'].value / total
      variance = running['variance'].value / total
    return (x - mean) / jnp.sqrt(variance + self.eps)
