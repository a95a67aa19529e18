"""Draws depth as colours, next to the input frames."""

import pathlib

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8

from vssl_jax.utils import image_grid

UNKNOWN = 128  # grey of pixels without a measurement
RANGE = (2, 98)  # percentiles of the truth at both ends of the colour map


def ends(truth: Float[np.ndarray, 'T H W']) -> tuple[float, float]:
  """Returns the depths in metres at both ends of the colour map."""
  valid = truth[truth > 0]
  if not valid.size:
    return 0.0, 1.0
  low, high = np.percentile(valid, RANGE)
  return float(low), float(max(high, low + 1e-3))


def colours(
  depth: Float[np.ndarray, 'T H W'],
  low: float,
  high: float,
  known: np.ndarray | None = None,
) -> UInt8[np.ndarray, 'T H W 3']:
  """Returns depth as colours; near pixels are dark.

  Args:
    depth: metres.
    low: depth of the darkest colour, in metres; smaller depths are clipped.
    high: depth of the brightest colour, in metres; larger depths are clipped.
    known: mask of pixels that have a depth; the others are grey. None: all.
  """
  unit = ((depth - low) / (high - low)).clip(0, 1)
  rgb = matplotlib.colormaps['viridis'](unit, bytes=True)[..., :3]
  if known is not None:
    rgb = np.where(known[..., None], rgb, np.uint8(UNKNOWN))
  return rgb.astype(np.uint8)


def rows(
  video: UInt8[np.ndarray, 'T H W C'],
  truth: Float[np.ndarray, 'T H W'],
  predicted: Float[np.ndarray, 'T H W'],
) -> dict[str, list[UInt8[np.ndarray, 'H W 3']]]:
  """Returns the rows of a sheet: input, truth, prediction and error.

  Args:
    video: the clip.
    truth: metres, 0 where unknown.
    predicted: metres.
  """
  low, high = ends(truth)
  relative_error = np.abs(predicted - truth) / np.maximum(truth, 1e-6)
  known = truth > 0
  clips = {
    'input': image_grid.rgb(video),
    f'truth, {low:.2f} to {high:.2f} m': colours(truth, low, high, known),
    'prediction, same colours': colours(predicted, low, high),
    'error, 0 to 50 % of the truth': colours(relative_error, 0.0, 0.5, known),
  }
  return {
    label: list(image_grid.some(frames)) for label, frames in clips.items()
  }


def save(
  path: pathlib.Path,
  video: UInt8[np.ndarray, 'T H W C'],
  truth: Float[np.ndarray, 'T H W'],
  predicted: Float[np.ndarray, 'T H W'],
  caption: str,
) -> None:
  """Writes input, truth, prediction and error as one PNG."""
  path.parent.mkdir(parents=True, exist_ok=True)
  image_grid.save(path, rows(video, truth, predicted), caption)
