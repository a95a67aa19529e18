"""Order of batches: maps steps to batches, of which some are left out.

The batches of a run are numbered from 0; the seed determines their order. Step
s (counted from 0) uses the s-th batch that is not left out. The batch is a pure
function of (seed, s, ranges left out), so that every start of a run uses the
same batches.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vssl_jax.data import pipeline

# Half-open ranges [first, stop) of batches left out; sorted, not adjacent.
Ranges = Sequence[tuple[int, int]]


def from_json(ranges: Any) -> Ranges:
  """Converts ranges loaded from JSON to tuples."""
  return tuple((a, b) for a, b in ranges)


def batch_of(step: int, left_out: Ranges) -> int:
  """Returns the number of the batch that a step uses, both from 0."""
  for first, stop in left_out:
    if step < first:
      break
    step += stop - first
  return step


def leave_out(left_out: Ranges, step: int, count: int) -> Ranges:
  """Returns the ranges with the batches of further steps left out.

  Args:
    left_out: ranges so far.
    step: first step, from 0, whose batch is left out.
    count: number of batches, without those already left out.
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
  """Returns the ranges that the first `step` steps have skipped.

  Two runs with the same result have used the same batches up to `step`.
  """
  last = batch_of(step - 1, left_out) if step else -1
  return tuple((a, b) for a, b in left_out if a < last)


def iterator(
  clips: pipeline.Clips, left_out: Ranges, step: int
) -> Iterator[dict[str, np.ndarray]]:
  """Yields the local batches of steps `step`, `step` + 1, ..."""
  while True:
    first = batch_of(step, left_out)
    distances = [a - first for a, _ in left_out if a > first]
    batches = clips.iterator(first)
    try:
      for batch in itertools.islice(batches, min(distances, default=None)):
        yield batch
        step += 1
    finally:
      batches.close()
