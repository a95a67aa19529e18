"""Which videos are kept from training, to choose by."""

import numpy as np
from jaxtyping import Bool, Int


def held_out(
  index: Int[np.ndarray, 'n'], fraction: float
) -> Bool[np.ndarray, 'n']:
  """Returns which videos are kept from training, by their numbers alone."""
  # The finaliser of splitmix64: neighbours in a list sorted by class, or by
  # anything else, fall apart.
  x = np.asarray(index).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
  for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
    x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
  x ^= x >> np.uint64(31)
  return x.astype(np.float64) / 2**64 < fraction


def numbers(
  count: int, fraction: float, *, held: bool = False
) -> Int[np.ndarray, 'n']:
  """Returns the numbers of the videos to train on, or of those held out.

  Args:
    count: videos in all.
    fraction: that is held out; 0 for none.
    held: return those that are.

  Raises:
    ValueError: that leaves nothing.
  """
  every = np.arange(count)
  found = every[held_out(every, fraction) == held]
  if not len(found):
    raise ValueError(
      f'data.holdout: found {fraction} of {count} videos, which leaves none to '
      f'{"choose by" if held else "train on"}'
    )
  return found
