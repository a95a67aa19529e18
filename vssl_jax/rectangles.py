"""Rectangles of one size dropped at random on a frame of tokens.

Their sizes may be traced: one compiled function serves every aspect drawn.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, Key


def size(
  aspect: Float[Array, ''], frame: tuple[int, int], scale: float
) -> tuple[Int32[Array, ''], Int32[Array, '']]:
  """Returns a rectangle's height and width in tokens.

  Args:
    aspect: height / width.
    frame: (h, w) of the grid; a rectangle is cut to it.
    scale: area of the rectangle, as a fraction of the frame.
  """
  h, w = frame
  area = int(h * w * scale)
  height = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
  width = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
  return jnp.clip(height, 1, h), jnp.clip(width, 1, w)


def union(
  key: Key[Array, ''],
  frame: tuple[int, int],
  count: int,
  height: Int32[Array, ''],
  width: Int32[Array, ''],
) -> Bool[Array, 'h w']:
  """Returns what `count` rectangles cover, each wholly inside the frame."""
  h, w = frame
  of_top, of_left = jax.random.split(key)
  top = jax.random.randint(of_top, (count, 1), 0, h - height + 1)
  left = jax.random.randint(of_left, (count, 1), 0, w - width + 1)
  y, x = jnp.arange(h)[None], jnp.arange(w)[None]
  rows = (y >= top) & (y < top + height)
  columns = (x >= left) & (x < left + width)
  return jnp.any(rows[:, :, None] & columns[:, None, :], axis=0)
