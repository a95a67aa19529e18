"""A recorded step, taken again: does this machine do what that one did?

Reads only, so it can be done while the run goes on, on another machine too.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections

from vssl_jax import config as config_lib
from vssl_jax.train import (
  ahead,
  checkpoint,
  manifests,
  order,
  probes,
  provenance,
  target_source,
)
from vssl_jax.train import run as run_lib
from vssl_jax.train import step as step_lib
from vssl_jax.train.run import Run, TrainingError, spans

# What each part of a record tells, when it alone or first differs.
MEANING = {
  'before': 'the state that was saved is not the one the step was taken from, '
  'or the steps in between came out otherwise',
  'batch': 'other clips or other pixels: a file that changed, or its reading',
  'after': 'the same input gave another result: a device, its memory or its '
  'compiler',
}


def replay(config: ml_collections.ConfigDict, step: int = 0) -> int:
  """Takes a recorded step again and prints whether every bit is the same.

  Args:
    config: names the run's folder, and what may differ from start to start
      (`checkpoint.may_change`); all else is taken from its `run.json`.
    step: a recorded step, numbered as in the log; 0 for the newest that can be
      taken again.

  Returns:
    The exit status: 0 where all is equal, 1 where something differs.

  Raises:
    TrainingError: there is no such record, or no state from before it.
    CheckpointError: that state cannot be read.
  """
  run = run_lib.open_run(_as_it_was(config), read_only=True)
  try:
    record, saved = _choose(run, step)
    run_lib.check_same_run(run, saved)
    with jax.set_mesh(run.mesh):
      found = _take(run, record, saved)
    text, differs = compare(record, found)
    run.logger.say(
      f'step {record["step"]} of phase {record["phase"]}, taken again from '
      f'checkpoint {saved.path.name}:\n{text}'
    )
    return int(differs)
  finally:
    run.clips.close()


def _as_it_was(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Returns a run's own config, with what may differ as in the one given."""
  path = pathlib.Path(config.workdir) / 'run.json'
  if not path.exists():
    raise TrainingError(f'--replay: {config.workdir} holds no run')
  own = config_lib.from_json(manifests.load_record(path.parent)['config'])
  for key in config.checkpoint.may_change:
    *parents, last = key.split('.')
    there, here = own, config
    for parent in parents:
      there, here = there[parent], here[parent]
    if last in here:
      there[last] = here[last]
  return own


def _choose(run: Run, step: int) -> tuple[dict[str, Any], manifests.Saved]:
  """Returns a record, and the newest sound state of its phase before it."""
  records = probes.listing(run.workdir)
  pairs = []
  for record in records:
    inside = [
      s
      for s in run.checkpoints.whole()
      if s.step < record['step'] and s.phase == record['phase']
    ]
    pairs += [(record, inside[0])] if inside else []
  able = [record['step'] for record, _ in pairs]
  if not pairs or (step and step not in able):
    raise TrainingError(
      f'--replay{f"={step}" if step else ""}: of the steps recorded in '
      f'{probes.folder_of(run.workdir)}, {[r["step"] for r in records]}, these '
      f'can be taken again from a state that is kept: {able}. '
      'checkpoint.probe_every says how often one is recorded'
    )
  record, saved = pairs[able.index(step) if step else -1]
  wrong = manifests.damage(saved)
  if wrong:
    raise TrainingError(f'checkpoint {saved.path} is damaged: {wrong}')
  return record, saved


def _take(
  run: Run, record: Mapping[str, Any], saved: manifests.Saved
) -> dict[str, Any]:
  """Takes the steps from a state to the end of the recorded one."""
  span = next(s for s in spans(run.method) if s.phase.name == record['phase'])
  shapes = ahead.outline(
    run.config, run.method, span, run.video, run.clips.num_examples
  )
  target = ahead.placed(run.config, shapes.state, run.mesh)
  state = checkpoint.restore(saved, target)
  source = target_source.Source(run, shapes, read_only=True)
  update = ahead.jitted(run.config, run.method, shapes, run.mesh)
  batches = order.iterator(run.clips, run.left_out, saved.step)
  compiled = None
  for done in range(saved.step, record['step']):
    batch = source.batch(next(batches), done)
    if compiled is None:
      compiled = update.lower(state, source.teachers, batch).compile()
    if done == record['step'] - 1:
      before = probes.sums(state)  # it waits for the steps before
    state, _ = compiled(state, source.teachers, batch)
    state = step_lib.end_windows(state, span.phase, done + 1 - span.start)
  return {
    'before': before,
    'after': probes.sums(state),
    'batch': probes.sums(batch),
    'machine': provenance.machine() | {'mesh': dict(run.mesh.shape)},
  }


def compare(
  record: Mapping[str, Any], found: Mapping[str, Any]
) -> tuple[str, bool]:
  """Returns what is equal and what differs as text, and whether any differs.

  Args:
    record: one of `probes.listing`.
    found: the same of the step taken again.
  """
  lines, first = [], ''
  for part, meaning in MEANING.items():
    then, now = record[part], found[part]
    names = sorted(then.keys() | now.keys())
    differing = [n for n in names if then.get(n) != now.get(n)]
    if not differing:
      lines.append(f'  {part}: all {len(names)} arrays equal')
      continue
    first = first or meaning
    more = f' and {len(differing) - 8} more' if len(differing) > 8 else ''
    lines.append(
      f'  {part}: {len(differing)} of {len(names)} arrays differ: '
      f'{", ".join(differing[:8])}{more}'
    )
  if first:
    lines.append(f'DIFFERS: {first}')
    lines += [
      f'  {key} was {record["machine"].get(key)} and is {value}: bits may '
      'differ for that alone'
      for key, value in found['machine'].items()
      if record['machine'].get(key) != value
    ]
  else:
    lines.append('equal')
  return '\n'.join(lines), bool(first)
