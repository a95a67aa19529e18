"""Opens, checks, resumes and stops a run; `Run` is shared by all phases."""

import dataclasses
import itertools
import pathlib
import signal
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from vssl_jax import encoder, methods, sharding
from vssl_jax.checkpoint import (
  batch_order,
  data_changes,
  integrity,
  manager,
  provenance,
  retention,
)
from vssl_jax.data import batch as batch_lib
from vssl_jax.data import options, pipeline
from vssl_jax.methods import phase as phase_lib
from vssl_jax.models import fp8_matmul
from vssl_jax.train import health
from vssl_jax.utils import config_io, metrics


class TrainingError(RuntimeError):
  """The run cannot continue; the message gives the reason and the remedy."""


@runtime_checkable
class Hook(Protocol):
  """Hook that runs between steps, such as the health panel."""

  def due(self, done: int, span_start: int) -> bool:
    """Returns whether the hook runs after this step."""

  def look(self, run: Any, span: Any, state: Any, done: int) -> list[str]:
    """Runs the hook, logs its metrics and returns lines to log."""


@dataclasses.dataclass
class Run:
  """Objects and state shared by all phases of a run."""

  config: ml_collections.ConfigDict
  workdir: pathlib.Path
  mesh: jax.sharding.Mesh
  clips: pipeline.Clips
  phases: tuple[phase_lib.Phase, ...]
  checkpoints: manager.Checkpoints
  logger: metrics.Logger
  clock: metrics.Clock
  panel: health.Panel
  kept_phases: tuple[str, ...]  # their last parameters are saved
  read_only: bool = False
  hooks: Sequence[Hook] = ()
  left_out: batch_order.Ranges = ()  # batches that no step uses
  rewinds: list[dict[str, int]] = dataclasses.field(default_factory=list)
  # Changes of the videos between starts, accepted by data.allow_change.
  data_changes: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  signal: int = 0  # received as a request to save and stop; 0: none
  stopped_by: int = 0  # signal that all processes stop on; 0: none

  @property
  def video(self) -> tuple[int, ...]:
    """(T, H, W, C) of a clip."""
    return tuple(self.clips.shapes['video'])

  @property
  def key(self) -> jax.Array:
    """Key of all randomness on the device."""
    return jax.random.key(self.config.seed)


@dataclasses.dataclass(frozen=True)
class Span:
  """A phase and its steps, `start` to `end`, in a run of `total` steps.

  `covers` is the first step and the number of steps that its schedules cover:
  the phase, or all adjacent phases whose horizon is `run`.
  """

  phase: phase_lib.Phase
  start: int
  end: int
  total: int
  covers: tuple[int, int]


def spans(phases: Sequence[phase_lib.Phase]) -> tuple[Span, ...]:
  """Returns the phases of a run with their steps in the run."""
  ends = list(itertools.accumulate(phase.steps for phase in phases))
  out = []
  for is_shared, group in itertools.groupby(
    zip(phases, ends, strict=True), key=lambda pair: pair[0].horizon == 'run'
  ):
    members = list(group)
    first = members[0][1] - members[0][0].steps
    for phase, end in members:
      start = end - phase.steps
      covers = (
        (first, members[-1][1] - first) if is_shared else (start, phase.steps)
      )
      out.append(Span(phase, start, end, ends[-1], covers))
  return tuple(out)


def open_run(config: ml_collections.ConfigDict, read_only: bool = False) -> Run:
  """Opens a run: mesh, data, phases, checkpoints and logs; checks the config.

  Args:
    config: a resolved config.
    read_only: write nothing, and leave unfinished files of other processes.

  Raises:
    ValueError: the batch size, a teacher's dtype or the data do not fit.
  """
  clock = metrics.Clock('start')
  workdir = pathlib.Path(config.workdir)
  if not read_only:
    workdir.mkdir(parents=True, exist_ok=True)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  _check_batch(config, mesh)
  clips = pipeline.make(
    config.data.to_dict(),
    batch_size=config.batch_size,
    seed=config.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    folder=None if read_only else str(workdir),
  )
  phases = methods.build(
    config.method,
    tuple(clips.shapes['video']),
    encoder.module_of,
    options.colours_of(config.data),
  )
  check_units(phases, jax.devices()[0])
  if any(phase.memory_specs for phase in phases):
    _check_distinct(config, clips)
  return Run(
    config=config,
    workdir=workdir,
    mesh=mesh,
    clips=clips,
    phases=phases,
    checkpoints=manager.Checkpoints(
      workdir,
      config.checkpoint.keep,
      config.checkpoint.keep_every,
      read_only=read_only,
    ),
    logger=metrics.Logger(
      None if read_only else workdir, config.log.tensorboard
    ),
    clock=clock,
    panel=health.Panel(config.health, clips, sum(p.steps for p in phases)),
    kept_phases=retention.phases(config.checkpoint.keep_phases, phases),
    read_only=read_only,
  )


def _check_batch(
  config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> None:
  pieces = mesh.size * config.optim.accumulate
  if config.batch_size % pieces:
    raise ValueError(
      f'batch_size: found {config.batch_size}, wanted a multiple of {pieces} '
      f'({mesh.size} devices x {config.optim.accumulate} micro-batches)'
    )


def check_units(phases: Sequence[phase_lib.Phase], device: Any) -> None:
  """Raises for float8 teachers on a device without matrix units for them."""
  for phase in phases:
    for name, teacher in phase.teachers.items():
      if teacher.dtype == 'float8' and not fp8_matmul.has_units(device):
        raise ValueError(
          f'phase {phase.name!r}: teacher {name!r} has dtype float8, and '
          f'{device.device_kind} has no matrix units for it; wanted a GPU of '
          'compute capability 8.9 or newer. Set it to bfloat16, or to '
          'float8_emulated to see what it does to the targets'
        )


def _check_distinct(
  config: ml_collections.ConfigDict, clips: pipeline.Clips
) -> None:
  """Raises if a batch may hold an example twice, as `scatter` forbids."""
  data, size = config.data, config.batch_size
  cause = ''
  if data.repeats > 1:
    cause = f'data.repeats={data.repeats}; set --config.data.repeats=1'
  elif data.weights:
    cause = f'data.weights={data.weights}; set --config.data.weights=()'
  elif not clips.distinct:
    cause = (
      f'batch_size={size} of {clips.num_examples} videos; lower '
      '--config.batch_size to as many at most'
    )
  if cause:
    raise ValueError(
      f'{config.method.name} stores a state of every training example, and a '
      f'batch may not hold an example twice, as it may with {cause}'
    )


def check_same_run(
  run: Run, saved: integrity.Saved | None, defaults: Mapping[str, Any]
) -> None:
  """Compares a resumed run with its `run.json` and restores its history.

  Sets `left_out`, `rewinds` and `data_changes` of the run.

  Args:
    run: the run.
    saved: its newest checkpoint.
    defaults: default of every key, by dotted name.

  Raises:
    TrainingError: the config, the videos or the batches so far differ.
  """
  if saved is not None:
    record = _record(run) or saved.manifest
    _check_config(run, record, defaults)
    run.left_out = batch_order.from_json(record.get('left_out', ()))
    run.rewinds = record.get('rewinds', [])
    run.data_changes = record.get('data_changes', [])
    _check_data(run, record, saved.step)
    _check_batches(run, saved)


def _record(run: Run) -> dict[str, Any] | None:
  """Loads `run.json`; None if absent or corrupt. Renames a corrupt file."""
  path = run.workdir / integrity.RUN
  try:
    return integrity.load(path)
  except FileNotFoundError:
    return None
  except integrity.CorruptError as error:
    run.logger.log(
      f'{error}. The file is renamed to {path.name}.corrupt and written again '
      'from the newest checkpoint'
    )
    if not run.read_only and jax.process_index() == 0:
      path.replace(path.with_name(f'{path.name}.corrupt'))
    return None


def check_may_resume(run: Run, saved: integrity.Saved | None) -> None:
  """Raises if the folder holds a run and `checkpoint.resume` is False."""
  if saved is not None and not run.config.checkpoint.resume:
    raise TrainingError(
      f'{run.workdir} holds a run at step {saved.step} and '
      'checkpoint.resume is False; give a new --config.workdir'
    )


def _check_config(
  run: Run, record: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
  """Raises if a config key differs that must not change within a run.

  A key that is newer than the run must have its default, which does not change
  older runs.
  """
  if 'config' not in record:
    return
  _check_rounding(run, record['config'])
  old_config = config_io.from_json(record['config'])
  old_keys = dict(config_io.flatten(old_config))
  new_keys = tuple(
    key
    for key, value in config_io.flatten(run.config)
    if key not in old_keys and key in defaults and defaults[key] == value
  )
  if new_keys:
    run.logger.log(f'newer than this run, at their defaults: {list(new_keys)}')
  changed = config_io.difference(
    old_config, run.config, (*run.config.checkpoint.may_change, *new_keys)
  )
  if changed:
    raise TrainingError(
      f'{run.workdir} was started with another config:\n{changed}\n'
      'resume with the old values, or give a new --config.workdir'
    )


def _check_data(run: Run, record: Mapping[str, Any], step: int) -> None:
  """Raises if the videos changed; data.allow_change records the change instead.

  Raises:
    TrainingError: the videos changed and data.allow_change is False.
  """
  change = data_changes.compare(run.workdir, record, run.clips)
  if not change:
    return
  if not run.config.data.allow_change:
    raise TrainingError(
      f'{run.workdir}: the videos are not those that the run was started with: '
      f'{change}. Put them back as they were, or give a new --config.workdir, '
      'or continue with other batches: --config.data.allow_change=True'
    )
  run.logger.log(f'data.allow_change: continuing at step {step} with {change}')
  run.data_changes = [*run.data_changes, {'step': step, 'change': change}]


def _check_rounding(run: Run, before: Mapping[str, Any]) -> None:
  """Raises if target caching was switched on or off.

  Cached targets are rounded; the folder of the cache may change.

  Raises:
    TrainingError: only one of the two starts caches targets.
  """
  was = before.get('cache_targets', '')
  now = run.config.cache_targets
  if bool(was) != bool(now):
    raise TrainingError(
      f'{run.workdir} was started with cache_targets={was!r}, found {now!r}: '
      'stored targets are rounded, so the numbers would differ. Wanted '
      + (f'a folder, such as {was}' if was else "''")
      + '; or give a new --config.workdir'
    )


def _check_batches(run: Run, saved: integrity.Saved) -> None:
  """Raises if a checkpoint and `run.json` differ in the left-out batches."""
  ranges = batch_order.from_json(saved.manifest.get('left_out', ()))
  ranges, expected = (
    batch_order.passed(x, saved.step) for x in (ranges, run.left_out)
  )
  if ranges != expected:
    raise TrainingError(
      f'{run.workdir}/run.json leaves out batches {expected} up to step '
      f'{saved.step}, and checkpoint {saved.path.name} left out {ranges}: they '
      'belong to different runs. Put the right run.json back, or remove it to '
      "use the checkpoint's list"
    )


def write_record(run: Run) -> None:
  """Writes `run.json`: config, data, left-out batches and provenance."""
  config = config_io.to_json(run.config)
  record = {
    'config': config,
    'video': list(run.video),
    'data_fingerprint': run.clips.fingerprint,
    'data_changes': run.data_changes,
    'num_examples': run.clips.num_examples,
    'classes': run.clips.classes,
    'left_out': run.left_out,
    'rewinds': run.rewinds,
    'outside': encoder.outside(run.phases),
    'provenance': provenance.describe(config),
  }
  if jax.process_index() == 0:
    data_changes.store(run.workdir, run.clips)
    integrity.write_atomic(run.workdir / integrity.RUN, record, indent=1)


def on_device(
  run: Run, local: Mapping[str, np.ndarray], done: int, total: int
) -> batch_lib.Batch:
  """Puts a step's batch on the mesh, with `progress` = done / total.

  Args:
    run: the run.
    local: this process's part of the batch.
    done: completed steps of the run.
    total: steps of the run.
  """
  local = dict(local, progress=np.float32(done / total))
  return batch_lib.Batch(**sharding.put_batch(local, run.mesh))


class Preemption:
  """Turns the first SIGTERM or Ctrl-C into a request to save and stop.

  The second one ends the process. A SIGINT that is ignored, as in background
  jobs of a shell, stays ignored.
  """

  def __init__(self, run: Run) -> None:
    self._run = run
    self._before: dict[int, Any] = {}

  def __enter__(self) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
      if signal.getsignal(number) is not signal.SIG_IGN:
        self._before[number] = signal.signal(number, self._request)

  def _request(self, number: int, _: Any) -> None:
    self._run.signal = number
    for handled in self._before:
      signal.signal(handled, signal.SIG_DFL)

  def __exit__(self, *_: Any) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)


# Steps between agreements of several processes; each costs a round trip.
AGREE_EVERY = 8


def should_stop(run: Run, done: int) -> bool:
  """Returns whether all processes must save and stop after this step."""
  if jax.process_count() == 1:
    run.stopped_by = run.signal
  elif done % AGREE_EVERY == 0:
    signals = multihost_utils.process_allgather(np.int32(run.signal))
    run.stopped_by = int(signals.max())
  return bool(run.stopped_by)
