"""Readouts: heads that probes train on the tokens of a frozen encoder."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vssl_jax.masks import tubelets
from vssl_jax.models import attention, blocks, layers

# V-JEPA's pooler uses the default of its framework, unlike the encoder.
POOLER_EPS = 1e-5
# Weight of a new batch in the running statistics, as in MAE's linear probe.
MOMENTUM = 0.1
# The default of Flax, which the code of 4DS uses.
CROSS_EPS = 1e-6


class Attentive(nn.Module):
  """Self-attention blocks, then one learned query that attends to all tokens.

  The readout has no positions, so the tokens of several clips of a video can
  be concatenated. Source: SALT (arXiv 2509.24317), appendix, and the code of
  V-JEPA 2, `src/models/attentive_pooler.py`.

  Attributes:
    classes: number of logits.
    num_heads: attention heads.
    self_blocks: number of self-attention blocks.
    dtype: dtype of activations and matrix products; parameters are float32.
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
    """Returns logits; `weight` and `train` are not used by this readout."""
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
    """Returns the query after cross-attention to the tokens and an MLP."""
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
    attended = attention.attend(
      *(z.reshape(*z.shape[:2], *split) for z in (q, k, v)),
      self.attention,
    )
    # Unlike the blocks above, this attention has no output projection.
    y = query + attended.reshape(query.shape)
    z = layers.layer_norm('norm_2', spec.norm_eps, self.dtype)(y)
    # It has the index of the last block, because V-JEPA scales fc2 by it.
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
      weight: weight of each example in the batch statistics; 0 excludes it.
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
    accumulated = self.variable('stats', 'seen', jnp.zeros, (1, 1))
    if train:
      fraction = (weight / jnp.maximum(jnp.sum(weight), 1e-6))[:, None]
      mean = jnp.sum(fraction * x, axis=0, keepdims=True)
      variance = jnp.sum(fraction * jnp.square(x - mean), axis=0, keepdims=True)
      if not self.is_initializing():
        for name, batch_value in (('mean', mean), ('variance', variance)):
          running[name].value += MOMENTUM * (batch_value - running[name].value)
        accumulated.value += MOMENTUM * (1 - accumulated.value)
    else:
      # Bias correction: the averages start from zero, so divide them by the
      # total weight of the batches so far.
      total = jnp.maximum(accumulated.value, 1e-6)
      mean = running['mean'].value / total
      variance = running['variance'].value / total
    return (x - mean) / jnp.sqrt(variance + self.eps)


class CrossAttention(nn.Module):
  """Cross-attention readout of 4DS: learned queries attend to all tokens once.

  Tokens are resized along time to one time step per frame, so that a query can
  attend to a frame. Source: 4DS (arXiv 2412.15212) and its code,
  google-deepmind/representations4d, `models/readout.py` (`AttentionReadout`)
  and `models/model.py` (`EncoderToReadout`).

  Attributes:
    outputs: values per query.
    grid: tokens (t, h, w) of a clip.
    frames: number of frames of a clip.
    queries: number of learned queries; the output of a single query has no
      query axis.
    width: channels of queries, keys and values, over all heads.
    num_heads: attention heads.
    dropout: dropout rate of attended values in training.
    dtype: dtype of activations and matrix products; parameters are float32.
    attention: implementation, see `attention.attend`.
  """

  outputs: int
  grid: tubelets.Grid
  frames: int
  queries: int = 1
  width: int = 1024
  num_heads: int = 16
  dropout: float = 0.0
  dtype: str = 'bfloat16'
  attention: str = 'auto'

  @nn.compact
  def __call__(
    self,
    tokens: Float[Array, 'B N D'],
    weight: Float[Array, 'B'],
    train: bool = False,
  ) -> Float[Array, 'B *Q K']:
    """Returns the output of each query, float32.

    Args:
      tokens: tokens in raster order of the grid.
      weight: not used by this readout.
      train: apply dropout.

    Raises:
      ValueError: the tokens do not fit the grid, or the heads do not divide
        the width.
    """
    del weight
    if self.width % self.num_heads:
      raise ValueError(
        f'the readout has {self.width} channels and {self.num_heads} heads; '
        'set probe.width to a multiple of probe.num_heads'
      )
    x = self._features(tokens)
    query, attended = self._attend(x)
    if self.dropout:
      attended = nn.Dropout(self.dropout, deterministic=not train)(attended)
    y = query + self._dense(self.width, 'out')(attended)
    z = layers.layer_norm('norm_2', CROSS_EPS, self.dtype)(y)
    z = nn.gelu(self._dense(4 * self.width, 'fc1')(z), approximate=True)
    y = y + self._dense(self.width, 'fc2')(z)
    y = y[:, 0] if self.queries == 1 else y
    head = self._dense(self.outputs, 'head', dtype='float32')
    return head(y.astype(jnp.float32))

  def _dense(self, features: int, name: str, dtype: str = '') -> nn.Dense:
    kernel = nn.initializers.lecun_normal()
    return layers.dense(
      features, name, kernel=kernel, dtype=dtype or self.dtype
    )

  def _features(self, tokens: Float[Array, 'B N D']) -> Float[Array, 'B M D']:
    """Returns normed tokens with time embeddings, resized to the frames."""
    x = resize_time(tokens, self.grid, self.frames)
    x = layers.layer_norm('norm_1', CROSS_EPS, self.dtype)(x)
    kernel = nn.initializers.normal(0.02)
    shape = (self.frames, x.shape[-1])
    table = self.param('time', kernel, shape, jnp.float32)
    x = x + table[None, :, None].astype(x.dtype)
    return x.reshape(x.shape[0], -1, x.shape[-1])

  def _attend(
    self, x: Float[Array, 'B M D']
  ) -> tuple[Float[Array, 'B Q W'], Float[Array, 'B Q W']]:
    """Returns the queries and their attended values."""
    split = (self.num_heads, self.width // self.num_heads)
    kernel = nn.initializers.normal(0.02)
    shape = (self.queries, *split)
    query = self.param('query', kernel, shape, jnp.float32).astype(x.dtype)
    query = jnp.broadcast_to(query[None], (x.shape[0], *shape))
    k, v = (
      self._dense(self.width, name)(x).reshape(*x.shape[:2], *split)
      for name in ('k', 'v')
    )
    attended = attention.attend(query, k, v, self.attention)
    flat = (*query.shape[:2], self.width)
    return query.reshape(flat), attended.reshape(flat)


def resize_time(
  tokens: Float[Array, 'B N D'], grid: tubelets.Grid, frames: int
) -> Float[Array, 'B T n D']:
  """Resizes tokens along time to one time step per frame, cubic.

  Args:
    tokens: tokens in raster order of the grid.
    grid: (t, h, w).
    frames: number of output time steps, T.

  Raises:
    ValueError: the number of tokens differs from that of the grid.
  """
  batch, count, width = tokens.shape
  t, h, w = grid
  if count != t * h * w:
    raise ValueError(
      f'found {count} tokens where a grid of {tuple(grid)} has {t * h * w}; '
      'this readout needs all tokens of one clip'
    )
  steps = tokens.reshape(batch, t, h * w, width)
  return jax.image.resize(steps, (batch, frames, h * w, width), 'cubic')


class Dense(nn.Module):
  """Dense readout: one value per pixel of a clip, such as depth.

  Each query of the readout predicts one patch. Source: 4DS, as above.

  Attributes:
    grid: tokens (t, h, w) of a clip.
    clip: (T, H, W).
    patch: frames and pixels predicted by one query.
    width: this and the following fields are those of `CrossAttention`.
    num_heads: attention heads.
    dropout: rate.
    dtype: dtype of activations.
    attention: implementation.
  """

  grid: tubelets.Grid
  clip: tuple[int, int, int]
  patch: tubelets.Grid = (2, 8, 8)
  width: int = 1024
  num_heads: int = 16
  dropout: float = 0.0
  dtype: str = 'bfloat16'
  attention: str = 'auto'

  @nn.compact
  def __call__(
    self,
    tokens: Float[Array, 'B N D'],
    weight: Float[Array, 'B'],
    train: bool = False,
  ) -> Float[Array, 'B T H W']:
    """Returns one value per pixel; arguments as in `CrossAttention`."""
    t, h, w = tubelets.grid_of((1, *self.clip, 1), self.patch)
    pt, py, px = self.patch
    predictions = CrossAttention(
      outputs=pt * py * px,
      grid=self.grid,
      frames=self.clip[0],
      queries=t * h * w,
      width=self.width,
      num_heads=self.num_heads,
      dropout=self.dropout,
      dtype=self.dtype,
      attention=self.attention,
      name='readout',
    )(tokens, weight, train)
    x = predictions.reshape(-1, t, h, w, pt, py, px)
    return x.transpose(0, 1, 4, 2, 5, 3, 6).reshape(-1, *self.clip)
