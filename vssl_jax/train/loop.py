"""Training loop over phases and steps, independent of the method."""

import signal
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections

from vssl_jax import trees
from vssl_jax.checkpoint import batch_order, integrity, manager
from vssl_jax.checkpoint import workdir as workdir_lib
from vssl_jax.data import read_stats
from vssl_jax.train import batches as batches_lib
from vssl_jax.train import (
  compile_ahead,
  optimizer,
  phase_setup,
  phase_start,
  rewind,
  step_records,
  train_step,
)
from vssl_jax.train import run as run_lib
from vssl_jax.train.metrics_logger import Recorder
from vssl_jax.train.run import Run, Span, spans
from vssl_jax.utils import config_io, interrupts

# Exit statuses after a signal and the checkpoint saved for it: 143 and 130, as
# if the signal had ended the process.
PREEMPTED = 128 + signal.SIGTERM
INTERRUPTED = interrupts.INTERRUPTED
# Errors that are reported by their message, without a traceback.
EXPECTED = (
  OSError,
  ValueError,
  read_stats.TooManyBadFiles,
  run_lib.TrainingError,
  manager.CheckpointError,
  workdir_lib.InUseError,
)


def train(
  config: ml_collections.ConfigDict,
  back: rewind.Rewind | None = None,
  hooks: Sequence[run_lib.Hook] = (),
  defaults: Mapping[str, Any] | None = None,
) -> int:
  """Trains or resumes a run to its end.

  Args:
    config: a resolved config.
    back: rewind to carry out before training, if any.
    hooks: hooks that run between steps, after the health panel.
    defaults: default of every key, by dotted name, from `config.defaults`. A
      run may be resumed with a key that is newer than the run if the key has
      its default.

  Returns:
    The exit status: 0, or `PREEMPTED` or `INTERRUPTED` after a SIGTERM or
    Ctrl-C and the checkpoint saved for it.

  Raises:
    TrainingError: the run cannot continue.
    CheckpointError: a checkpoint cannot be written or does not fit.
    InUseError: another start writes in the run folder.
  """
  with workdir_lib.hold(config.workdir):
    return _train(config, back, hooks, defaults or {})


def _train(
  config: ml_collections.ConfigDict,
  back: rewind.Rewind | None,
  hooks: Sequence[run_lib.Hook],
  defaults: Mapping[str, Any],
) -> int:
  """Trains or resumes a run whose folder is locked; see `train`."""
  run = run_lib.open_run(config)
  run.hooks = (run.panel, *hooks)
  try:
    batches_lib.check(run)
    saved = run.checkpoints.newest()
    run_lib.check_may_resume(run, saved)
    run_lib.check_same_run(run, saved, defaults)
    if saved is None:
      phase_start.check_sources(config, run.phases)
    run_lib.write_record(run)
    if back is not None:
      saved = rewind.rewind(run, back)
    compiler = compile_ahead.Compiler(run)
    with run_lib.Preemption(run), jax.set_mesh(run.mesh):
      for span in spans(run.phases):
        if saved is not None and _is_over(saved, span):
          continue
        state = _run_phase(run, span, saved, compiler)
        if run.stopped_by:
          interrupted = run.stopped_by == signal.SIGINT
          run.logger.log(
            f'{"Ctrl-C" if interrupted else "SIGTERM"}: saved step '
            f'{int(state.step)}; the same command resumes from there'
          )
          return 128 + run.stopped_by
        saved = run.checkpoints.newest()
    return 0
  finally:
    run.checkpoints.finish()
    run.clips.close()
    run.logger.close()


def _is_over(saved: integrity.Saved, span: Span) -> bool:
  """Returns whether a checkpoint is from the end of a phase or later.

  The end step of a phase is also the start step of the next one, so at that
  step the phase name in the checkpoint decides.
  """
  return saved.step > span.end or (
    saved.step == span.end and saved.phase == span.phase.name
  )


def _run_phase(
  run: Run,
  span: Span,
  saved: integrity.Saved | None,
  compiler: compile_ahead.Compiler,
) -> train_step.TrainState:
  """Runs a phase from its start or from a checkpoint inside it."""
  phase, config = span.phase, run.config
  setup = phase_setup.build(config, span, run.video, run.clips.num_examples)
  programs = compiler.take(span)
  inside = saved is not None and saved.phase == phase.name
  state = phase_start.state(
    run, setup, saved, inside, programs and programs.fresh
  )
  source = batches_lib.Source(run, setup)
  horizon = optimizer.horizon(phase, span.start, span.covers)
  run.logger.log(
    f'phase {phase.name}: steps {int(state.step)} to {span.end}, '
    f'{trees.count(state.params) / 1e6:.2f} M parameters, '
    f'{optimizer.describe_lr(config.optim, config.batch_size)}, warm-up '
    f'{optimizer.warmup_steps(config.optim, horizon)} steps'
  )
  try:
    state = _loop(run, setup, state, source, programs, compiler)
  finally:
    source.close()
  if not run.stopped_by and phase.name in run.kept_phases:
    params = {'params': state.params, 'ema': state.ema}
    run.checkpoints.save_params(params, span.end, phase.name)
  _save(run, span, state)
  run.checkpoints.finish()
  return state


def _loop(
  run: Run,
  setup: phase_setup.PhaseSetup,
  state: train_step.TrainState,
  source: batches_lib.Source,
  made: compile_ahead.Programs | None,
  compiler: compile_ahead.Compiler,
) -> train_step.TrainState:
  """Runs the steps of a phase, with records, hooks and checkpoints."""
  span, done = setup.span, int(state.step)
  batches = batch_order.iterator(run.clips, run.left_out, done)
  recorder = Recorder(run, span, setup.schedules)
  step_recorder = step_records.StepRecorder(run, span)
  compiled = None
  while done < span.end and not run_lib.should_stop(run, done):
    with run.clock('data'):
      local_batch = next(batches)
    batch = source.batch(local_batch, done)
    if compiled is None:
      with run.clock('compile'):
        arguments = state, source.teachers, batch
        compiled = _compiled(run, setup, made, arguments)
        del arguments  # the step donates the state
      compiler.start(_following(run, span), batch)
    with run.clock('step'):
      step_recorder.before(done, state, batch)
      state, metrics = compiled(state, source.teachers, batch)
      state = train_step.end_windows(state, span.phase, done + 1 - span.start)
      step_recorder.after(state)
      # Waits for the previous step, so the device has one step queued.
      recorder.add(done, local_batch, metrics, state)
    done += 1
    for hook in run.hooks:
      if hook.due(done, span.start):
        with run.clock('evaluation'):
          for line in hook.look(run, span, state, done):
            run.logger.log(line)
    if done % run.config.checkpoint.every == 0 and done < span.end:
      _save(run, span, state)
  recorder.flush(state)
  if done == span.end:
    recorder.end_phase(state)
  return state


def _compiled(
  run: Run,
  setup: phase_setup.PhaseSetup,
  made: compile_ahead.Programs | None,
  arguments: tuple[Any, ...],
) -> Any:
  """Returns the compiled step: compiled ahead if that fits, else now."""
  if made is not None and made.takes(arguments):
    return made.update
  update = phase_setup.jitted(run.config, setup, run.mesh)
  return update.lower(*arguments).compile()


def _following(run: Run, span: Span) -> Span | None:
  """Returns the phase after `span`; None after the last one."""
  return next((s for s in spans(run.phases) if s.start == span.end), None)


def _save(run: Run, span: Span, state: train_step.TrainState) -> None:
  with run.clock('checkpoint'):
    run.checkpoints.save(
      state,
      int(state.step),
      span.phase.name,
      extra={
        'config': config_io.to_json(run.config),
        'data_fingerprint': run.clips.fingerprint,
        'left_out': run.left_out,
        'rewinds': run.rewinds,
      },
    )
