"""Matrix products of frozen networks in floats of 8 bits.

Both factors become float8_e4m3fn, whose largest value is 448: activations with
one scale for each token, found anew in every product, so that what is said of a
clip does not depend on its neighbours in the batch; weights with one for each
output channel. Sums are float32. There is no gradient.

Source: FP8 Formats for Deep Learning, arXiv 2209.05433.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vssl_jax import sharding

DTYPE = jnp.float8_e4m3fn
LARGEST = 448.0
# Of NVIDIA's GPUs; those before 8.9 have no such matrix units.
CAPABILITY = (8, 9)


def quantise(
  x: Float[Array, '*shape'], axis: int | None = None
) -> tuple[Float[Array, '*shape'], Float[Array, '*scales']]:
  """Returns an array in 8 bits, and what it is to be multiplied by.

  Args:
    x: any floats.
    axis: values along this axis share a scale; None: all do.

  Returns:
    float8 values, and float32 scales of rank 0, or with 1 at `axis`.
  """
  x = x.astype(jnp.float32)
  largest = jnp.max(jnp.abs(x), axis=axis, keepdims=axis is not None)
  scale = jnp.where(largest > 0, largest / LARGEST, 1.0)
  # Rounding may go past the largest value, which would be NaN.
  scaled = jnp.clip(x / jnp.broadcast_to(scale, x.shape), -LARGEST, LARGEST)
  return scaled.astype(DTYPE), scale


def dot_general(
  x: Float[Array, '*batch D'],
  weight: Float[Array, 'D E'],
  dimensions: jax.lax.DotDimensionNumbers,
  precision: jax.lax.PrecisionLike = None,
  preferred_element_type: jax.typing.DTypeLike | None = None,
) -> Float[Array, '*batch E']:
  """Returns activations times a weight, both in 8 bits, as a layer asks.

  Args:
    x: activations.
    weight: [D, E]; gathered in 8 bits where devices share it.
    dimensions: the last axis of `x` with the first of `weight`.
    precision: not used: 8 bits have one.
    preferred_element_type: type of the result; None for that of `x`.
  """
  del precision
  x8, x_scale = quantise(x, axis=-1)
  weight8, weight_scale = quantise(weight, axis=0)
  found = jax.lax.dot_general(
    x8,
    sharding.gathered(weight8),
    dimensions,
    preferred_element_type=jnp.float32,
  )
  scale = x_scale * weight_scale.reshape((1,) * (x.ndim - 1) + (-1,))
  return (found * scale).astype(preferred_element_type or x.dtype)


def has_units(device: Any) -> bool:
  """Returns whether a device multiplies 8-bit floats itself.

  TPUs up to v6e do not, CPUs emulate.
  """
  capability = str(getattr(device, 'compute_capability', ''))
  if device.platform not in ('gpu', 'cuda') or not capability:
    return False
  return tuple(int(n) for n in capability.split('.')) >= CAPABILITY
