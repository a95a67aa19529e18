"""When layers lock: the schedule of LayerLock, written out and proposed.

A schedule is a tuple of (lock depth, steps), one entry per phase: for so many
steps the first so many blocks are frozen.
"""

import ast
from collections.abc import Mapping, Sequence

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
      what follows `start` evenly.
    jump: layers per lock.
    last: layers locked in the end; below 1 a fraction of `depth`.
    limit: the most that may be locked; a fraction ends there, a number of
      layers beyond it is an error.

  Returns:
    (0, steps before the first lock), then (lock depth, steps) of each lock.

  Source: LayerLock, arXiv 2509.10156: 160k of 480k steps, then a layer every
  10k until 32 of 48 are locked.

  Raises:
    ValueError: no steps are left for a lock, or `last` is over the limit.
  """
  limit = depth if limit is None else limit
  if last > limit:
    raise ValueError(
      f'method.last: locks {last:g} layers; at most {limit} of the {depth} can '
      'be locked, as the blocks that decode are never frozen'
    )
  locked = min(int(depth * last + 1e-9), limit) if last < 1 else round(last)
  count = locked // jump
  before = round(total * start) if start < 1 else round(start)
  rest = total - before
  if interval:
    every = max(round(total * interval if interval < 1 else interval), 1)
    count = min(count, -(-rest // every))
    edges = [before + i * every for i in range(count)] + [total]
  else:
    edges = [before + round(i * rest / max(count, 1)) for i in range(count + 1)]
  if before < 1 or rest < 1 or count < 1 or len(set(edges)) < len(edges):
    raise ValueError(
      f'schedule: {total} steps, {before} of them before the first lock, leave '
      f'no step for each of {count} locks; give more steps, or fewer locks'
    )
  steps = np.diff(edges)
  return (
    (0, before),
    *((jump * (i + 1), int(n)) for i, n in enumerate(steps)),
  )


def parse(text: str) -> Schedule:
  """Returns a schedule that was written out, `((0, 600), (1, 200))`.

  Raises:
    ValueError: it is none.
  """
  try:
    found = ast.literal_eval(text)
    schedule = tuple((k, n) for k, n in found)
    if not all(type(x) is int for pair in schedule for x in pair):
      raise TypeError('wanted whole numbers')
  except (ValueError, SyntaxError, TypeError) as error:
    raise ValueError(
      f'method.schedule: found {text!r}, wanted (lock depth, steps) of each '
      "phase, such as '((0, 600), (1, 200))', or '' or 'auto'"
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
  """Returns a schedule that fits the run and the network.

  Raises:
    ValueError: its steps do not sum to `total`, or it locks too much.
  """
  steps = sum(n for _, n in schedule)
  if steps != total:
    raise ValueError(
      f'method.schedule: its phases have {steps} steps in all and method.total '
      f'is {total}; make them equal'
    )
  deepest = max(k for k, _ in schedule)
  if deepest > limit:
    raise ValueError(
      f'method.schedule: locks {deepest} layers; at most {limit} can be '
      'locked, as the blocks that decode are never frozen'
    )
  return schedule


def suggest(
  drift: Sequence[Mapping[int, float]],
  steps: Sequence[int],
  total: int,
  *,
  limit: int,
  settled: float = 0.5,
) -> Schedule:
  """Proposes a schedule from how fast the blocks of a short run moved.

  A block counts as settled at the first look from which on its drift (relative
  change of its weights between two looks) stays below `settled` times its own
  largest drift. The times at which the blocks settle are fitted by a
  line over the depth; the first lock is where the line meets block 1, the
  interval its slope, both scaled from the short run to the whole. What the
  paper leaves to the eye of the user ("when the norms of the first layers
  plateau") is decided here; the rule is ours.

  Args:
    drift: at each look, block -> relative change since the look before.
    steps: step of each look, of a short run of steps[-1] steps at a constant
      learning rate; at equal distances.
    total: steps of the whole run.
    limit: the most layers that may be locked.
    settled: fraction of the largest drift.

  Raises:
    ValueError: fewer than three looks.
  """
  if len(drift) < 3:
    raise ValueError(
      f'suggest: found {len(drift)} looks at the drift, wanted at least 3; run '
      'longer, or set health.every lower'
    )
  blocks = sorted(set(drift[0]))[:limit]
  scale = total / steps[-1]
  times = []
  for block in blocks:
    moves = np.asarray([look[block] for look in drift])
    above = np.flatnonzero(moves >= settled * moves.max())
    times.append(scale * steps[min(int(above[-1]) + 1, len(steps) - 1)])
  slope, first = (
    np.polyfit(np.arange(len(times)), times, 1) if len(times) > 1 else (0, 0)
  )
  first = min(max(float(first), 0.1 * total), 0.8 * total)
  # Blocks that settle together are locked over what the paper's share of the
  # run would be; a line that falls with depth says nothing about an interval.
  least = 0.1 * total / max(len(blocks), 1)
  interval = max(float(slope), least)
  return lock_schedule(
    total,
    len(blocks),
    start=max(round(first), 1),
    interval=max(round(interval), 1),
    last=max(len(blocks), 1),
    limit=limit,
  )
