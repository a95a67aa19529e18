"""Video to patches, and the layers and initial values that models share.

Shape legend of the whole package: B batch, T frames, H W pixels, C channels,
t h w grid of tokens, N = t*h*w tokens, V visible tokens, M masked tokens,
P values of a patch, D width, L layers (blocks).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from vssl_jax import sharding
from vssl_jax.models import float8

# Matrix products of layers: in the type of the activations, or in 8 bits.
PRODUCTS = {'same': sharding.dot_general, 'float8': float8.dot_general}
DTYPES = ('float32', 'bfloat16')  # of activations and matrix products
INIT_FAMILIES = ('vjepa', 'videomae', 'mae', '4ds', 'hiera')

Grid = tuple[int, int, int]
Initializer = Callable[..., Array]


def to_unit(
  video: Num[Array | np.ndarray, '*shape'],
) -> Float[Array | np.ndarray, '*shape']:
  """Returns uint8 pixels as float32 in [0, 1]; floats pass through.

  Raises:
    TypeError: pixels of another type.
  """
  if jnp.issubdtype(video.dtype, jnp.floating):
    return video
  if video.dtype != jnp.uint8:
    raise TypeError(
      f'video has dtype {video.dtype}, wanted uint8 (0..255) or floats in '
      '[0, 1]; convert it before the call'
    )
  return jnp.asarray(video, jnp.float32) / 255.0


def grid_of(video_shape: Sequence[int], patch: Grid) -> Grid:
  """Returns (t, h, w), the tokens along time, height and width.

  Args:
    video_shape: (B, T, H, W, C).
    patch: frames and pixels of one token, (pt, py, px).

  Raises:
    ValueError: the shape is not a clip or is no multiple of the patch.
  """
  if len(video_shape) != 5:
    raise ValueError(
      f'video has shape {tuple(video_shape)}, wanted [B, T, H, W, C]; add a '
      'batch axis to a single clip'
    )
  size = tuple(video_shape[1:4])
  if any(n % p or n < p for n, p in zip(size, patch, strict=True)):
    raise ValueError(
      f'video of (T, H, W) = {size} cannot be cut into patches of '
      f'{tuple(patch)}; each side must be a multiple of the patch: set '
      '--config.data.frames and --config.data.size, or the patch'
    )
  t, h, w = (n // p for n, p in zip(size, patch, strict=True))
  return t, h, w


def patchify(
  video: Num[Array | np.ndarray, 'B T H W C'], patch: Grid
) -> Num[Array, 'B N P']:
  """Cuts a clip into non-overlapping patches, in raster order.

  Args:
    video: any pixel type; the type is kept.
    patch: (pt, py, px).

  Returns:
    One row of (pt, py, px, c) values per token.
  """
  t, h, w = grid_of(video.shape, patch)
  pt, py, px = patch
  batch, channels = video.shape[0], video.shape[-1]
  x = jnp.asarray(video).reshape(batch, t, pt, h, py, w, px, channels)
  x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7)
  return x.reshape(batch, t * h * w, pt * py * px * channels)


def normalise(
  patches: Float[Array | np.ndarray, 'B N *P'],
  mean: tuple[float, ...],
  std: tuple[float, ...],
) -> Float[Array, 'B N *P']:
  """Subtracts a mean and divides by a deviation per colour channel.

  Args:
    patches: or a clip; channels are the innermost axis, or part of it.
    mean: one value per channel.
    std: likewise.
  """
  colours = patches.reshape(*patches.shape[:2], -1, len(mean))
  shape = (1, 1, 1, len(mean))
  colours = colours - jnp.asarray(mean, jnp.float32).reshape(shape)
  colours = colours / jnp.asarray(std, jnp.float32).reshape(shape)
  return colours.reshape(patches.shape)


def fan_in_uniform(key: Array, shape: Sequence[int], dtype: Any) -> Array:
  """Draws a kernel in +-1/sqrt(fan in), the start of torch's layers."""
  bound = 1 / math.sqrt(math.prod(shape[:-1]))
  return jax.random.uniform(key, shape, dtype, -bound, bound)


def fan_in_bias(fan_in: int) -> Initializer:
  """Returns what draws a bias in +-1/sqrt(fan in), the start of torch's."""
  bound = 1 / math.sqrt(fan_in)

  def init(key: Array, shape: Sequence[int], dtype: Any) -> Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def _glorot_of_three(key: Array, shape: Sequence[int], dtype: Any) -> Array:
  """Draws one of three kernels [D, E], in Glorot's bound of one [D, 3E]."""
  fan_in, fan_out = shape
  scale = (fan_in + fan_out) / (fan_in + 3 * fan_out)
  init = nn.initializers.variance_scaling(scale, 'fan_avg', 'uniform')
  return init(key, shape, dtype)


def _glorot_of_rows(key: Array, shape: Sequence[int], dtype: Any) -> Array:
  """Draws a convolution's kernel as that of a product with its pixels."""
  rows = (math.prod(shape[:-1]), shape[-1])
  return nn.initializers.xavier_uniform()(key, rows, dtype).reshape(shape)


def kernel_init(family: str, role: str, block: int = 1) -> Initializer:
  """Returns the initialiser of a kernel.

  Args:
    family: `vjepa` (normal of deviation 0.02; the kernels that write to the
      residual stream are divided by sqrt(2 * block)), `videomae` (Glorot
      uniform), `mae` (the same, the embedding too), `4ds` (Glorot uniform
      MLPs, the rest normal by fan in) or `hiera` (normal of deviation 0.02).
    role: `embed`, `qkv`, `out`, `fc1`, `fc2` or `head`.
    block: number of the block, from 1.

  Raises:
    ValueError: no such family.
  """
  # The released V-JEPA code truncates at +-2, which is 100 deviations away.
  if family == 'vjepa':
    deep = role in ('out', 'fc2')
    return nn.initializers.normal(0.02 / math.sqrt(2 * block if deep else 1))
  if family in ('videomae', 'mae'):
    # VideoMAE's is a convolution left as torch makes it.
    if role == 'embed' and family == 'videomae':
      return fan_in_uniform
    if role == 'qkv':
      return _glorot_of_three
    return (
      _glorot_of_rows if role == 'embed' else nn.initializers.xavier_uniform()
    )
  if family == '4ds':  # as the released code leaves it to Flax
    if role in ('fc1', 'fc2'):
      return nn.initializers.xavier_uniform()
    return nn.initializers.lecun_normal()
  if family == 'hiera':  # truncated as far out as that of V-JEPA
    return nn.initializers.normal(0.02)
  raise ValueError(f'init is {family!r}, wanted one of {INIT_FAMILIES}')


def embed_bias_init(family: str, fan_in: int) -> Initializer:
  """Returns the initialiser of the bias of a ViT's patch embedding.

  VideoMAE, MVD and MAE embed by a convolution, whose bias stays as torch
  draws it: their own initialisation covers linear layers and norms only.

  Args:
    family: see `kernel_init`.
    fan_in: values of a patch.
  """
  if family in ('videomae', 'mae'):
    return fan_in_bias(fan_in)
  return bias_init(family)


def bias_init(family: str) -> Initializer:
  """Returns the initialiser of the biases of linear layers and norms."""
  constant = nn.initializers.constant(0.02)
  return constant if family == 'hiera' else nn.initializers.zeros


def dense(
  features: int,
  name: str,
  *,
  kernel: Initializer,
  dtype: str,
  use_bias: bool = True,
  products: str = 'same',
  bias: Initializer = nn.initializers.zeros,
) -> nn.Dense:
  """Returns a linear layer: float32 parameters, `dtype` maths.

  Products may be `float8`, forward only.
  """
  return nn.Dense(
    features,
    use_bias=use_bias,
    dtype=jnp.dtype(dtype),
    param_dtype=jnp.float32,
    kernel_init=kernel,
    bias_init=bias,
    dot_general=PRODUCTS[products],
    name=name,
  )


def layer_norm(
  name: str,
  eps: float,
  dtype: str = 'float32',
  bias: Initializer = nn.initializers.zeros,
) -> nn.LayerNorm:
  """Returns a layer norm with float32 statistics and a `dtype` result."""
  return nn.LayerNorm(
    epsilon=eps,
    dtype=jnp.dtype(dtype),
    param_dtype=jnp.float32,
    bias_init=bias,
    name=name,
  )


def with_dtype(module: nn.Module, dtype: str) -> nn.Module:
  """Returns a network whose modules compute in a type.

  Args:
    module: a network, which may hold others as fields or in mappings.
    dtype: of activations and matrix products.
  """
  changes: dict[str, Any] = {}
  for field in dataclasses.fields(module):
    value = getattr(module, field.name)
    if field.name == 'dtype':
      changes['dtype'] = dtype
    elif field.name != 'parent' and isinstance(value, nn.Module):
      changes[field.name] = with_dtype(value, dtype)
    elif isinstance(value, Mapping):
      changes[field.name] = {
        name: with_dtype(x, dtype) if isinstance(x, nn.Module) else x
        for name, x in value.items()
      }
  return module.clone(**changes)
