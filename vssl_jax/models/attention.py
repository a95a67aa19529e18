"""Full attention over tokens."""

import jax
from jaxtyping import Array, Float


def attend(
  q: Float[Array, 'B N H d'],
  k: Float[Array, 'B S H d'],
  v: Float[Array, 'B S H d'],
  implementation: str = 'auto',
) -> Float[Array, 'B N H d']:
  """Returns softmax(q k^T / sqrt(d)) v, with the softmax in float32."""
  del implementation
  return jax.nn.dot_product_attention(q, k, v, implementation='xla')
