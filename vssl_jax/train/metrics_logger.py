"""Logs and checks the metrics of a step after the next one is dispatched."""

import collections
import json
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vssl_jax.train import train_step
from vssl_jax.train.run import Run, Span, TrainingError, spans
from vssl_jax.utils import jsonl, metrics

# Share of skipped steps in a phase above which a warning is logged.
SKIPPED_ALARM = 0.05


class Recorder:
  """Logs and checks the metrics of a step after the next is dispatched."""

  def __init__(
    self, run: Run, span: Span, schedules: Mapping[str, Any]
  ) -> None:
    self._run, self._span, self._schedules = run, span, schedules
    self._pending: Any = None
    self._recent: collections.deque[float] = collections.deque(maxlen=50)
    self._last_time: float | None = None
    self._cost = span.phase.cost(run.video)
    self._first, self._reports, self._advice = True, 0, ''
    self._alarms = dict(span.phase.alarms)

  def add(
    self, step_index: int, local: Any, values: Any, state: train_step.TrainState
  ) -> None:
    """Stores the metrics of a dispatched step and logs the previous step."""
    pending, self._pending = self._pending, (step_index, local, values)
    if pending is not None:
      self._look(*pending, state)

  def flush(self, state: train_step.TrainState) -> None:
    """Logs the last step."""
    if self._pending is not None:
      self._look(*self._pending, state)
      self._pending = None

  def _look(
    self, step_index: int, local: Any, values: Any, state: train_step.TrainState
  ) -> None:
    run = self._run
    streak = int(values['streak'])  # waits for the step
    now = time.perf_counter()
    if self._last_time is not None:
      self._recent.append(now - self._last_time)
    self._last_time = now
    if streak:
      self._skipped(step_index, local, values, streak, state)
    spike = float(values['spike'])
    if spike > run.config.health.spike_alarm > 0:
      run.logger.log(
        f'step {step_index + 1}: the loss is {spike:.1f} times its running '
        'median; optim.skip_spike skips such steps'
      )
    done = step_index + 1
    first, self._first = self._first, False
    if first or done % run.config.log.every == 0 or done == self._span.end:
      self._write(done, values)

  def _skipped(
    self, step_index: int, local: Any, values: Any, streak: int, state: Any
  ) -> None:
    """Records a skipped step; raises after too many in a row."""
    run = self._run
    record = {
      'step': step_index + 1,
      'loss': str(float(values['loss'])),
      'index': np.asarray(local['index']).tolist(),
    }
    path = run.workdir / f'skipped_{jax.process_index()}.jsonl'
    with jsonl.append_to(path) as f:
      f.write(json.dumps(record) + '\n')
    run.logger.log(
      f'step {step_index + 1}: loss {record["loss"]}, no update (batch in '
      f'{path.name})'
    )
    leaf = train_step.first_nonfinite(state.params) if streak == 1 else ''
    if leaf or streak > run.config.health.max_skipped:
      raise TrainingError(
        f'parameter {leaf!r} holds a value that is not finite at step '
        f'{step_index + 1}: restart to resume from the last checkpoint'
        if leaf
        else f'{streak} steps in a row had no update, up to step '
        f'{step_index + 1}: a loss or gradient that is not finite, or a loss '
        f'above optim.skip_spike; their batches are in {path}. Lower '
        '--config.optim.lr, or look at those clips'
      )

  def end_phase(self, state: train_step.TrainState) -> None:
    """Checks the share of skipped steps at the end of a phase.

    Raises:
      TrainingError: all steps, or more than `skipped_share`, were skipped.
    """
    run, phase = self._run, self._span.phase
    skipped, limit = (
      int(state.guard['skipped']),
      run.config.health.skipped_share,
    )
    share = skipped / phase.steps
    text = (
      f'phase {phase.name!r}: {skipped} of {phase.steps} steps had no update'
    )
    if skipped == phase.steps or share > limit:
      raise TrainingError(
        f'{text}, and health.skipped_share allows {limit:g}; its parameters '
        f'are not used. Their batches are in {run.workdir}/skipped_*.jsonl. '
        'Lower --config.optim.lr, look at those clips, or raise '
        '--config.optim.skip_spike if it is set'
      )
    if share > SKIPPED_ALARM:
      run.logger.log(
        f'{text}; their batches are in {run.workdir}/skipped_*.jsonl'
      )

  def _write(self, done: int, values: Any) -> None:
    run, span = self._run, self._span
    numbers = {k: float(v) for k, v in jax.device_get(values).items()}
    numbers |= {k: float(f(done)) for k, f in self._schedules.items()}
    seconds = float(np.median(self._recent)) if self._recent else 0.0
    if seconds:
      rate = run.config.batch_size / seconds
      numbers |= {'step_seconds': seconds, 'clips_per_s': rate}
      peak = metrics.peak_flops(run.config.log.peak_tflops)
      if peak:
        numbers['mfu'] = rate * self._cost.total / (peak * run.mesh.size)
    numbers['teacher_share'] = self._cost.frozen / self._cost.total
    numbers |= run.clips.report() | run.clock.goodput()
    run.logger.write(done, numbers, phase=span.phase.name)
    shown = {
      k: v
      for k, v in numbers.items()
      if k in ('loss', 'lr', 'grad_norm', 'clips_per_s', 'mfu')
    }
    self._say_data(done)
    for name, (low, text) in list(self._alarms.items()):
      if not numbers.get(name, low) >= low:
        self._alarms.pop(name)
        finding = f'{name} is {numbers[name]:.3g}, below {low:g}'
        run.logger.log(f'step {done}: {finding}: {text}')
    steps_left = spans(run.phases)[-1].end - done
    run.logger.log(
      metrics.progress_line(
        span.phase.name,
        done - span.start,
        span.phase.steps,
        shown,
        seconds,
        steps_left,
      )
    )

  def _say_data(self, done: int) -> None:
    """Logs the input rate once, and advice when a run waits for its data.

    Starts at the second report, as the first includes the start of the run.
    """
    self._reports += 1
    if self._reports == 2:
      self._run.logger.log(self._run.clips.describe())
    advice = self._run.clips.advice()
    if advice and self._reports > 1 and advice != self._advice:
      self._run.logger.log(advice)
      self._advice = advice
