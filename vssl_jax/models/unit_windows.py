"""The pixels that Hiera's first convolution sees for some mask units only.

Its kernel is larger than its stride, so a unit's tokens see pixels of its
neighbours: those of hidden ones are set to zero, and the others count. The
released code (arXiv 2306.00989) runs the convolution over the whole clip and
throws most of it away; a window around each unit gives the same numbers.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vssl_jax.models import layers


def without_hidden(
  x: Float[Array, 'B T H W C'],
  units: Int[Array, 'B K'],
  unit_grid: layers.Grid,
) -> Float[Array, 'B T H W C']:
  """Returns a clip with zeros in the units that are not kept."""
  batch, t, h, w = x.shape[0], *unit_grid
  shown = jnp.zeros((batch, t * h * w), bool)
  shown = jax.vmap(lambda row, kept: row.at[kept].set(True))(shown, units)
  cut = (t, x.shape[1] // t, h, x.shape[2] // h, w, x.shape[3] // w)
  x = jnp.where(
    shown.reshape(batch, t, 1, h, 1, w, 1, 1),
    x.reshape(batch, *cut, x.shape[4]),
    0.0,
  )
  return x.reshape(batch, cut[0] * cut[1], cut[2] * cut[3], cut[4] * cut[5], -1)


def around(
  x: Float[Array, 'B T H W C'],
  units: Int[Array, 'B K'],
  unit_grid: layers.Grid,
  overlap: layers.Grid,
  padding: layers.Grid,
) -> Float[Array, 'BK t h w C']:
  """Returns what the convolution sees for each unit.

  Args:
    x: a clip.
    units: the units.
    unit_grid: units of the clip along (time, height, width).
    overlap: frames and pixels by which the kernel is larger than the stride.
    padding: zeros around the clip.

  Returns:
    The windows of all examples, one after another; a convolution without
    padding makes the tokens of one unit of each.
  """
  unit = [n // cells for n, cells in zip(x.shape[1:4], unit_grid, strict=True)]
  size = [n + more for n, more in zip(unit, overlap, strict=True)]
  x = jnp.pad(x, ((0, 0), *((n, n) for n in padding), (0, 0)))

  def window(clip: Array, index: Array) -> Array:
    where = jnp.unravel_index(index, unit_grid)
    start = [i * n for i, n in zip(where, unit, strict=True)]
    return jax.lax.dynamic_slice(clip, (*start, 0), (*size, clip.shape[-1]))

  of_clip = jax.vmap(window, in_axes=(None, 0))
  found = jax.vmap(of_clip)(x, units)
  return found.reshape(-1, *found.shape[2:])
