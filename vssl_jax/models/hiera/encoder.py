"""Hiera: a transformer of four stages, each with fewer and wider tokens.

Source: Hiera, arXiv 2306.00989. Differences from a ViT: an overlapping
convolution embeds 4 x 4 times as many tokens, the first two stages attend
within mask units of 8 x 8 tokens, and tokens are pooled between stages. The
encoder can run on some mask units only. Pixels of hidden units are set to zero
before the convolution, whose kernel would otherwise include them at the edge
of a unit.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from vssl_jax import losses, sharding
from vssl_jax.masks import tubelets
from vssl_jax.models import blocks, layers, sizes, vit
from vssl_jax.models.hiera import blocks as hiera_blocks
from vssl_jax.models.hiera import patch_embed, stages, token_order
from vssl_jax.utils import colours

# Channels of the first stage, blocks of each stage, heads of the first stage.
# Source: Hiera, arXiv 2306.00989, Table 9 and released code.
FIELDS = ('channels', 'depths', 'num_heads')
SIZES = {
  name: dict(zip(FIELDS, row, strict=True))
  for name, row in {
    'T': (96, (1, 2, 7, 2), 1),
    'S': (96, (1, 2, 11, 2), 1),
    'B': (96, (2, 3, 16, 3), 1),
    'B+': (112, (2, 3, 16, 3), 2),
    'L': (144, (2, 6, 36, 4), 2),
    'H': (256, (2, 6, 36, 4), 4),
  }.items()
}
# Fields for single images, for use in `framewise.Framewise`.
IMAGE = dict(
  kernel=(1, 7, 7), stride=(1, 4, 4), padding=(0, 3, 3), separable=False
)
# Families of initial values: released code for supervised training, and MAE.
INITS = {'classifier': 'hiera', 'mae': 'mae'}


class Hiera(nn.Module):
  """Hiera encoder of a clip, or of some of its mask units.

  Attributes:
    channels: width of the first stage; each stage doubles it.
    depths: number of blocks of the four stages.
    num_heads: attention heads of the first stage; each stage doubles them.
    q_pool: number of stages that begin with pooling: 2 for pre-training, with
      2 x 2 tokens per unit at the end, 3 for fine-tuning, with one token.
      Parameters have the same shapes.
    kernel: kernel of the convolution, frames and pixels.
    stride: stride of the convolution, frames and pixels.
    padding: zeros around a clip, frames and pixels.
    separable: whether learned positions are the sum of a table of space and a
      table of time, instead of one table of both.
    final_norm: layer norm without parameters on the tokens of the last stage.
    init_family: family of initial values: `classifier` as released for
      supervised training, or `mae`.
    gelu: `exact` or `tanh`.
    norm_eps: added to variances in layer norms.
    drop_path: drop rate of the last block, linear from 0.
    dtype: dtype of activations and matrix products; parameters are float32.
    remat: `none`, `dots` or `full`.
    attention: kernel of attention over all tokens: `auto`, `xla`, `cudnn` or
      `splash`.
    mean: subtracted from pixels in [0, 1], per channel.
    std: divisor of the pixels after that, per channel.
  """

  channels: int
  depths: tuple[int, ...]
  num_heads: int
  q_pool: int = 2
  kernel: tubelets.Grid = (3, 7, 7)
  stride: tubelets.Grid = (2, 4, 4)
  padding: tubelets.Grid = (1, 3, 3)
  separable: bool = True
  final_norm: bool = True
  init_family: str = 'mae'
  gelu: str = 'exact'
  norm_eps: float = 1e-6
  drop_path: float = 0.0
  dtype: str = 'bfloat16'
  remat: str = 'none'
  attention: str = 'auto'
  mean: tuple[float, ...] = colours.IMAGENET_MEAN
  std: tuple[float, ...] = colours.IMAGENET_STD

  @property
  def patch(self) -> tubelets.Grid:
    """Frames and pixels of one token of the last stage."""
    t, h, w = self.stride
    return t, h * 2**self.q_pool, w * 2**self.q_pool

  @property
  def width(self) -> int:
    """Channels of a token of the last stage."""
    return self.channels * 2 ** (len(self.depths) - 1)

  @property
  def depth(self) -> int:
    """Number of blocks."""
    return sum(self.depths)

  @property
  def encoder_depth(self) -> int:
    """Number of encoder blocks: all."""
    return self.depth

  @property
  def unit(self) -> tubelets.Grid:
    """Tokens of a mask unit at the first stage, along (t, h, w)."""
    return 1, stages.SIDE, stages.SIDE

  def unit_grid(self, video_shape: Sequence[int]) -> tubelets.Grid:
    """Returns the mask units of a clip along (time, height, width).

    Args:
      video_shape: (B, T, H, W, C).

    Raises:
      ValueError: the clip cannot be cut into units.
    """
    t, h, w = self.stride
    return tubelets.grid_of(video_shape, (t, stages.SIDE * h, stages.SIDE * w))

  def plan(self) -> tuple[stages.Step, ...]:
    """Returns the options of each block.

    Raises:
      ValueError: `depths` does not have four stages, or `q_pool` is not 0 to
        3.
    """
    return stages.of(self.channels, self.depths, self.num_heads, self.q_pool)

  @nn.compact
  def __call__(
    self,
    video: Num[Array | np.ndarray, 'B T H W C'],
    units: Int[Array, 'B K'] | None = None,
    *,
    depth: float | None = None,
    features: bool = False,
    deterministic: bool = True,
  ) -> Float[Array, 'B N D'] | tuple[Float[Array, '...'], ...]:
    """Encodes a clip.

    Args:
      video: uint8, or floats in [0, 1]; normalised here.
      units: indices of the visible mask units, in raster order over
        `unit_grid`; None for all.
      depth: fraction of all blocks to run, see `vit.tap`. The tokens have the
        grid and the channels of the stage of the last such block and are not
        normed.
      features: return the tokens at the end of each stage.
      deterministic: no drop path.

    Returns:
      float32 tokens [B, N, D] after a layer norm, in raster order. With `units`
      [B, K * n, D]: unit by unit, the n tokens of a unit in raster order. With
      `features` a tuple in the activations' dtype, not normed: the tokens at
      the end of each stage [B, t, h, w, C], with `units` [B, K, 1, h, w, C].

    Raises:
      ValueError: the clip cannot be cut into units, or its grid differs from
        that of the learned positions.
    """
    plan = self.plan()
    upto = len(plan) if depth is None else vit.tap(len(plan), depth)
    grid = self.unit_grid(video.shape)
    x = self._embed(video, units, grid)
    count, tokens = x.shape[1:3]
    x, ends = x.reshape(x.shape[0], -1, self.channels), []

    def unrolled(x: Array) -> Array:
      x = token_order.reroll(x.reshape(x.shape[0], count, tokens, -1))
      return x if units is not None else token_order.together(x, grid)

    for i, step in enumerate(plan[:upto]):
      rate = 0.0 if deterministic else self.drop_path * i / (len(plan) - 1)
      x = self._block(i, step, rate)(x, count)
      tokens = step.left
      if i + 1 == len(plan) or plan[i + 1].stage > step.stage:
        ends.append(unrolled(x))
    if features:
      return tuple(ends)
    x = unrolled(x).reshape(x.shape[0], -1, x.shape[2]).astype(jnp.float32)
    if depth is None and self.final_norm:
      x = losses.layer_norm0(x, self.norm_eps)
    return x

  def _block(
    self, index: int, step: stages.Step, drop_path: float
  ) -> hiera_blocks.Block:
    """Returns the block of an index."""
    spec = blocks.Spec(
      num_heads=step.num_heads,
      mlp_width=4 * step.width,
      gelu=self.gelu,
      norm_eps=self.norm_eps,
      init=INITS[self.init_family],
      dtype=self.dtype,
      remat=self.remat,
      attention=self.attention,
    )
    cls = hiera_blocks.Block
    if self.remat != 'none':
      cls = nn.remat(cls, policy=blocks.REMAT[self.remat], static_argnums=(2,))
    return cls(spec, index, step, drop_path, name=f'block_{index:02d}')

  def _embed(
    self,
    video: Num[Array | np.ndarray, 'B T H W C'],
    units: Int[Array, 'B K'] | None,
    unit_grid: tubelets.Grid,
  ) -> Float[Array, 'B K n D']:
    """Returns the embedded tokens of the first stage, grouped by unit."""
    batch, dtype = video.shape[0], jnp.dtype(self.dtype)
    colours.check(video.shape[-1], self.mean, 'Hiera')
    x = tubelets.normalise(tubelets.to_unit(video), self.mean, self.std)
    x, padding = x.astype(dtype), self.padding
    if units is not None:
      overlap = [k - s for k, s in zip(self.kernel, self.stride, strict=True)]
      x = patch_embed.without_hidden(x, units, unit_grid)
      x = patch_embed.around(x, units, unit_grid, tuple(overlap), padding)
      padding = (0, 0, 0)
    x = nn.Conv(
      self.channels,
      self.kernel,
      self.stride,
      [(n, n) for n in padding],
      dtype=dtype,
      param_dtype=jnp.float32,
      kernel_init=layers.kernel_init(INITS[self.init_family], 'embed'),
      bias_init=layers.fan_in_bias(math.prod(self.kernel) * len(self.mean)),
      conv_general_dilated=_conv,
      name='embed',
    )(x)
    x = token_order.unroll(x, stages.LEVELS)
    x = x.reshape(batch, -1, *x.shape[2:])
    grid = [n * m for n, m in zip(unit_grid, self.unit, strict=True)]
    table = self._table(tuple(grid)).astype(dtype)[None]
    table = token_order.unroll(table, stages.LEVELS)
    return x + (table if units is None else table[0][units])

  def _table(self, grid: tubelets.Grid) -> Float[Array, 't h w D']:
    """Returns the learned positions of the tokens of the first stage."""
    t, h, w = grid
    shapes = {'positions': (t, h, w)}
    if self.separable:
      shapes = {'positions_space': (1, h, w), 'positions_time': (t, 1, 1)}
    total: Array | float = 0.0
    init = nn.initializers.normal(0.02)
    for name, sides in shapes.items():
      param = self.get_variable('params', name)  # its grid can differ
      shape = (*sides, self.channels) if param is None else param.shape
      table = self.param(name, init, shape, jnp.float32)
      total = total + sharding.gathered(jnp.asarray(table))
    if total.shape[:3] != tuple(grid):
      raise ValueError(
        f'the learned positions are for a grid of {total.shape[:3]} tokens and '
        f'the clip has {tuple(grid)}; load the weights for this grid, or take '
        'Encoder.at(video), which resizes the tables'
      )
    return total


def _conv(x: Array, weight: Array, *args: Any, **kwargs: Any) -> Array:
  return jax.lax.conv_general_dilated(
    x, sharding.gathered(weight), *args, **kwargs
  )


def make(size: str | Mapping[str, Any], **overrides: Any) -> Hiera:
  """Returns an encoder of a named size, or from a mapping of fields.

  Args:
    size: a name in `SIZES`, or at least channels, depths and num_heads.
    **overrides: fields of `Hiera`; `init` is an alias of `init_family`.

  Raises:
    ValueError: a name or field is unknown (the message gives the nearest), or
      a field has an unsupported value.
  """
  fields = sizes.fields(Hiera, size, overrides, SIZES, FIELDS)
  if fields.get('init_family', 'mae') not in INITS:
    raise ValueError(
      f'init is {fields["init_family"]!r}, wanted one of {sorted(INITS)}'
    )
  module = Hiera(**fields)
  module.plan()  # raises if depths or q_pool are not supported
  edges = zip(module.kernel, module.stride, module.padding, strict=True)
  if not all(k - s <= 2 * p < k for k, s, p in edges):
    raise ValueError(
      f'Hiera: found kernel={module.kernel}, stride={module.stride} and '
      f'padding={module.padding}; wanted, along each axis, a padding from '
      '(kernel - stride) / 2 to below kernel / 2, which gives a token for each '
      'stride'
    )
  return module
