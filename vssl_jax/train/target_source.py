"""The batches of a phase, with what its frozen teachers say of them.

Without a cache the step asks its teachers itself. With one, targets are read
from the disk; where some of a batch are missing, a program of its own asks the
teachers about all of it and what was missing is written. Read or asked, with a
cache the step gets them rounded to the stored type, so that it is the same at
every visit; without one nothing is rounded.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Shaped

from vssl_jax import encoders, sharding
from vssl_jax.methods import base
from vssl_jax.train import (
  ahead,
  begin,
  manifests,
  target_plan,
  target_store,
)
from vssl_jax.train import run as run_lib
from vssl_jax.train.run import Run


def check(run: Run) -> None:
  """Refuses a run whose targets cannot be kept, before it trains anything.

  Raises:
    ValueError: see `target_plan.check`.
  """
  if run.config.cache_targets:
    kept = ahead.cached_of(run.config, run.method, run.video)
    target_plan.check(run.config, kept, jax.process_count())


class Source:
  """Makes what the steps of a phase take beside their state.

  Args:
    run: the run.
    shapes: of the phase.
    read_only: keep nothing new on disk.

  Attributes:
    teachers: name -> parameters of those that the step asks.

  Raises:
    ValueError: what is on disk is of other clips or teachers.
  """

  def __init__(
    self, run: Run, shapes: ahead.Outline, read_only: bool = False
  ) -> None:
    self._run, self._shapes = run, shapes
    self._store: target_store.Store | None = None
    self._ask: Callable[[Any], Mapping[str, Any]] | None = None
    phase, kept = shapes.span.phase, shapes.cached
    self.teachers = self._load(*(n for n in shapes.step_teachers))
    if kept is None:
      return
    self._store = target_store.Store(
      target_plan.folder(run.config, phase, kept),
      _key(run, phase, kept),
      read_only,
    )
    run.logger.say(
      f'phase {phase.name}: targets of {", ".join(kept.teachers)} in '
      f'{self._store.path}: {self._store.count:,} of '
      f'{run.clips.num_trained:,} clips'
    )

  def batch(
    self, local: Mapping[str, np.ndarray], done: int
  ) -> dict[str, jax.Array]:
    """Returns a step's batch on the mesh.

    Args:
      local: this process's part.
      done: steps done.
    """
    batch = run_lib.on_device(self._run, local, done, self._shapes.span.total)
    if self._store is None:
      return batch
    index = local['index']
    there = self._store.has(index)
    found = self._store.read(index[there])
    if not there.all():
      new = jax.device_get(self._asked(batch['video']))
      self._store.write(index, new)
      found = {n: _filled(x, there, found.get(n)) for n, x in new.items()}
    found = {base.TARGETS + n: x for n, x in found.items()}
    return batch | sharding.put_batch(found, self._run.mesh)

  def close(self) -> None:
    """Writes down what is still only in memory."""
    if self._store is not None:
      self._store.close()

  def _asked(self, video: jax.Array) -> Mapping[str, jax.Array]:
    """Asks the teachers; they are loaded when they are first needed."""
    if self._ask is None:
      phase, kept = self._shapes.span.phase, self._shapes.cached
      method, params = self._run.method, self._load(*kept.teachers)

      def say(params: Any, video: Any) -> dict[str, jax.Array]:
        found = method.targets(params, video, phase)
        return {n: x.astype(kept.shapes[n].dtype) for n, x in found.items()}

      split = sharding.batch_sharding(self._run.mesh)
      program = jax.jit(say, out_shardings=split)
      self._ask = lambda video: program(params, video)
    return self._ask(video)

  def _load(self, *names: str) -> dict[str, Any]:
    """Returns name -> parameters of some teachers of the phase."""
    phase = self._shapes.span.phase
    some = {n: phase.teachers[n] for n in names}
    return begin.teachers(self._run, dataclasses.replace(phase, teachers=some))


def _filled(
  new: Shaped[np.ndarray, 'B ...'],
  there: Bool[np.ndarray, 'B'],
  rows: Shaped[np.ndarray, 'N ...'] | None,
) -> Shaped[np.ndarray, 'B ...']:
  """Returns what was said, with what was there before in its place."""
  whole = np.array(new)
  if there.any():
    whole[there] = rows
  return whole


def _key(
  run: Run, phase: base.Phase, kept: target_plan.Cached
) -> dict[str, Any]:
  """Returns all that the numbers on disk are made of."""
  return {
    'examples': run.clips.num_examples,
    'videos': run.clips.fingerprint,
    'clip': target_plan.clip_key(run.config),
    'teachers': {
      name: {
        'weights': _weights(run, phase.teachers[name]),
        'dtype': phase.teachers[name].dtype,
      }
      for name in kept.teachers
    },
    'program': kept.program,
    'targets': kept.stored,
  }


def _weights(run: Run, teacher: base.Teacher) -> str:
  """Returns a hash of a teacher's parameters; nothing is loaded for it."""
  if not teacher.source.startswith('@'):
    return encoders.fingerprint(teacher.source)
  saved = run.checkpoints.params_of(teacher.source[1:])
  if saved is None:
    raise run_lib.TrainingError(
      f'teacher {teacher.source}: its parameters were never saved under '
      f'{run.checkpoints.params_folder}'
    )
  return manifests.fingerprint(saved, f'params/{teacher.subtree}')
