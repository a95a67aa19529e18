"""Replays a recorded train step and compares the results bit by bit.

It only reads files, so it also works during the run and on another machine.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections

from vssl_jax.checkpoint import batch_order, integrity, manager, provenance
from vssl_jax.train import batches as batches_lib
from vssl_jax.train import phase_setup, step_records
from vssl_jax.train import run as run_lib
from vssl_jax.train import train_step as train_step_lib
from vssl_jax.train.run import Run, TrainingError, spans
from vssl_jax.utils import config_io

# Part of a record -> likely cause if it is the first part that differs.
MEANING = {
  'before': 'the saved state is not the one that the step started from, or '
  'the steps in between differ',
  'batch': 'other clips or other pixels: a file or its decoding changed',
  'after': 'the same input gave another result: a device, its memory or its '
  'compiler',
}


def replay(config: ml_collections.ConfigDict, step: int = 0) -> int:
  """Replays a recorded step and logs whether every bit is the same.

  Args:
    config: gives the run folder and the keys that may differ between starts
      (`checkpoint.may_change`); all other keys are read from its `run.json`.
    step: a recorded step, numbered as in the log; 0 for the newest that can be
      replayed.

  Returns:
    The exit status: 0 if everything is equal, 1 if something differs.

  Raises:
    TrainingError: there is no such record, or no usable checkpoint before it.
    CheckpointError: the checkpoint cannot be read.
  """
  run = run_lib.open_run(_as_it_was(config), read_only=True)
  try:
    record, saved = _choose(run, step)
    run_lib.check_same_run(run, saved, {})
    with jax.set_mesh(run.mesh):
      result = _take(run, record, saved)
    text, differs = compare(record, result)
    run.logger.log(
      f'step {record["step"]} of phase {record["phase"]}, replayed from '
      f'checkpoint {saved.path.name}:\n{text}'
    )
    return int(differs)
  finally:
    run.clips.close()


def _as_it_was(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Returns the recorded config, with `may_change` keys from `config`."""
  path = pathlib.Path(config.workdir) / 'run.json'
  if not path.exists():
    raise TrainingError(f'--replay: {config.workdir} holds no run')
  recorded = config_io.from_json(integrity.load_record(path.parent)['config'])
  for key in config.checkpoint.may_change:
    *parents, last = key.split('.')
    recorded_section, section = recorded, config
    for parent in parents:
      recorded_section, section = recorded_section[parent], section[parent]
    if last in section:
      recorded_section[last] = section[last]
  return recorded


def _choose(run: Run, step: int) -> tuple[dict[str, Any], integrity.Saved]:
  """Returns a record and the newest checkpoint of its phase before it."""
  records = step_records.listing(run.workdir)
  pairs = []
  for record in records:
    checkpoints = [
      s
      for s in run.checkpoints.whole()
      if s.step < record['step'] and s.phase == record['phase']
    ]
    pairs += [(record, checkpoints[0])] if checkpoints else []
  steps = [record['step'] for record, _ in pairs]
  if not pairs or (step and step not in steps):
    raise TrainingError(
      f'--replay{f"={step}" if step else ""}: of the steps recorded in '
      f'{step_records.folder_of(run.workdir)}, {[r["step"] for r in records]}, '
      f'these can be replayed from a stored state: {steps}. '
      'checkpoint.record_every sets how often one is recorded'
    )
  record, saved = pairs[steps.index(step) if step else -1]
  problem = integrity.damage(saved)
  if problem:
    raise TrainingError(f'checkpoint {saved.path} is damaged: {problem}')
  return record, saved


def _take(
  run: Run, record: Mapping[str, Any], saved: integrity.Saved
) -> dict[str, Any]:
  """Runs the steps from a checkpoint through the recorded step."""
  span = next(s for s in spans(run.phases) if s.phase.name == record['phase'])
  setup = phase_setup.build(run.config, span, run.video, run.clips.num_examples)
  target = phase_setup.placed(run.config, setup.state, run.mesh)
  state = manager.restore(saved, target)
  source = batches_lib.Source(run, setup, read_only=True)
  update = phase_setup.jitted(run.config, setup, run.mesh)
  batches = batch_order.iterator(run.clips, run.left_out, saved.step)
  compiled = None
  for step in range(saved.step, record['step']):
    batch = source.batch(next(batches), step)
    if compiled is None:
      compiled = update.lower(state, source.teachers, batch).compile()
    if step == record['step'] - 1:
      before = step_records.sums(state)  # waits for the previous steps
    state, _ = compiled(state, source.teachers, batch)
    state = train_step_lib.end_windows(state, span.phase, step + 1 - span.start)
  return {
    'before': before,
    'after': step_records.sums(state),
    'batch': step_records.sums(batch),
    'machine': provenance.machine() | {'mesh': dict(run.mesh.shape)},
  }


def compare(
  record: Mapping[str, Any], found: Mapping[str, Any]
) -> tuple[str, bool]:
  """Returns a text report of the differences, and whether there are any.

  Args:
    record: one of `step_records.listing`.
    found: the same of the replayed step.
  """
  lines, cause = [], ''
  for part, meaning in MEANING.items():
    recorded, replayed = record[part], found[part]
    names = sorted(recorded.keys() | replayed.keys())
    differing = [n for n in names if recorded.get(n) != replayed.get(n)]
    if not differing:
      lines.append(f'  {part}: all {len(names)} arrays equal')
      continue
    cause = cause or meaning
    more = f' and {len(differing) - 8} more' if len(differing) > 8 else ''
    lines.append(
      f'  {part}: {len(differing)} of {len(names)} arrays differ: '
      f'{", ".join(differing[:8])}{more}'
    )
  if cause:
    lines.append(f'DIFFERS: {cause}')
    lines += [
      f'  {key} was {record["machine"].get(key)} and is {value}: bits may '
      'differ for this reason alone'
      for key, value in found['machine'].items()
      if record['machine'].get(key) != value
    ]
  else:
    lines.append('equal')
  return '\n'.join(lines), bool(cause)
