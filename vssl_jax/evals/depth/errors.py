"""Errors of predicted depth over pixels with a measured depth.

The truth is in metres, 0 where nothing was measured. Figures are means over the
valid pixels of a whole set, so they do not depend on the batches. Formulas of
AbsRel and delta_1: google-research/kauldron,
`contrib/metrics/depth_estimation.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

EPS = 1e-6
WITHIN = 1.25  # of delta_1


class Sums(NamedTuple):
  """Sums over the valid pixels of each row; rows may be in any order.

  Attributes:
    relative: sum of |p - g| / g.
    within: number of pixels whose ratio to the truth is under 1.25.
    squared: sum of (p - g)^2.
    pixels: number of valid pixels.
  """

  relative: Float[Array | np.ndarray, 'R *H']
  within: Float[Array | np.ndarray, 'R *H']
  squared: Float[Array | np.ndarray, 'R *H']
  pixels: Float[Array | np.ndarray, 'R *H']


def mse(
  predicted: Float[Array, 'R T H W'],
  truth: Float[Array, 'R T H W'],
  weight: Float[Array, 'R'],
) -> Float[Array, '']:
  """Returns the mean squared error over valid pixels of weighted rows."""
  return _mean(jnp.square(predicted - truth), truth, weight)


def l1(
  predicted: Float[Array, 'R T H W'],
  truth: Float[Array, 'R T H W'],
  weight: Float[Array, 'R'],
) -> Float[Array, '']:
  """Returns the mean absolute error over valid pixels of weighted rows."""
  return _mean(jnp.abs(predicted - truth), truth, weight)


def _mean(error: Array, truth: Array, weight: Array) -> Array:
  counts = (truth > 0) * weight[:, None, None, None]
  return jnp.sum(error * counts) / jnp.maximum(jnp.sum(counts), EPS)


@jax.jit
def sums(
  predicted: Float[Array, 'R T H W'], truth: Float[Array, 'R T H W']
) -> Sums:
  """Returns the error sums of each row.

  Args:
    predicted: metres.
    truth: metres, 0 where unknown.
  """
  valid = truth > 0
  sum_pixels = lambda x: jnp.sum(jnp.where(valid, x, 0.0), axis=(1, 2, 3))
  relative = jnp.abs(predicted - truth) / (truth + EPS)
  p = jnp.maximum(predicted, 0.0)
  ratio = jnp.maximum(p, truth) / (jnp.minimum(p, truth) + EPS)
  return Sums(
    sum_pixels(relative),
    sum_pixels((ratio < WITHIN).astype(jnp.float32)),
    sum_pixels(jnp.square(predicted - truth)),
    jnp.sum(valid, axis=(1, 2, 3)).astype(jnp.float32),
  )


@jax.jit
def align(
  predicted: Float[Array, 'R T H W'], truth: Float[Array, 'R T H W']
) -> Float[Array, 'R T H W']:
  """Scales each predicted clip to the median true depth of its valid pixels."""
  p, g = (
    jnp.nanmedian(jnp.where(truth > 0, x, jnp.nan).reshape(len(x), -1), axis=1)
    for x in (predicted, truth)
  )
  # A clip with a median prediction of 0 or below cannot be scaled.
  factor = jnp.where(p > EPS, g / jnp.maximum(p, EPS), 1.0)
  return predicted * factor[:, None, None, None]


class Total:
  """Sums of all rows so far, in float64 on the host, per head."""

  def __init__(self) -> None:
    self._sums: np.ndarray | float = 0.0

  def add(self, found: Sums, weight: Float[np.ndarray, 'R']) -> None:
    """Adds rows; those of weight 0 are padding.

    Args:
      found: sums of rows, or of rows and heads.
      weight: weight of each row.
    """
    columns = np.stack([np.asarray(x, np.float64) for x in found])
    # Selected, not multiplied by 0: errors of a diverged head are infinite.
    keep = weight > 0
    self._sums = self._sums + columns[:, keep].sum(axis=1)

  def figures(self) -> dict[str, Float[np.ndarray, '*H']]:
    """Returns AbsRel, delta_1, RMSE (metres) and the number of pixels.

    Raises:
      ValueError: no pixel was valid.
    """
    if not np.any(self._sums) or not self._sums[3].any():
      raise ValueError(
        'no test pixel has a depth; check data.depth_units (units per metre) '
        'and data.depth_range (metres)'
      )
    relative, within, squared, pixels = self._sums
    figures = {
      'abs_rel': relative / pixels,
      'delta_1': within / pixels,
      'rmse': np.sqrt(squared / pixels),
      'pixels': pixels,
    }
    return {name: np.asarray(value) for name, value in figures.items()}
