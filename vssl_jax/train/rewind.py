"""Rewinds a run to before a harmful step and leaves out its batches.

The run continues from the newest complete checkpoint before that step. Later
checkpoints are moved to `<workdir>/rewound/`, and `run.json` records the
batches that are left out. The move comes first: if the process is killed
between the two, the run is in an earlier state, and the same command completes
the rewind.
"""

import dataclasses
import pathlib

import jax

from vssl_jax.checkpoint import batch_order, integrity
from vssl_jax.train import run as run_lib
from vssl_jax.train import step_records
from vssl_jax.train.run import Run, TrainingError
from vssl_jax.utils import metrics


@dataclasses.dataclass(frozen=True)
class Rewind:
  """A request to rewind, from `--rewind` and `--skip`.

  Attributes:
    step: first harmful step, numbered as in the log: from 1.
    skip: number of batches to leave out, from that step on; 0 for none.
  """

  step: int
  skip: int = 1

  def __post_init__(self) -> None:
    if self.step < 2 or self.skip < 0:
      raise ValueError(
        f'--rewind={self.step} --skip={self.skip}: wanted a step of the log '
        'from 2 on, and 0 or more batches'
      )


def rewind(run: Run, asked: Rewind) -> integrity.Saved:
  """Rewinds a run and returns the checkpoint to continue from.

  A request that an earlier start carried out is not repeated, so that a
  scheduler may restart the command.

  Args:
    run: the opened run, with `left_out` and `rewinds` from its `run.json`.
    asked: the request.

  Raises:
    TrainingError: the run has not reached that step, or no checkpoint from
      before it is kept.
  """
  newest = run.checkpoints.newest()
  request = dataclasses.asdict(asked)
  if run.rewinds and request.items() <= run.rewinds[-1].items() and newest:
    run.logger.log(
      f'the rewind to before step {asked.step} was done at an earlier start'
    )
    return newest
  total = run_lib.spans(run.phases)[-1].total
  logged = metrics.last_step(run.workdir, total)
  reached = max(logged, newest.step if newest else 0)
  if asked.step > reached:
    raise TrainingError(
      f'--rewind={asked.step}: {run.workdir} has only reached step {reached}'
    )
  saved = run.checkpoints.newest(asked.step - 1)
  if saved is None:
    steps = [s.step for s in run.checkpoints.whole()]
    raise TrainingError(
      f'--rewind={asked.step}: no intact checkpoint from before step '
      f'{asked.step} is stored under {run.checkpoints.folder}, only those of '
      f'steps {steps}; rewind to after one of them, or start again in another '
      '--config.workdir (checkpoint.keep and checkpoint.keep_every keep more)'
    )
  left_out = batch_order.leave_out(run.left_out, asked.step - 1, asked.skip)
  folder = (
    run.workdir / 'rewound' / f'{len(run.rewinds) + 1}-from-{reached:08d}'
  )
  moved = run.checkpoints.move_later(saved.step, folder)
  _move_step_records(run, saved.step, folder)
  note = {'to': saved.step, 'from': reached}
  run.left_out, run.rewinds = left_out, [*run.rewinds, request | note]
  run_lib.write_record(run)
  details = run.rewinds[-1] | {'left_out': left_out}
  run.logger.write(saved.step, {}, event='rewound', rewind=details)
  run.logger.log(_describe(asked, saved, moved, folder))
  return saved


def _move_step_records(run: Run, step: int, place: pathlib.Path) -> None:
  """Moves the records of later steps, which will use other batches."""
  if jax.process_index() == 0:
    for path in step_records.paths(run.workdir):
      if int(path.stem) > step:
        (place / 'step_records').mkdir(parents=True, exist_ok=True)
        path.rename(place / 'step_records' / path.name)


def _describe(
  asked: Rewind,
  saved: integrity.Saved,
  moved: list[str],
  place: pathlib.Path,
) -> str:
  """Describes a completed rewind in one or two lines."""
  last = asked.step + asked.skip - 1
  batches = {
    0: 'the same batches are repeated',
    1: f'the batch of step {asked.step} is left out',
  }.get(asked.skip, f'the batches of steps {asked.step} to {last} are left out')
  aside = (
    f'\nset aside in {place}, to be deleted by hand: {", ".join(moved)}'
    if moved
    else ''
  )
  return f'rewound to step {saved.step}; {batches}{aside}'
