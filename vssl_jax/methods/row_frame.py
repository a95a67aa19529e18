"""Rows in the frame of the whole picture, not of the crop."""

import jax.numpy as jnp


def _cells(crop, flip, size):
  """Returns which cell of the picture lies under each cell of the crop."""
  h, w = size
  y = (jnp.arange(h) + 0.5) / h
  x = (jnp.arange(w) + 0.5) / w
  x = jnp.where(flip[:, None], 1 - x, x)
  top, left, bottom, right = (crop[:, i, None] for i in range(4))
  y = top + (bottom - top) * y
  x = left + (right - left) * x
  row = jnp.clip((y * h).astype(jnp.int32), 0, h - 1)
  column = jnp.clip((x * w).astype(jnp.int32), 0, w - 1)
  return (row[:, :, None] * w + column[:, None, :]).reshape(len(crop), -1)


def read(rows, crop, flip, size):
  """Returns the picture's cells under each cell of the crop."""
  index = _cells(crop, flip, size)[:, None]
  return jnp.take_along_axis(
    rows, jnp.broadcast_to(index, (*rows.shape[:2], index.shape[2])), 2
  )


def write(rows, values, written, crop, flip, size):
  """Returns rows with the mean of what falls on each cell."""
  index = _cells(crop, flip, size)
  one = (index[:, :, None] == jnp.arange(rows.shape[2])).astype(jnp.float32)
  count = jnp.einsum('btc,bcn->btn', written.astype(jnp.float32), one)
  total = jnp.einsum('btc,bcn->btn', jnp.where(written, values, 0.0), one)
  return jnp.where(count > 0, total / jnp.maximum(count, 1), rows)
