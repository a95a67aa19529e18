"""The loop over phases and steps. It knows no method's name."""

import signal
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from vssl_jax import sharding, trees
from vssl_jax.data import ledger
from vssl_jax.train import (
  begin,
  checkpoint,
  freezing,
  manifests,
  optimizer,
  order,
  rewind,
  step,
)
from vssl_jax.train import run as run_lib
from vssl_jax.train.recorder import Recorder
from vssl_jax.train.run import Run, Span, spans

# What a scheduler sees after a SIGTERM that was answered with a checkpoint:
# 128 + 15, as if the signal had ended the process.
PREEMPTED = 128 + signal.SIGTERM
# Errors whose message says all that the user needs.
EXPECTED = (
  FileNotFoundError,
  ValueError,
  ledger.TooManyBadFiles,
  run_lib.TrainingError,
  checkpoint.CheckpointError,
)


def train(
  config: ml_collections.ConfigDict, back: rewind.Rewind | None = None
) -> int:
  """Runs or resumes a pretraining run to its end.

  Args:
    config: a resolved config.
    back: where to go back to first, if anywhere.

  Returns:
    The exit status: 0, or `PREEMPTED` after a SIGTERM that was answered with
    a checkpoint.

  Raises:
    TrainingError: the run cannot go on.
    CheckpointError: a checkpoint cannot be written or does not fit.
  """
  run = run_lib.open_run(config)
  try:
    saved = run.checkpoints.newest()
    run_lib.check_same_run(run, saved)
    if back is not None:
      saved = rewind.rewind(run, back)
    with run_lib.Preemption(run), jax.set_mesh(run.mesh):
      for span in spans(run.method):
        if saved is not None and _is_over(saved, span):
          continue
        state = _run_phase(run, span, saved)
        if run.preempted:
          run.logger.say(
            f'SIGTERM: saved step {int(state.step)}; the same command goes on '
            'from there'
          )
          return PREEMPTED
        saved = run.checkpoints.newest()
    return 0
  finally:
    run.checkpoints.finish()
    run.clips.close()
    run.logger.close()


def _is_over(saved: manifests.Saved, span: Span) -> bool:
  """Returns whether a checkpoint lies past a phase.

  A state at the very end of a phase belongs to it by name; the phase after it
  has the same step when it has not begun.
  """
  return saved.step > span.end or (
    saved.step == span.end and saved.phase == span.phase.name
  )


def _run_phase(
  run: Run, span: Span, saved: manifests.Saved | None
) -> step.TrainState:
  """Runs a phase from its start or from a checkpoint inside it."""
  phase, config = span.phase, run.config
  horizon = optimizer.horizon(phase, span.start, span.total)
  optimizer.warmup_steps(config.optim, horizon, phase.name)
  lr = optimizer.learning_rate(config.optim, horizon, config.batch_size)
  decay = optimizer.weight_decay(config.optim, horizon)
  shapes = begin.param_shapes(run, phase)
  labels = freezing.labels(shapes, phase.frozen)
  tx = optimizer.make(config.optim, labels, lr, decay)
  inside = saved is not None and saved.phase == phase.name
  state = begin.state(run, span, tx, saved, inside)
  teachers = {
    name: begin.teacher_params(run, teacher)
    for name, teacher in phase.teachers.items()
    if not teacher.source.startswith('@ema/')
  }
  update = step.make_update(
    run.method,
    phase,
    tx,
    labels,
    key=run.key,
    start=span.start,
    accumulate=config.optim.accumulate,
    skip_spike=config.optim.skip_spike,
  )
  update = step.jit_update(
    update, state, teachers, run.mesh, dict(config.mesh.overrides)
  )
  run.logger.say(
    f'phase {phase.name}: steps {int(state.step)} to {span.end}, '
    f'{trees.count(state.params) / 1e6:.2f} M parameters, '
    f'{optimizer.describe_lr(config.optim, config.batch_size)}, warm-up '
    f'{optimizer.warmup_steps(config.optim, horizon)} steps'
  )
  state = _loop(run, span, state, teachers, update, {'lr': lr, 'wd': decay})
  if not run.preempted:
    kept = {'params': state.params, 'ema': state.ema}
    run.checkpoints.save_params(kept, span.end, phase.name)
  _save(run, span, state)
  run.checkpoints.finish()
  return state


def _loop(
  run: Run,
  span: Span,
  state: step.TrainState,
  teachers: Any,
  update: Any,
  schedules: Mapping[str, Any],
) -> step.TrainState:
  """Takes the steps of a phase; each action knows its own interval."""
  done = int(state.step)
  batches = order.iterator(run.clips, run.left_out, done)
  recorder = Recorder(run, span, schedules)
  compiled = None
  while done < span.end and not run_lib.should_stop(run, done):
    with run.clock('data'):
      local = next(batches)
    batch = _on_device(run, local, done, span.total)
    if compiled is None:
      with run.clock('compile'):
        compiled = update.lower(state, teachers, batch).compile()
    with run.clock('step'):
      state, values = compiled(state, teachers, batch)
      # Waits for the step before, so the device always has one in hand.
      recorder.add(done, local, values, state)
    done += 1
    if run.panel.due(done, span.start):
      with run.clock('evaluation'):
        for warning in run.panel.look(run, span, state, done):
          run.logger.say(warning)
    if done % run.config.checkpoint.every == 0 and done < span.end:
      _save(run, span, state)
  recorder.flush(state)
  if done == span.end:
    recorder.end_phase(state)
  return state


def _on_device(
  run: Run, local: Mapping[str, np.ndarray], done: int, total: int
) -> dict[str, Any]:
  local = dict(local, progress=np.float32(done / total))
  return sharding.put_batch(local, run.mesh)


def _save(run: Run, span: Span, state: step.TrainState) -> None:
  with run.clock('checkpoint'):
    run.checkpoints.save(
      state,
      int(state.step),
      span.phase.name,
      extra={
        'data_fingerprint': run.clips.fingerprint,
        'left_out': run.left_out,
        'rewinds': run.rewinds,
      },
    )
