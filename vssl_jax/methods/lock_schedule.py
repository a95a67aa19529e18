"""Lock schedules of LayerLock: construction and parsing.

A schedule is a tuple of (lock depth, steps), one entry per phase. In a phase of
`steps` steps, the first `lock depth` blocks are frozen.
"""

import ast

import numpy as np

Schedule = tuple[tuple[int, int], ...]


def lock_schedule(
  total: int,
  depth: int,
  *,
  start: float | int = 1 / 3,
  interval: float | int = 0.0,
  jump: int = 1,
  last: float | int = 2 / 3,
  limit: int | None = None,
) -> Schedule:
  """Returns the schedule of a run.

  Args:
    total: steps of the run.
    depth: blocks of the network.
    start: steps before the first lock; below 1 a fraction of `total`.
    interval: steps between locks; below 1 a fraction of `total`, 0 to divide
      the steps after `start` evenly.
    jump: layers per lock.
    last: layers locked at the end; below 1 a fraction of `depth`.
    limit: the largest number of layers that can be locked; a fraction `last` is
      capped there, a number of layers above it is an error.

  Returns:
    (0, steps before the first lock), then (lock depth, steps) of each lock.

  Source: LayerLock, arXiv 2509.10156: 160k of 480k steps, then a layer every
  10k until 32 of 48 are locked.

  Raises:
    ValueError: no steps are left for a lock, or `last` exceeds the limit.
  """
  limit = depth if limit is None else limit
  if last > limit:
    raise ValueError(
      f'method.last: locks {last:g} layers; at most {limit} of the {depth} can '
      'be locked, as the blocks that decode are never frozen'
    )
  locked = min(int(depth * last + 1e-9), limit) if last < 1 else round(last)
  count = locked // jump
  first_lock = round(total * start) if start < 1 else round(start)
  remaining = total - first_lock
  if interval:
    every = max(round(total * interval if interval < 1 else interval), 1)
    count = min(count, -(-remaining // every))
    edges = [first_lock + i * every for i in range(count)] + [total]
  else:
    edges = [
      first_lock + round(i * remaining / max(count, 1))
      for i in range(count + 1)
    ]
  if (
    first_lock < 1 or remaining < 1 or count < 1 or len(set(edges)) < len(edges)
  ):
    raise ValueError(
      f'schedule: {total} steps, {first_lock} of them before the first lock, '
      f'leave no step for each of {count} locks; give more steps, or fewer '
      'locks'
    )
  steps = np.diff(edges)
  return (
    (0, first_lock),
    *((jump * (i + 1), int(n)) for i, n in enumerate(steps)),
  )


def parse(text: str) -> Schedule:
  """Parses a schedule such as `((0, 600), (1, 200))`.

  Raises:
    ValueError: the text is not a valid schedule.
  """
  try:
    pairs = ast.literal_eval(text)
    schedule = tuple((k, n) for k, n in pairs)
    if not all(type(x) is int for pair in schedule for x in pair):
      raise TypeError('wanted whole numbers')
  except (ValueError, SyntaxError, TypeError) as error:
    raise ValueError(
      f'method.schedule: found {text!r}, wanted (lock depth, steps) of each '
      "phase, such as '((0, 600), (1, 200))', or ''"
    ) from error
  if not schedule or any(n < 1 or k < 0 for k, n in schedule):
    raise ValueError(
      f'method.schedule: found {text!r}, wanted at least one phase, and at '
      'least one step in each'
    )
  depths = [k for k, _ in schedule]
  if depths != sorted(set(depths)):
    raise ValueError(
      f'method.schedule: found lock depths {depths}, wanted them to rise'
    )
  return schedule


def check(schedule: Schedule, total: int, limit: int) -> Schedule:
  """Checks a schedule against the run and the network, and returns it.

  Args:
    schedule: the schedule.
    total: steps of the run.
    limit: the largest number of layers that can be locked.

  Raises:
    ValueError: the steps do not sum to `total`, or too many layers are locked.
  """
  steps = sum(n for _, n in schedule)
  if steps != total:
    raise ValueError(
      f'method.schedule: its phases have {steps} steps in total and '
      f'method.total is {total}; make them equal'
    )
  deepest = max(k for k, _ in schedule)
  if deepest > limit:
    raise ValueError(
      f'method.schedule: locks {deepest} layers; at most {limit} can be '
      'locked, as the blocks that decode are never frozen'
    )
  return schedule
