"""Video transformer (ViT): an encoder, or an encoder-decoder (4DS)."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from vssl_jax import sharding
from vssl_jax.masks import sampling, tubelets
from vssl_jax.models import blocks, layers, positions, sizes
from vssl_jax.utils import colours

# width, depth, heads, MLP width. S to G: SALT (arXiv 2509.24317); M and e:
# 4DS (arXiv 2412.15212); g22: the released V-JEPA 2 ViT-g, which has 22 heads
# instead of the 16 in the papers.
FIELDS = ('width', 'depth', 'num_heads', 'mlp_width')
SIZES = {
  name: dict(zip(FIELDS, row, strict=True))
  for name, row in {
    'Ti': (192, 12, 3, 768),
    'S': (384, 12, 6, 1536),
    'M': (512, 12, 8, 2048),
    'B': (768, 12, 12, 3072),
    'L': (1024, 24, 16, 4096),
    'H': (1280, 32, 16, 5120),
    'g': (1408, 40, 16, 6144),
    'g22': (1408, 40, 22, 6144),
    'G': (1664, 48, 16, 8192),
    'e': (1792, 56, 16, 15360),
  }.items()
}

SCORES = ('cls', 'column_mean')  # kinds of `token_scores`


class Vit(nn.Module):
  """Encoder of a clip, or of its visible tokens only.

  With `decoder_blocks`, the last blocks decode, as in 4DS and LayerLock:
  learned latents, one per position, are appended to the visible tokens before
  these blocks. The blocks before them are the encoder.

  Attributes:
    width: channels of a token.
    depth: number of blocks.
    num_heads: attention heads.
    mlp_width: hidden channels of the MLPs; None for 4 * width.
    patch: frames and pixels of one token.
    positions: one of `positions.NAMES`.
    rope_pairing: `paired`, or `vjepa2` for weights of V-JEPA 2.
    qkv_bias: `full`, or `qv` (no bias for keys) as in VideoMAE.
    final_norm: layer norm after the last block.
    init_family: family of initial values, see `layers.kernel_init`.
    gelu: `exact` or `tanh`.
    norm_eps: added to variances in layer norms.
    drop_path: drop rate of the last block, linear from 0.
    dtype: dtype of activations and matrix products; parameters are float32.
    remat: `none`, `dots` or `full`.
    attention: `auto`, `xla`, `cudnn` or `splash`.
    decoder_blocks: last blocks that decode; 0 for an encoder only.
    loops: blocks at which loops over blocks begin, see `blocks.run`.
    class_token: whether a learned class token is prepended to the tokens of
      the clip; it is not returned.
    registers: number of learned tokens after the class token. They have no
      position and are not returned, as in DINOv2 with registers.
    layer_scale: learned gains on the branches of a block, as in DINOv2.
    mlp: `gelu`, or `swiglu`: silu(gate(x)) * fc1(x), as in DINOv2's ViT-g.
    resize: how learned positions are resized to another grid, a name in
      `resizing.NAMES`; tables of the right size are unchanged.
    products: dtype of matrix products with the blocks' weights: `same`, or
      `float8` for networks that are not trained.
    mean: subtracted from pixels in [0, 1], per channel.
    std: divisor of the pixels after that, per channel.
  """

  width: int
  depth: int
  num_heads: int
  mlp_width: int | None = None
  patch: tuple[int, int, int] = (2, 16, 16)
  positions: str = 'rope_3d'
  rope_pairing: str = 'paired'
  qkv_bias: str = 'full'
  final_norm: bool = True
  init_family: str = 'vjepa'
  gelu: str = 'exact'
  norm_eps: float = 1e-6
  drop_path: float = 0.0
  dtype: str = 'bfloat16'
  remat: str = 'none'
  attention: str = 'auto'
  decoder_blocks: int = 0
  loops: tuple[int, ...] = ()
  class_token: bool = False
  registers: int = 0
  layer_scale: bool = False
  mlp: str = 'gelu'
  resize: str = 'trilinear'
  products: str = 'same'
  mean: tuple[float, ...] = colours.IMAGENET_MEAN
  std: tuple[float, ...] = colours.IMAGENET_STD

  @property
  def block_spec(self) -> blocks.Spec:
    """Options shared by the blocks of this encoder."""
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
      drop_path=self.drop_path,
      rope_on='qk' if self.positions == 'rope_3d' else 'norm',
      layer_scale=self.layer_scale,
      mlp=self.mlp,
      products=self.products,
    )

  @property
  def prefix(self) -> int:
    """Number of tokens before those of the clip: class token and registers."""
    return int(self.class_token) + self.registers

  @property
  def encoder_depth(self) -> int:
    """Number of blocks before the decoding blocks; features are read here."""
    return self.depth - self.decoder_blocks

  @nn.compact
  def __call__(
    self,
    video: Num[Array | np.ndarray, 'B T H W C'],
    visible: Int[Array, 'B V'] | None = None,
    *,
    depth: float | None = None,
    upto: int | None = None,
    features: bool = False,
    normed: bool = False,
    attention_to: str = '',
    latents: Float[Array, 'N D'] | None = None,
    deterministic: bool = True,
  ) -> (
    Float[Array, 'B K D']
    | tuple[Float[Array, 'B K D'], ...]
    | tuple[tuple[Float[Array, 'B K D'], ...], Float[Array, 'B K']]
  ):
    """Encodes the tokens of a clip, or encodes and decodes it.

    Args:
      video: uint8, or floats in [0, 1]; normalised here.
      visible: flat indices of the tokens to embed; None for all N.
      depth: tap as a fraction of the depth, as in 4DS, see `tap`: 1.0 runs all
        blocks but the last. The final norm is not applied.
      upto: the same, as a number of blocks.
      features: return the tokens at every depth.
      normed: with `features`, append the tokens that are returned without
        `features`.
      attention_to: kind of `token_scores`. Return a pair: the tuple of
        `features`, and the scores [B, V or N] of the last block that runs.
      latents: latents to decode, one per position.
      deterministic: no drop path.

    Returns:
      float32 tokens [B, V or N, D] after the final norm or, with
      `decoder_blocks`, after the last encoder block. With `features` a tuple
      in the activations' dtype, without the final norm: the embedded tokens,
      then the output of each block; entry k is the output of k blocks. With
      `latents` float32 [B, N, D], the last block's output for each latent.

    Raises:
      ValueError: `decoder_blocks` with a final norm or a class token, or not
        fewer than `depth`; a class token with rotary positions; registers
        without a class token; the channels of the clip differ from those of
        `mean`.
    """
    if self.decoder_blocks and self.final_norm:
      raise ValueError(
        f'decoder_blocks is {self.decoder_blocks} and final_norm is True; an '
        'encoder that ends before its last blocks has no final norm'
      )
    if self.decoder_blocks and self.class_token:
      raise ValueError(
        f'decoder_blocks is {self.decoder_blocks} and class_token is True; '
        'blocks that decode have no place for it: set one of the two to 0'
      )
    if self.registers and not self.class_token:
      raise ValueError(
        f'registers is {self.registers} and class_token is False; registers '
        'require a class token: set class_token=True, or registers=0'
      )
    if not 0 <= self.decoder_blocks < self.depth:
      raise ValueError(
        f'decoder_blocks is {self.decoder_blocks}, wanted fewer than the '
        f'{self.depth} blocks there are'
      )
    grid = tubelets.grid_of(video.shape, self.patch)
    colours.check(video.shape[-1], self.mean, 'ViT')
    x = self._embed(tubelets.patchify(video, self.patch), visible, grid)
    if self.class_token:
      x = self._with_class_token(x)
    if visible is None:  # one row of angles is broadcast over the batch
      visible = jnp.arange(math.prod(grid), dtype=jnp.int32)[None]
    truncated = depth is not None or upto is not None
    if depth is not None:
      upto = tap(self.depth, depth)
    elif self.is_initializing() or (features and upto is None):
      upto = self.depth
    elif upto is None:
      upto = self.encoder_depth
    outputs = self._blocks(x, visible, grid, 0, upto, deterministic)
    block_input = outputs[-2] if attention_to else None
    if self.class_token:
      outputs = tuple(x[:, self.prefix :] for x in outputs)
    if block_input is not None:
      rope = positions.rope_of(self, visible, grid)
      return outputs, token_scores(
        self, upto - 1, block_input, rope, attention_to
      )
    if latents is not None:
      x, visible = _join(outputs[-1], latents, visible)
      count = latents.shape[0]
      outputs = self._blocks(x, visible, grid, upto, None, deterministic)
      return outputs[-1][:, -count:].astype(jnp.float32)
    if features and not normed:
      return outputs
    if truncated or not self.final_norm:
      last = outputs[-1].astype(jnp.float32)
    else:
      last = layers.layer_norm('norm', self.norm_eps)(outputs[-1])
    return (*outputs, last) if features else last

  def _blocks(
    self,
    x: Float[Array, 'B K D'],
    index: Int[Array, 'R V'],
    grid: tubelets.Grid,
    start: int,
    upto: int | None,
    deterministic: bool,
  ) -> tuple[Float[Array, 'B K D'], ...]:
    """Runs blocks `start` to `upto` on tokens at the positions `index`.

    A class token before them has no position.
    """
    return blocks.run(
      self.block_spec,
      self.depth,
      x,
      positions.rope_of(self, index, grid),
      start=start,
      upto=upto,
      deterministic=deterministic,
      loops=self.loops,
      params=None if self.is_initializing() else self.variables['params'],
    )

  def _embed(
    self,
    patches: Num[Array, 'B N P'],
    visible: Int[Array, 'B V'] | None,
    grid: tubelets.Grid,
  ) -> Float[Array, 'B K D']:
    table = positions.table(self, self.positions, grid, self.width)
    if visible is not None:  # gather first: masked patches cost no arithmetic
      patches = sampling.gather(patches, visible)
    x = tubelets.normalise(tubelets.to_unit(patches), self.mean, self.std)
    x = layers.dense(
      self.width,
      'embed',
      kernel=layers.kernel_init(self.init_family, 'embed'),
      bias=layers.embed_bias_init(self.init_family, x.shape[-1]),
      dtype=self.dtype,
    )(x)
    if table is None:
      return x
    table = sharding.gathered(table.astype(x.dtype))
    table = table[None] if visible is None else table[visible]
    return x + table

  def _with_class_token(
    self, x: Float[Array, 'B K D']
  ) -> Float[Array, 'B K1 D']:
    init = nn.initializers.normal(0.02)
    token = jnp.asarray(
      self.param('class_token', init, (1, self.width), jnp.float32)
    )
    row = positions.class_row(self, self.positions, self.width)
    token = token if row is None else token + row
    if self.registers:  # they have no position
      shape = (self.registers, self.width)
      registers = self.param('registers', init, shape, jnp.float32)
      token = jnp.concatenate([token, jnp.asarray(registers)])
    token = token.astype(x.dtype)[None]
    shape = (x.shape[0], *token.shape[1:])
    return jnp.concatenate([jnp.broadcast_to(token, shape), x], axis=1)


def _join(
  x: Float[Array, 'B V D'],
  latents: Float[Array, 'N D'],
  visible: Int[Array, 'R V'],
) -> tuple[Float[Array, 'B K D'], Int[Array, 'B K']]:
  """Returns visible tokens followed by latents, and their positions."""
  batch, count = x.shape[0], latents.shape[0]
  latents = sharding.gathered(latents.astype(x.dtype))
  latent_tokens = jnp.broadcast_to(latents[None], (batch, *latents.shape))
  latent_index = jnp.arange(count, dtype=jnp.int32)[None]
  return (
    jnp.concatenate([x, latent_tokens], axis=1),
    jnp.concatenate(
      [
        jnp.broadcast_to(visible, (batch, visible.shape[1])),
        jnp.broadcast_to(latent_index, (batch, count)),
      ],
      axis=1,
    ),
  )


def tap(depth: int, fraction: float) -> int:
  """Returns the number of blocks to run for a depth fraction of 4DS.

  4DS lists [tokens, input of block 1, ..., input of block L] and reads entry
  int((L + 1) * fraction) - 1, so 0.95 of 24 blocks is the output of block 21.

  Source: 4DS, arXiv 2412.15212, released code.

  Raises:
    ValueError: the fraction is not in (0, 1].
  """
  if not 0 < fraction <= 1:
    raise ValueError(f'depth is {fraction}, wanted a fraction in (0, 1]')
  return max(int((depth + 1) * fraction) - 2, 0)


def make(size: str | Mapping[str, Any], **overrides: Any) -> Vit:
  """Returns an encoder of a named size, or from a mapping of fields.

  Args:
    size: a name in `SIZES`, or at least width, depth and num_heads.
    **overrides: fields of `Vit`; `init` is an alias of `init_family`.

  Raises:
    ValueError: a name or field is unknown; the message gives the nearest.
  """
  return Vit(**sizes.fields(Vit, size, overrides, SIZES, FIELDS))


def token_scores(
  encoder: Any,
  index: int,
  x: Float[Array, 'B N D'],
  rope: positions.Rope | None,
  kind: str,
) -> Float[Array, 'B S']:
  """Returns the attention received by each token of a clip, float32.

  The queries and keys of the block are computed a second time; under `jit`
  they are the same computation as in the block. Rows of attention sum to 1
  over the tokens, the class token and the registers. The latter two, if any,
  are not in the result.

  Args:
    encoder: a bound `vit.Vit`.
    index: index of the block, from 0.
    x: input of that block, starting with the class token and registers, if
      any.
    rope: rotation, if any.
    kind: `cls`: attention from the class token; `column_mean`: mean attention
      from the tokens of the clip. Both are means over heads.

  Raises:
    ValueError: `kind` is unknown, or `cls` without a class token.
  """
  first = encoder.prefix
  if kind not in SCORES or (kind == 'cls' and not encoder.class_token):
    raise ValueError(
      f'scores: found {kind!r}, wanted one of {SCORES}'
      + ('' if first else "; without a class token 'column_mean'")
    )
  query_range = (0, 1) if kind == 'cls' else (first, x.shape[1])
  variables = {'params': encoder.variables['params'][f'block_{index:02d}']}
  block = blocks.Block(encoder.block_spec, index, parent=None)
  return jnp.asarray(block.apply(variables, x, rope, query_range))[:, first:]
