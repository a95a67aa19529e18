"""What all phases of a run share, and how a run is opened or resumed."""

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

from vssl_jax import config as config_lib
from vssl_jax import encoders, methods, sharding
from vssl_jax.data import options, pipeline
from vssl_jax.methods import base
from vssl_jax.models import float8
from vssl_jax.train import (
  checkpoint,
  data_changes,
  health,
  keeping,
  manifests,
  metrics,
  order,
  provenance,
)


class TrainingError(RuntimeError):
  """The run cannot go on; the message says why and what to do."""


@runtime_checkable
class Watcher(Protocol):
  """Looks at a run between steps, such as the health panel."""

  def due(self, done: int, span_start: int) -> bool:
    """Returns whether it looks after this step."""

  def look(self, run: Any, span: Any, state: Any, done: int) -> list[str]:
    """Looks, logs, and returns lines to say aloud."""


@dataclasses.dataclass
class Run:
  """What all phases of one run share."""

  config: ml_collections.ConfigDict
  workdir: pathlib.Path
  mesh: jax.sharding.Mesh
  clips: pipeline.Clips
  method: base.Method
  checkpoints: checkpoint.Checkpoints
  logger: metrics.Logger
  clock: metrics.Clock
  panel: health.Panel
  kept_phases: tuple[str, ...]  # whose parameters are saved at their end
  read_only: bool = False
  watchers: Sequence[Watcher] = ()
  left_out: order.Ranges = ()  # batches that no step takes
  rewinds: list[dict[str, int]] = dataclasses.field(default_factory=list)
  # How the videos changed between starts, where data.allow_change let it.
  data_changes: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  signal: int = 0  # that asked this process to save and stop; 0: none
  stopped_by: int = 0  # the signal that all processes agreed to stop on

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
  """A phase and where it lies in a run of `total` steps: `start` to `end`.

  `covers` is the first step and the length of what its schedules cover: the
  phase, or all neighbours whose horizon is `run`.
  """

  phase: base.Phase
  start: int
  end: int
  total: int
  covers: tuple[int, int]


def spans(method: base.Method) -> tuple[Span, ...]:
  """Returns the phases with their cumulative boundaries."""
  phases = method.phases()
  ends = list(itertools.accumulate(phase.steps for phase in phases))
  out = []
  for shared, group in itertools.groupby(
    zip(phases, ends, strict=True), key=lambda pair: pair[0].horizon == 'run'
  ):
    stretch = list(group)
    first = stretch[0][1] - stretch[0][0].steps
    for phase, end in stretch:
      start = end - phase.steps
      covers = (
        (first, stretch[-1][1] - first) if shared else (start, phase.steps)
      )
      out.append(Span(phase, start, end, ends[-1], covers))
  return tuple(out)


def open_run(config: ml_collections.ConfigDict, read_only: bool = False) -> Run:
  """Opens everything that a run needs, and checks that it fits together.

  Args:
    config: a resolved config.
    read_only: write nothing, and leave what another process may be writing.
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
  method = methods.build(
    config.method,
    tuple(clips.shapes['video']),
    encoders.module_of,
    options.colours_of(config.data),
  )
  phases = method.phases()
  check_units(phases, jax.devices()[0])
  if any(phase.row_specs for phase in phases):
    _check_distinct(config, clips)
  return Run(
    config=config,
    workdir=workdir,
    mesh=mesh,
    clips=clips,
    method=method,
    checkpoints=checkpoint.Checkpoints(
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
    kept_phases=keeping.phases(config.checkpoint.keep_phases, phases),
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


def check_units(phases: Sequence[base.Phase], device: Any) -> None:
  """Refuses teachers in 8 bits on devices that would be slower for it."""
  for phase in phases:
    for name, teacher in phase.teachers.items():
      if teacher.dtype == 'float8' and not float8.has_units(device):
        raise ValueError(
          f'phase {phase.name!r}: teacher {name!r} has dtype float8, and '
          f'{device.device_kind} has no matrix units for it; wanted a GPU of '
          'compute capability 8.9 or newer. Set it to bfloat16, or to '
          'float8_emulated to see what it does to the targets'
        )


def _check_distinct(
  config: ml_collections.ConfigDict, clips: pipeline.Clips
) -> None:
  """Refuses batches that may hold an example twice: which row would stay?"""
  data, size = config.data, config.batch_size
  why = ''
  if data.repeats > 1:
    why = f'data.repeats={data.repeats}; set --config.data.repeats=1'
  elif data.weights:
    why = f'data.weights={data.weights}; set --config.data.weights=()'
  elif not clips.distinct:
    why = (
      f'batch_size={size} of {clips.num_examples} videos; lower '
      '--config.batch_size to as many at most'
    )
  if why:
    raise ValueError(
      f'{config.method.name} remembers every training example, and a batch may '
      f'not hold one twice, as it may with {why}'
    )


def check_same_run(run: Run, saved: manifests.Saved | None) -> None:
  """Compares a resumed run with its `run.json`, and reads what it left out.

  Raises:
    TrainingError: it is another run, or took other batches so far.
  """
  if saved is not None:
    before = _record(run) or saved.manifest
    _check_config(run, before)
    run.left_out = order.from_json(before.get('left_out', ()))
    run.rewinds = before.get('rewinds', [])
    run.data_changes = before.get('data_changes', [])
    _check_data(run, before, saved.step)
    _check_batches(run, saved)


def _record(run: Run) -> dict[str, Any] | None:
  """Returns the record of an earlier start; a corrupt one is set aside."""
  path = run.workdir / manifests.RUN
  try:
    return manifests.load(path)
  except FileNotFoundError:
    return None
  except manifests.CorruptError as error:
    run.logger.say(
      f'{error}. The newest checkpoint says what the run is; the file is set '
      f'aside as {path.name}.rotten and written again'
    )
    if not run.read_only and jax.process_index() == 0:
      path.replace(path.with_name(f'{path.name}.rotten'))
    return None


def check_may_resume(run: Run, saved: manifests.Saved | None) -> None:
  """Refuses a folder that holds a run, if that was asked for."""
  if saved is not None and not run.config.checkpoint.resume:
    raise TrainingError(
      f'{run.workdir} holds a run at step {saved.step} and '
      'checkpoint.resume is False; give a new --config.workdir'
    )


def _check_config(run: Run, record: Mapping[str, Any]) -> None:
  """Refuses a config that differs in a key that may not.

  A key that is newer than the run may only have its default, which leaves
  runs as they were.
  """
  if 'config' not in record:
    return
  _check_rounding(run, record['config'])
  before = config_lib.from_json(record['config'])
  defaults = dict(config_lib.flatten(config_lib.default(before.method.name)))
  known = dict(config_lib.flatten(before))
  newer = tuple(
    key
    for key, value in config_lib.flatten(run.config)
    if key not in known and defaults.get(key) == value
  )
  if newer:
    run.logger.say(f'newer than this run, at their defaults: {list(newer)}')
  changed = config_lib.difference(
    before, run.config, (*run.config.checkpoint.may_change, *newer)
  )
  if changed:
    raise TrainingError(
      f'{run.workdir} was started with another config:\n{changed}\n'
      'resume with the old values, or give a new --config.workdir'
    )


def _check_data(run: Run, record: Mapping[str, Any], step: int) -> None:
  """Refuses other videos than before, or records them with data.allow_change.

  Raises:
    TrainingError: the videos changed, and that was not allowed.
  """
  change = data_changes.compare(run.workdir, record, run.clips)
  if not change:
    return
  if not run.config.data.allow_change:
    raise TrainingError(
      f'{run.workdir}: the videos are not those that the run was started with: '
      f'{change}. Put them back as they were, or give a new --config.workdir, '
      'or go on with other batches: --config.data.allow_change=True'
    )
  run.logger.say(f'data.allow_change: going on at step {step} with {change}')
  run.data_changes = [*run.data_changes, {'step': step, 'change': change}]


def _check_rounding(run: Run, before: Mapping[str, Any]) -> None:
  """Refuses targets of another precision: a cache rounds, its place does not.

  Raises:
    TrainingError: the run kept targets and is not to any more, or vice versa.
  """
  was = before.get('cache_targets', '')
  now = run.config.cache_targets
  if bool(was) != bool(now):
    raise TrainingError(
      f'{run.workdir} was started with cache_targets={was!r}, found {now!r}: '
      'targets that are kept are rounded, so the numbers would differ. Wanted '
      + (f'a folder, such as {was}' if was else "''")
      + '; or give a new --config.workdir'
    )


def _check_batches(run: Run, saved: manifests.Saved) -> None:
  """Refuses a state that came from other batches than the record says."""
  took = order.from_json(saved.manifest.get('left_out', ()))
  took, should = (order.passed(x, saved.step) for x in (took, run.left_out))
  if took != should:
    raise TrainingError(
      f'{run.workdir}/run.json leaves out batches {should} up to step '
      f'{saved.step}, and checkpoint {saved.path.name} left out {took}: they '
      'are not of one run. Put the right run.json back, or remove it and the '
      "checkpoint's list counts"
    )


def write_record(run: Run) -> None:
  """Writes `run.json`: what the run is, and what it needs to be rebuilt."""
  config = config_lib.to_json(run.config)
  record = {
    'config': config,
    'video': list(run.video),
    'data_fingerprint': run.clips.fingerprint,
    'data_changes': run.data_changes,
    'num_examples': run.clips.num_examples,
    'classes': run.clips.classes,
    'left_out': run.left_out,
    'rewinds': run.rewinds,
    'outside': encoders.outside(run.method),
    'provenance': provenance.describe(config),
  }
  if jax.process_index() == 0:
    data_changes.store(run.workdir, run.clips)
    manifests.write_atomic(run.workdir / manifests.RUN, record, indent=1)


def on_device(
  run: Run, local: Mapping[str, np.ndarray], done: int, total: int
) -> dict[str, Any]:
  """Returns a step's batch with its place in the run, on the mesh.

  Args:
    run: the run.
    local: this process's part.
    done: steps done.
    total: steps of the run.
  """
  local = dict(local, progress=np.float32(done / total))
  return sharding.put_batch(local, run.mesh)


class Preemption:
  """Turns the first SIGTERM or Ctrl-C into a request to save and stop.

  The second one ends the process. A SIGINT that is ignored, as in what a shell
  starts in the background, stays ignored.
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


# Steps between agreements of several processes; each costs them a round trip.
AGREE_EVERY = 8


def should_stop(run: Run, done: int) -> bool:
  """Returns whether all processes are to save and stop after this step."""
  if jax.process_count() == 1:
    run.stopped_by = run.signal
  elif done % AGREE_EVERY == 0:
    signals = multihost_utils.process_allgather(np.int32(run.signal))
    run.stopped_by = int(signals.max())
  return bool(run.stopped_by)
