"""Layers and initialisers shared by all models.

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
from jaxtyping import Array

from vssl_jax import sharding
from vssl_jax.models import fp8_matmul

# Matrix products of layers: in the dtype of the activations, or in float8.
PRODUCTS = {'same': sharding.dot_general, 'float8': fp8_matmul.dot_general}
DTYPES = ('float32', 'bfloat16')  # of activations and matrix products
INIT_FAMILIES = ('vjepa', 'videomae', 'mae', '4ds', 'hiera')

Initializer = Callable[..., Array]


def fan_in_uniform(key: Array, shape: Sequence[int], dtype: Any) -> Array:
  """Draws a kernel uniformly in +-1/sqrt(fan in), the default of torch."""
  bound = 1 / math.sqrt(math.prod(shape[:-1]))
  return jax.random.uniform(key, shape, dtype, -bound, bound)


def fan_in_bias(fan_in: int) -> Initializer:
  """Returns torch's bias initialiser, uniform in +-1/sqrt(fan in)."""
  bound = 1 / math.sqrt(fan_in)

  def init(key: Array, shape: Sequence[int], dtype: Any) -> Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def _glorot_of_three(key: Array, shape: Sequence[int], dtype: Any) -> Array:
  """Draws one of three kernels [D, E], with Glorot's bound for [D, 3E]."""
  fan_in, fan_out = shape
  scale = (fan_in + fan_out) / (fan_in + 3 * fan_out)
  init = nn.initializers.variance_scaling(scale, 'fan_avg', 'uniform')
  return init(key, shape, dtype)


def _glorot_of_rows(key: Array, shape: Sequence[int], dtype: Any) -> Array:
  """Draws a convolution kernel as the matrix [fan in, channels], Glorot."""
  rows = (math.prod(shape[:-1]), shape[-1])
  return nn.initializers.xavier_uniform()(key, rows, dtype).reshape(shape)


def kernel_init(family: str, role: str, block: int = 1) -> Initializer:
  """Returns the initialiser of a kernel.

  Args:
    family: `vjepa` (normal of deviation 0.02; the kernels that write to the
      residual stream are divided by sqrt(2 * block)), `videomae` (Glorot
      uniform), `mae` (the same, including the embedding), `4ds` (Glorot uniform
      for MLPs, LeCun normal otherwise) or `hiera` (normal of deviation 0.02).
    role: `embed`, `qkv`, `out`, `fc1`, `fc2` or `head`.
    block: number of the block, from 1.

  Raises:
    ValueError: `family` is unknown.
  """
  # The released V-JEPA code truncates at +-2, i.e. 100 standard deviations.
  if family == 'vjepa':
    residual = role in ('out', 'fc2')
    return nn.initializers.normal(
      0.02 / math.sqrt(2 * block if residual else 1)
    )
  if family in ('videomae', 'mae'):
    # VideoMAE's embedding is a convolution with torch's default.
    if role == 'embed' and family == 'videomae':
      return fan_in_uniform
    if role == 'qkv':
      return _glorot_of_three
    return (
      _glorot_of_rows if role == 'embed' else nn.initializers.xavier_uniform()
    )
  if family == '4ds':  # Flax's defaults, as in the released code
    if role in ('fc1', 'fc2'):
      return nn.initializers.xavier_uniform()
    return nn.initializers.lecun_normal()
  if family == 'hiera':  # truncated at +-2 too, see V-JEPA above
    return nn.initializers.normal(0.02)
  raise ValueError(f'init is {family!r}, wanted one of {INIT_FAMILIES}')


def embed_bias_init(family: str, fan_in: int) -> Initializer:
  """Returns the initialiser of the bias of a ViT's patch embedding.

  VideoMAE, MVD and MAE embed by a convolution, whose bias has torch's default:
  their own initialisation covers linear layers and norms only.

  Args:
    family: see `kernel_init`.
    fan_in: number of values of a patch.
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
  """Returns a linear layer: float32 parameters, `dtype` computation.

  `products='float8'` has no gradient.
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


def head(width: int, dtype: str, family: str) -> nn.Dense:
  """Returns a linear head on tokens.

  Args:
    width: output channels.
    dtype: dtype of the matrix product.
    family: family of initialisers, one of `INIT_FAMILIES`.
  """
  return nn.Dense(
    width,
    dtype=jnp.dtype(dtype),
    kernel_init=kernel_init(family, 'head'),
    dot_general=sharding.dot_general,
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
  """Returns a copy of a network with the dtype of all its modules replaced.

  Args:
    module: a network; modules in its fields and in mappings are included.
    dtype: dtype of activations and matrix products.
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
