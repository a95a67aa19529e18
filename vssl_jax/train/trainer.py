"""The loop over phases and steps. It knows no method's name."""

import signal
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections

from vssl_jax import config as config_lib
from vssl_jax import trees
from vssl_jax.data import ledger
from vssl_jax.train import (
  ahead,
  begin,
  checkpoint,
  manifests,
  optimizer,
  order,
  precompile,
  probes,
  rewind,
  step,
  target_source,
)
from vssl_jax.train import run as run_lib
from vssl_jax.train import workdir as workdir_lib
from vssl_jax.train.recorder import Recorder
from vssl_jax.train.run import Run, Span, spans

# Exit statuses after a signal that was answered with a checkpoint: 143 and 130,
# as if the signal had ended the process.
PREEMPTED = 128 + signal.SIGTERM
INTERRUPTED = 128 + signal.SIGINT
# Errors whose message says all that the user needs.
EXPECTED = (
  OSError,
  ValueError,
  ledger.TooManyBadFiles,
  run_lib.TrainingError,
  checkpoint.CheckpointError,
  workdir_lib.InUseError,
)


def train(
  config: ml_collections.ConfigDict,
  back: rewind.Rewind | None = None,
  watchers: Sequence[run_lib.Watcher] = (),
) -> int:
  """Runs or resumes a run to its end.

  Args:
    config: a resolved config.
    back: where to go back to first, if anywhere.
    watchers: look at the run between steps, after the health panel.

  Returns:
    The exit status: 0, or `PREEMPTED` or `INTERRUPTED` after a SIGTERM or
    Ctrl-C that was answered with a checkpoint.

  Raises:
    TrainingError: the run cannot go on.
    CheckpointError: a checkpoint cannot be written or does not fit.
    InUseError: another start writes in the run's folder.
  """
  with workdir_lib.hold(config.workdir):
    return _train(config, back, watchers)


def _train(
  config: ml_collections.ConfigDict,
  back: rewind.Rewind | None,
  watchers: Sequence[run_lib.Watcher],
) -> int:
  """Runs or resumes a run in a folder that is held; see `train`."""
  run = run_lib.open_run(config)
  run.watchers = (run.panel, *watchers)
  try:
    target_source.check(run)
    saved = run.checkpoints.newest()
    run_lib.check_may_resume(run, saved)
    run_lib.check_same_run(run, saved)
    if saved is None:
      begin.check_sources(config, run.method.phases())
    run_lib.write_record(run)
    if back is not None:
      saved = rewind.rewind(run, back)
    compiler = precompile.Compiler(run)
    with run_lib.Preemption(run), jax.set_mesh(run.mesh):
      for span in spans(run.method):
        if saved is not None and _is_over(saved, span):
          continue
        state = _run_phase(run, span, saved, compiler)
        if run.stopped_by:
          interrupted = run.stopped_by == signal.SIGINT
          run.logger.say(
            f'{"Ctrl-C" if interrupted else "SIGTERM"}: saved step '
            f'{int(state.step)}; the same command goes on from there'
          )
          return 128 + run.stopped_by
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
  run: Run,
  span: Span,
  saved: manifests.Saved | None,
  compiler: precompile.Compiler,
) -> step.TrainState:
  """Runs a phase from its start or from a checkpoint inside it."""
  phase, config = span.phase, run.config
  shapes = ahead.outline(
    config, run.method, span, run.video, run.clips.num_examples
  )
  made = compiler.take(span)
  inside = saved is not None and saved.phase == phase.name
  state = begin.state(run, shapes, saved, inside, made and made.fresh)
  source = target_source.Source(run, shapes)
  horizon = optimizer.horizon(phase, span.start, span.covers)
  run.logger.say(
    f'phase {phase.name}: steps {int(state.step)} to {span.end}, '
    f'{trees.count(state.params) / 1e6:.2f} M parameters, '
    f'{optimizer.describe_lr(config.optim, config.batch_size)}, warm-up '
    f'{optimizer.warmup_steps(config.optim, horizon)} steps'
  )
  try:
    state = _loop(run, shapes, state, source, made, compiler)
  finally:
    source.close()
  if not run.stopped_by and phase.name in run.kept_phases:
    kept = {'params': state.params, 'ema': state.ema}
    run.checkpoints.save_params(kept, span.end, phase.name)
  _save(run, span, state)
  run.checkpoints.finish()
  return state


def _loop(
  run: Run,
  shapes: ahead.Outline,
  state: step.TrainState,
  source: target_source.Source,
  made: precompile.Programs | None,
  compiler: precompile.Compiler,
) -> step.TrainState:
  """Takes the steps of a phase; each action knows its own interval."""
  span, done = shapes.span, int(state.step)
  batches = order.iterator(run.clips, run.left_out, done)
  recorder = Recorder(run, span, shapes.schedules)
  probe = probes.Probes(run, span)
  compiled = None
  while done < span.end and not run_lib.should_stop(run, done):
    with run.clock('data'):
      local = next(batches)
    batch = source.batch(local, done)
    if compiled is None:
      with run.clock('compile'):
        arguments = state, source.teachers, batch
        compiled = _compiled(run, shapes, made, arguments)
        del arguments  # the step takes the state
      compiler.start(_following(run, span), batch)
    with run.clock('step'):
      probe.before(done, state, batch)
      state, values = compiled(state, source.teachers, batch)
      state = step.end_windows(state, span.phase, done + 1 - span.start)
      probe.after(state)
      # Waits for the step before, so the device always has one in hand.
      recorder.add(done, local, values, state)
    done += 1
    for watcher in run.watchers:
      if watcher.due(done, span.start):
        with run.clock('evaluation'):
          for line in watcher.look(run, span, state, done):
            run.logger.say(line)
    if done % run.config.checkpoint.every == 0 and done < span.end:
      _save(run, span, state)
  recorder.flush(state)
  if done == span.end:
    recorder.end_phase(state)
  return state


def _compiled(
  run: Run,
  shapes: ahead.Outline,
  made: precompile.Programs | None,
  arguments: tuple[Any, ...],
) -> Any:
  """Returns the compiled step: the one made ahead, if it takes these."""
  if made is not None and made.takes(arguments):
    return made.update
  update = ahead.jitted(run.config, run.method, shapes, run.mesh)
  return update.lower(*arguments).compile()


def _following(run: Run, span: Span) -> Span | None:
  """Returns the phase after another, if there is one."""
  return next((s for s in spans(run.method) if s.start == span.end), None)


def _save(run: Run, span: Span, state: step.TrainState) -> None:
  with run.clock('checkpoint'):
    run.checkpoints.save(
      state,
      int(state.step),
      span.phase.name,
      extra={
        'config': config_lib.to_json(run.config),
        'data_fingerprint': run.clips.fingerprint,
        'left_out': run.left_out,
        'rewinds': run.rewinds,
      },
    )
