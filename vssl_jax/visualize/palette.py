"""Features of a clip as colours, with one PCA basis for the whole clip.

A basis per frame would change from frame to frame, so that the colours would
flicker where the features do not change.
"""

import numpy as np
from jaxtyping import Float, UInt8

# Percentiles of each component that map to no colour and full colour.
RANGE = (1, 99)


def of_tokens(
  tokens: Float[np.ndarray, 'N D'],
) -> UInt8[np.ndarray, 'N 3']:
  """Returns a colour per token of one clip.

  The first three principal components over all tokens of the clip are red,
  green and blue, each scaled once for the clip. Features that do not vary are
  grey.
  """
  x = tokens.astype(np.float64)
  x = x - x.mean(0)
  _, sizes, basis = np.linalg.svd(x, full_matrices=False)
  basis = basis[:3]
  # A component's sign is arbitrary: the largest loading is positive.
  largest = np.abs(basis).argmax(1)
  basis = basis * np.sign(basis[np.arange(len(basis)), largest])[:, None]
  x = x @ basis.T
  low, high = np.percentile(x, RANGE, axis=0)
  varies = sizes[:3] > 1e-9 * max(sizes[0], 1e-9)
  varies &= (high - low) > 1e-12
  scale = np.where(varies, high - low, 1.0)
  unit = np.where(varies, (x - low) / scale, 0.5)
  out = np.full((len(tokens), 3), 128, np.uint8)
  out[:, : unit.shape[1]] = (unit.clip(0, 1) * 255).round()
  return out


def of_clip(
  tokens: Float[np.ndarray, 'N D'],
  grid: tuple[int, int, int],
  patch: tuple[int, int, int],
) -> UInt8[np.ndarray, 'T H W 3']:
  """Returns the colours as a clip with the size of the encoded clip.

  Args:
    tokens: tokens of one clip, in raster order of the grid.
    grid: (t, h, w).
    patch: frames, rows and columns of a token.
  """
  x = of_tokens(tokens).reshape(*grid, 3)
  for axis, repeats in enumerate(patch):
    x = x.repeat(repeats, axis)
  return x
