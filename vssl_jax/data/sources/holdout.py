"""Holds out a fraction of the training videos for model selection."""

import numpy as np
from jaxtyping import Bool, Int


def held_out(
  index: Int[np.ndarray, 'n'], fraction: float
) -> Bool[np.ndarray, 'n']:
  """Returns which videos are held out, as a function of their indices.

  Args:
    index: int [n], indices of videos.
    fraction: fraction of the videos to hold out.

  Returns:
    bool [n].
  """
  # The finaliser of splitmix64: neighbours in a list, which may be sorted by
  # class, are held out independently.
  x = np.asarray(index).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
  for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
    x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
  x ^= x >> np.uint64(31)
  return x.astype(np.float64) / 2**64 < fraction


def numbers(
  count: int, fraction: float, *, held: bool = False
) -> Int[np.ndarray, 'n']:
  """Returns the indices of the training videos, or of the held-out videos.

  Args:
    count: number of all videos.
    fraction: fraction of the videos to hold out; 0 for none.
    held: whether to return the held-out videos.

  Returns:
    int [n], increasing.

  Raises:
    ValueError: there are no such videos.
  """
  indices = np.arange(count)
  selected = indices[held_out(indices, fraction) == held]
  if not len(selected):
    raise ValueError(
      f'data.holdout: found {fraction} of {count} videos, which leaves none to '
      f'{"choose by" if held else "train on"}'
    )
  return selected
