"""Matrix products of frozen networks in 8-bit floats.

Both factors are quantised to float8_e4m3fn, whose largest value is 448.
Activations have one scale per token, computed in every product, so the result
of a clip does not depend on other clips of the batch. Weights have one scale
per output channel. Sums are float32. There is no gradient.

Source: FP8 Formats for Deep Learning, arXiv 2209.05433.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vssl_jax import sharding

DTYPE = jnp.float8_e4m3fn
LARGEST = 448.0
# Smallest compute capability of NVIDIA GPUs with float8 matrix units.
CAPABILITY = (8, 9)


def quantise(
  x: Float[Array, '*shape'], axis: int | None = None
) -> tuple[Float[Array, '*shape'], Float[Array, '*scales']]:
  """Quantises an array to float8; returns the values and their scales.

  Args:
    x: array of floats.
    axis: values along this axis share a scale; None: one scale for all.

  Returns:
    float8 values, and float32 scales: a scalar, or of size 1 along `axis`.
    values * scales approximates `x`.
  """
  x = x.astype(jnp.float32)
  largest = jnp.max(jnp.abs(x), axis=axis, keepdims=axis is not None)
  scale = jnp.where(largest > 0, largest / LARGEST, 1.0)
  # Rounding can exceed the largest value, which would give NaN.
  scaled = jnp.clip(x / jnp.broadcast_to(scale, x.shape), -LARGEST, LARGEST)
  return scaled.astype(DTYPE), scale


def dot_general(
  x: Float[Array, '*batch D'],
  weight: Float[Array, 'D E'],
  dimensions: jax.lax.DotDimensionNumbers,
  precision: jax.lax.PrecisionLike = None,
  preferred_element_type: jax.typing.DTypeLike | None = None,
) -> Float[Array, '*batch E']:
  """Multiplies activations by a weight in float8; `dot_general` of layers.

  Args:
    x: activations.
    weight: weight [D, E]; gathered in float8 if it is sharded.
    dimensions: contracts the last axis of `x` with the first of `weight`.
    precision: not used: float8 products have a single precision.
    preferred_element_type: dtype of the result; None for that of `x`.
  """
  del precision
  x8, x_scale = quantise(x, axis=-1)
  weight8, weight_scale = quantise(weight, axis=0)
  product = jax.lax.dot_general(
    x8,
    sharding.gathered(weight8),
    dimensions,
    preferred_element_type=jnp.float32,
  )
  scale = x_scale * weight_scale.reshape((1,) * (x.ndim - 1) + (-1,))
  return (product * scale).astype(preferred_element_type or x.dtype)


def has_units(device: Any) -> bool:
  """Returns whether a device has matrix units for 8-bit floats.

  TPUs up to v6e have none, and CPUs emulate them.
  """
  capability = str(getattr(device, 'compute_capability', ''))
  if device.platform not in ('gpu', 'cuda') or not capability:
    return False
  return tuple(int(n) for n in capability.split('.')) >= CAPABILITY
