"""Readouts: what a probe trains on the tokens of a frozen encoder."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vssl_jax.models import attention, blocks, layers

# The pooler of V-JEPA keeps its framework's default, unlike the encoder.
POOLER_EPS = 1e-5
# Share of a new batch in the running statistics, as in MAE's linear probe.
MOMENTUM = 0.1
# Flax's, which the code of 4DS leaves as it is.
CROSS_EPS = 1e-6


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


class CrossAttention(nn.Module):
  """Learned queries that look once at all tokens: the readout of 4DS.

  Tokens are resized along time to one row per frame, so that a query may ask
  for a frame. Source: 4DS (arXiv 2412.15212) and its code, google-deepmind/
  representations4d, `models/readout.py` (`AttentionReadout`) and
  `models/model.py` (`EncoderToReadout`).

  Attributes:
    outputs: values per query.
    grid: tokens (t, h, w) of a clip.
    frames: of a clip.
    queries: learned queries; the answer of a single one has no axis for them.
    width: channels of queries, keys and values, over all heads.
    num_heads: attention heads.
    dropout: rate at which attended values are dropped in training.
    dtype: of activations and matrix products; parameters are float32.
    attention: implementation, see `attention.attend`.
  """

  outputs: int
  grid: layers.Grid
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
    """Returns the answer to each query; `weight` is for other readouts.

    Args:
      tokens: in raster order of the grid.
      weight: not used.
      train: drop values at the rate `dropout`.

    Raises:
      ValueError: the tokens or the heads do not fit.
    """
    del weight
    if self.width % self.num_heads:
      raise ValueError(
        f'the readout has {self.width} channels and {self.num_heads} heads; '
        'set probe.width to a multiple of probe.num_heads'
      )
    x = self._features(tokens)
    query, mixed = self._attend(x)
    if self.dropout:
      mixed = nn.Dropout(self.dropout, deterministic=not train)(mixed)
    y = query + self._dense(self.width, 'out')(mixed)
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
    """Returns normalised tokens, a row of them per frame, that know it."""
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
    """Returns the queries, and what they found."""
    split = (self.num_heads, self.width // self.num_heads)
    kernel = nn.initializers.normal(0.02)
    shape = (self.queries, *split)
    query = self.param('query', kernel, shape, jnp.float32).astype(x.dtype)
    query = jnp.broadcast_to(query[None], (x.shape[0], *shape))
    k, v = (
      self._dense(self.width, name)(x).reshape(*x.shape[:2], *split)
      for name in ('k', 'v')
    )
    mixed = attention.attend(query, k, v, self.attention)
    flat = (*query.shape[:2], self.width)
    return query.reshape(flat), mixed.reshape(flat)


def resize_time(
  tokens: Float[Array, 'B N D'], grid: layers.Grid, frames: int
) -> Float[Array, 'B T n D']:
  """Interpolates tokens along time, cubically, to one row per frame.

  Args:
    tokens: in raster order of the grid.
    grid: (t, h, w).
    frames: rows wanted, T.

  Raises:
    ValueError: the tokens are not those of the grid.
  """
  batch, count, width = tokens.shape
  t, h, w = grid
  if count != t * h * w:
    raise ValueError(
      f'found {count} tokens where a grid of {tuple(grid)} has {t * h * w}; '
      'this readout wants the tokens of one clip, with none left out'
    )
  rows = tokens.reshape(batch, t, h * w, width)
  return jax.image.resize(rows, (batch, frames, h * w, width), 'cubic')


class Dense(nn.Module):
  """A value for each pixel of a clip, such as its depth.

  Each query of the readout answers for one patch. Source: 4DS, as above.

  Attributes:
    grid: tokens (t, h, w) of a clip.
    clip: (T, H, W).
    patch: frames and pixels that one query answers for.
    width: see `CrossAttention`; the same holds for what follows.
    num_heads: attention heads.
    dropout: rate.
    dtype: of activations.
    attention: implementation.
  """

  grid: layers.Grid
  clip: tuple[int, int, int]
  patch: layers.Grid = (2, 8, 8)
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
    t, h, w = layers.grid_of((1, *self.clip, 1), self.patch)
    pt, py, px = self.patch
    answers = CrossAttention(
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
    x = answers.reshape(-1, t, h, w, pt, py, px)
    return x.transpose(0, 1, 4, 2, 5, 3, 6).reshape(-1, *self.clip)
