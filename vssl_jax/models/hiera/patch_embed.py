"""Input of Hiera's convolution for some mask units of a clip.

The kernel is larger than the stride, so the tokens of a unit depend on pixels
of neighbouring units. Pixels of hidden neighbours are set to zero. The released
code (arXiv 2306.00989) runs the convolution over the whole clip and discards
most of the result; a window around each visible unit gives the same numbers.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vssl_jax.masks import tubelets


def without_hidden(
  x: Float[Array, 'B T H W C'],
  units: Int[Array, 'B K'],
  unit_grid: tubelets.Grid,
) -> Float[Array, 'B T H W C']:
  """Returns a clip with zeros in all units other than `units`."""
  batch, t, h, w = x.shape[0], *unit_grid
  visible = jnp.zeros((batch, t * h * w), bool)
  visible = jax.vmap(lambda row, index: row.at[index].set(True))(visible, units)
  cut = (t, x.shape[1] // t, h, x.shape[2] // h, w, x.shape[3] // w)
  x = jnp.where(
    visible.reshape(batch, t, 1, h, 1, w, 1, 1),
    x.reshape(batch, *cut, x.shape[4]),
    0.0,
  )
  return x.reshape(batch, cut[0] * cut[1], cut[2] * cut[3], cut[4] * cut[5], -1)


def around(
  x: Float[Array, 'B T H W C'],
  units: Int[Array, 'B K'],
  unit_grid: tubelets.Grid,
  overlap: tubelets.Grid,
  padding: tubelets.Grid,
) -> Float[Array, 'BK t h w C']:
  """Returns the input window of the convolution for each unit.

  Args:
    x: a clip.
    units: indices of the units.
    unit_grid: units of the clip along (time, height, width).
    overlap: frames and pixels by which the kernel is larger than the stride.
    padding: zeros around the clip.

  Returns:
    The windows of all examples along the batch axis. A convolution without
    padding maps each window to the tokens of its unit.
  """
  unit = [n // cells for n, cells in zip(x.shape[1:4], unit_grid, strict=True)]
  size = [n + extra for n, extra in zip(unit, overlap, strict=True)]
  x = jnp.pad(x, ((0, 0), *((n, n) for n in padding), (0, 0)))

  def window(clip: Array, index: Array) -> Array:
    position = jnp.unravel_index(index, unit_grid)
    start = [i * n for i, n in zip(position, unit, strict=True)]
    return jax.lax.dynamic_slice(clip, (*start, 0), (*size, clip.shape[-1]))

  windows_of_clip = jax.vmap(window, in_axes=(None, 0))
  windows = jax.vmap(windows_of_clip)(x, units)
  return windows.reshape(-1, *windows.shape[2:])
