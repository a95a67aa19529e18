"""Which batch a step takes, when some were left out.

The batches of a run are numbered from 0 by its seed. Step s (counted from 0)
takes the s-th of those that are not left out: a pure function of (seed, s,
what is left out), as every start of the run must agree on.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vssl_jax.data import pipeline

# (first, one past the last) number of batches left out; sorted and apart.
Ranges = Sequence[tuple[int, int]]


def from_json(ranges: Any) -> Ranges:
  """Returns ranges as JSON reads them back, as tuples."""
  return tuple((a, b) for a, b in ranges)


def batch_of(step: int, left_out: Ranges) -> int:
  """Returns the number of the batch that a step takes, both from 0."""
  for first, stop in left_out:
    if step < first:
      break
    step += stop - first
  return step


def leave_out(left_out: Ranges, step: int, count: int) -> Ranges:
  """Returns the ranges with the batches of some more steps left out.

  Args:
    left_out: ranges so far.
    step: first step, from 0, whose batch is not to be taken.
    count: how many batches, of those that were not left out before.
  """
  if not count:
    return tuple(left_out)
  first = batch_of(step, left_out)
  stop = batch_of(step + count - 1, left_out) + 1
  out: list[tuple[int, int]] = []
  for a, b in sorted([*left_out, (first, stop)]):
    if out and a <= out[-1][1]:
      out[-1] = (out[-1][0], max(b, out[-1][1]))
    else:
      out.append((a, b))
  return tuple(out)


def passed(left_out: Ranges, step: int) -> Ranges:
  """Returns the ranges that the first `step` steps have passed by.

  Two runs whose ranges agree on these took the same batches so far.
  """
  last = batch_of(step - 1, left_out) if step else -1
  return tuple((a, b) for a, b in left_out if a < last)


def iterator(
  clips: pipeline.Clips, left_out: Ranges, step: int
) -> Iterator[dict[str, np.ndarray]]:
  """Yields the local batches of steps `step`, `step` + 1, ..."""
  while True:
    first = batch_of(step, left_out)
    ahead = [a - first for a, _ in left_out if a > first]
    batches = clips.iterator(first)
    try:
      for batch in itertools.islice(batches, min(ahead, default=None)):
        yield batch
        step += 1
    finally:
      batches.close()
