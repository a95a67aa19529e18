"""Proposes a lock schedule of LayerLock from a short run without locks.

    python -m vssl_jax.planning.suggest_locks \
      --config=configs/layerlock_single_gpu.py --config.data.source=...

The paper locks by visual inspection, "when the norms of the first layers
plateau". This command trains a few percent of the run's steps without locks, at
a constant learning rate after the warm-up, and measures every block at even
intervals. A block counts as settled from the first measurement after which its
change stays below half of its own largest change. A line is fitted to the
settling times over depth: the first lock is its value at block 1 and the
interval is its slope, both scaled from the short run to the whole run. The rule
is our choice. The change of a block is, by `--criterion`,

    norm        the relative change of the norm of its weights, as published
    movement    the norm of the change of its weights, relative to their norm
"""

import argparse
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from vssl_jax import config as config_lib
from vssl_jax.methods import layerlock_config, lock_schedule
from vssl_jax.train import loop
from vssl_jax.utils import config_io, distributed, flags, metrics

MEASUREMENTS = 20  # of every block in the short run
CRITERIA = ('norm', 'movement')
SETTLED = 0.5  # fraction of a block's largest change


def suggest(
  config: ml_collections.ConfigDict, steps: int, criterion: str = 'norm'
) -> tuple[int, lock_schedule.Schedule]:
  """Trains the short run and returns its exit status and a schedule.

  Args:
    config: a resolved config of LayerLock. The folder of the short run is
      `suggest` in its workdir; it is resumed like any run.
    steps: steps of the short run.
    criterion: one of `CRITERIA`.

  Raises:
    ValueError: the config is of another method, or the run is too short.
  """
  if config.job != 'train' or config.method.name != 'layerlock':
    raise ValueError(
      f'--config: found job {config.job!r} with method '
      f"{config.method.name!r}, wanted a pretraining with 'layerlock', whose "
      'schedule this command proposes'
    )
  short = config_io.from_json(config_io.to_json(config))
  total = config.method.total
  short.method.total, short.method.schedule = steps, f'((0, {steps}),)'
  short.workdir = str(pathlib.Path(config.workdir) / 'suggest')
  short.health.every = 1 / min(MEASUREMENTS, steps)
  short.checkpoint.every = max(steps // 2, 1)
  short.checkpoint.keep_phases = ('.*',)  # the short run has its own phases
  short.optim.schedule = 'constant'  # a decay would slow down every block
  if config.optim.warmup > 0:
    short.optim.warmup = max(round(config.optim.warmup * steps / total), 1)
  status = loop.train(short)
  if status:
    return status, ()
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('suggest')  # the log is complete
  measured, changes = read(
    pathlib.Path(short.workdir) / metrics.FILE, criterion
  )
  limit = layerlock_config.deepest_lock(config.method)
  return 0, propose(changes, measured, total, limit=limit)


def read(
  path: pathlib.Path, criterion: str
) -> tuple[list[int], list[dict[int, float]]]:
  """Returns the steps of the measurements, and block -> change of each.

  Args:
    path: `metrics.jsonl` of a run.
    criterion: one of `CRITERIA`.
  """
  changes: dict[int, dict[int, float]] = {}
  norms: dict[int, float] = {}
  for record in metrics.read(path):
    before, norms = norms, _blocks(record, 'norm/block_') or norms
    movement = _blocks(record, 'drift/block_')
    if not movement:  # nothing to compare with yet
      continue
    changes[record['step']] = movement
    if criterion == 'norm':
      changes[record['step']] = {
        block: abs(norms[block] - before[block]) / max(norms[block], 1e-30)
        for block in movement
      }
  # The first interval is shorter: the panel also measures early in a phase.
  steps = sorted(changes)[1:]
  return steps, [changes[step] for step in steps]


def _blocks(record: Mapping[str, Any], prefix: str) -> dict[int, float]:
  return {
    int(key.removeprefix(prefix)): value
    for key, value in record.items()
    if key.startswith(prefix)
  }


def propose(
  changes: Sequence[Mapping[int, float]],
  steps: Sequence[int],
  total: int,
  *,
  limit: int,
) -> lock_schedule.Schedule:
  """Proposes a schedule from the changes of the blocks in a short run.

  Args:
    changes: per measurement, block -> change since the previous measurement.
    steps: step of each measurement, equally spaced, of a short run of steps[-1]
      steps.
    total: steps of the whole run.
    limit: the largest number of layers that can be locked.

  Raises:
    ValueError: fewer than three measurements.
  """
  if len(changes) < 3:
    raise ValueError(
      f'suggest_locks: found {len(changes)} measurements of the blocks, wanted '
      'at least 3; raise --steps'
    )
  blocks = sorted(set(changes[0]))[:limit]
  scale = total / steps[-1]
  times = []
  for block in blocks:
    values = np.asarray([measurement[block] for measurement in changes])
    unsettled = np.flatnonzero(values >= SETTLED * values.max())
    times.append(scale * steps[min(int(unsettled[-1]) + 1, len(steps) - 1)])
  slope, first_lock = (
    np.polyfit(np.arange(len(times)), times, 1) if len(times) > 1 else (0, 0)
  )
  first_lock = min(max(float(first_lock), 0.1 * total), 0.8 * total)
  # Lower bound, for blocks that settle together or in reverse order: all locks
  # then take 0.1 of the run. A negative slope gives no interval.
  shortest = 0.1 * total / max(len(blocks), 1)
  interval = max(float(slope), shortest)
  return lock_schedule.lock_schedule(
    total,
    len(blocks),
    start=max(round(first_lock), 1),
    interval=max(round(interval), 1),
    last=max(len(blocks), 1),
    limit=limit,
  )


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
  """Returns the flags and the `--config.<key>=<value>` assignments."""
  parser = flags.parser(
    'python -m vssl_jax.planning.suggest_locks',
    'Proposes a lock schedule from a short run.',
    needs_page=True,
  )
  parser.add_argument(
    '--steps',
    type=int,
    default=0,
    help='steps of the short run; 0 for a twentieth of the run',
  )
  parser.add_argument(
    '--criterion', choices=CRITERIA, default='norm', help='when a block settles'
  )
  return flags.parse(parser, argv)


def run(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  args, assignments = parse(sys.argv[1:] if argv is None else argv)
  try:
    config = config_lib.resolve(
      args.config, assignments, tuple(args.config_root)
    )
    if args.steps < 0:
      raise ValueError(f'--steps: found {args.steps}, wanted 0 or more')
    steps = args.steps or max(round(0.05 * config.method.get('total', 1)), 1)
    status, schedule = suggest(config, steps, args.criterion)
  except loop.EXPECTED as error:
    distributed.print_error(error)
    return 1
  if not status and jax.process_index() == 0:
    print(f'by {args.criterion}: --config.method.schedule={str(schedule)!r}')
  return status


if __name__ == '__main__':
  sys.exit(run())
