"""Going back to before a step that did harm, past the batches that did it.

The run goes on from the newest whole checkpoint before that step. Later
checkpoints are moved to `<workdir>/rewound/`, and `run.json` keeps which
batches are left out from then on. The move comes first: killed between the
two, the run is an older one of itself and the same command does the rest.
"""

import dataclasses
import pathlib

import jax

from vssl_jax.train import manifests, metrics, order, probes
from vssl_jax.train import run as run_lib
from vssl_jax.train.run import Run, TrainingError


@dataclasses.dataclass(frozen=True)
class Rewind:
  """What was asked for.

  Attributes:
    step: first step that did harm, numbered as in the log: from 1.
    skip: batches to leave out, from that step's on; 0 for none.
  """

  step: int
  skip: int = 1

  def __post_init__(self) -> None:
    if self.step < 2 or self.skip < 0:
      raise ValueError(
        f'--rewind={self.step} --skip={self.skip}: wanted a step of the log '
        'from 2 on, and 0 or more batches'
      )


def rewind(run: Run, asked: Rewind) -> manifests.Saved:
  """Takes a run back and returns the checkpoint that it goes on from.

  A command that was carried out at an earlier start is not carried out again,
  so that a scheduler may restart it.

  Args:
    run: opened, with what its `run.json` says of batches left out.
    asked: where to and what to leave out.

  Raises:
    TrainingError: the run never took that step, or nothing from before it is
      kept.
  """
  newest = run.checkpoints.newest()
  wanted = dataclasses.asdict(asked)
  if run.rewinds and wanted.items() <= run.rewinds[-1].items() and newest:
    run.logger.say(
      f'the rewind to before step {asked.step} was done at an earlier start'
    )
    return newest
  total = run_lib.spans(run.method)[-1].total
  logged = metrics.last_step(run.workdir, total)
  came_to = max(logged, newest.step if newest else 0)
  if asked.step > came_to:
    raise TrainingError(
      f'--rewind={asked.step}: {run.workdir} has come to step {came_to} only'
    )
  saved = run.checkpoints.newest(asked.step - 1)
  if saved is None:
    kept = [s.step for s in run.checkpoints.whole()]
    raise TrainingError(
      f'--rewind={asked.step}: no whole checkpoint from before step '
      f'{asked.step} is kept under {run.checkpoints.folder}, only those of '
      f'steps {kept}; rewind to after one of them, or start anew in another '
      '--config.workdir (checkpoint.keep and checkpoint.keep_every keep more)'
    )
  left_out = order.leave_out(run.left_out, asked.step - 1, asked.skip)
  place = run.workdir / 'rewound' / f'{len(run.rewinds) + 1}-from-{came_to:08d}'
  moved = run.checkpoints.move_later(saved.step, place)
  _move_probes(run, saved.step, place)
  note = {'to': saved.step, 'from': came_to}
  run.left_out, run.rewinds = left_out, [*run.rewinds, wanted | note]
  run_lib.write_record(run)
  done = run.rewinds[-1] | {'left_out': left_out}
  run.logger.write(saved.step, {}, event='rewound', rewind=done)
  run.logger.say(_describe(asked, saved, moved, place))
  return saved


def _move_probes(run: Run, step: int, place: pathlib.Path) -> None:
  """Moves what was recorded of later steps: they will take other batches."""
  if jax.process_index() == 0:
    for path in probes.paths(run.workdir):
      if int(path.stem) > step:
        (place / 'probes').mkdir(parents=True, exist_ok=True)
        path.rename(place / 'probes' / path.name)


def _describe(
  asked: Rewind,
  saved: manifests.Saved,
  moved: list[str],
  place: pathlib.Path,
) -> str:
  """Returns what was done, in one or two lines."""
  last = asked.step + asked.skip - 1
  batches = {
    0: 'the same batches come again',
    1: f'the batch of step {asked.step} is left out',
  }.get(asked.skip, f'the batches of steps {asked.step} to {last} are left out')
  aside = (
    f'\nset aside in {place}, to be deleted by hand: {", ".join(moved)}'
    if moved
    else ''
  )
  return f'rewound to step {saved.step}; {batches}{aside}'
