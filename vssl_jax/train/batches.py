"""Batches of a phase, with cached targets of its frozen teachers.

Without a target cache the step computes its targets. With one, they are read
from disk. If some targets of a batch are missing, a separate program computes
those of the whole batch, and the missing ones are written. With a cache all
targets, read or computed, are rounded to the stored dtype, so that a clip has
the same targets at every visit. Without one nothing is rounded.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Shaped

from vssl_jax import encoder, sharding
from vssl_jax.checkpoint import integrity
from vssl_jax.data import batch as batch_lib
from vssl_jax.methods import phase as phase_lib
from vssl_jax.target_cache import policy, store
from vssl_jax.train import phase_setup, phase_start
from vssl_jax.train import run as run_lib
from vssl_jax.train.run import Run


def check(run: Run) -> None:
  """Checks before training that the targets of a run can be cached.

  Raises:
    ValueError: see `policy.check`.
  """
  if run.config.cache_targets:
    cached = [phase_setup.cached(run.config, p, run.video) for p in run.phases]
    policy.check(run.config, cached, jax.process_count())


class Source:
  """Provides batches and teacher parameters for the steps of a phase.

  Args:
    run: the run.
    setup: setup of the phase.
    read_only: write no targets to disk.

  Attributes:
    teachers: name -> parameters of the teachers that the step evaluates.

  Raises:
    ValueError: the cache on disk is of other clips or teachers.
  """

  def __init__(
    self, run: Run, setup: phase_setup.PhaseSetup, read_only: bool = False
  ) -> None:
    self._run, self._setup = run, setup
    self._store: store.Store | None = None
    self._ask: Callable[[Any], Mapping[str, Any]] | None = None
    phase, cached = setup.span.phase, setup.cached
    self.teachers = self._load(*(n for n in setup.step_teachers))
    if cached is None:
      return
    self._store = store.Store(
      policy.folder(run.config, phase, cached),
      _key(run, phase, cached),
      read_only,
    )
    run.logger.log(
      f'phase {phase.name}: targets of {", ".join(cached.teachers)} in '
      f'{self._store.path}: {self._store.count:,} of '
      f'{run.clips.num_trained:,} clips'
    )

  def batch(
    self, local: Mapping[str, np.ndarray], done: int
  ) -> batch_lib.Batch:
    """Returns a step's batch on the mesh, with cached targets if any.

    Args:
      local: this process's part of the batch.
      done: completed steps of the run.
    """
    batch = run_lib.on_device(self._run, local, done, self._setup.span.total)
    if self._store is None:
      return batch
    index = local['index']
    present = self._store.has(index)
    targets = self._store.read(index[present])
    if not present.all():
      computed = jax.device_get(self._asked(batch.video))
      self._store.write(index, computed)
      targets = {
        n: _filled(x, present, targets.get(n)) for n, x in computed.items()
      }
    targets = sharding.put_batch(targets, self._run.mesh)
    return dataclasses.replace(batch, targets=targets)

  def close(self) -> None:
    """Flushes and closes the target cache."""
    if self._store is not None:
      self._store.close()

  def _asked(self, video: jax.Array) -> Mapping[str, jax.Array]:
    """Computes teacher outputs; loads the teachers at the first call."""
    if self._ask is None:
      phase, cached = self._setup.span.phase, self._setup.cached
      params = self._load(*cached.teachers)

      def compute(params: Any, video: Any) -> dict[str, jax.Array]:
        targets = phase.targets(params, video)
        return {n: x.astype(cached.shapes[n].dtype) for n, x in targets.items()}

      batch_sharding = sharding.batch_sharding(self._run.mesh)
      program = jax.jit(compute, out_shardings=batch_sharding)
      self._ask = lambda video: program(params, video)
    return self._ask(video)

  def _load(self, *names: str) -> dict[str, Any]:
    """Returns name -> parameters of the named teachers."""
    phase = self._setup.span.phase
    selected = {n: phase.teachers[n] for n in names}
    return phase_start.teachers(
      self._run, dataclasses.replace(phase, teachers=selected)
    )


def _filled(
  new: Shaped[np.ndarray, 'B ...'],
  there: Bool[np.ndarray, 'B'],
  rows: Shaped[np.ndarray, 'N ...'] | None,
) -> Shaped[np.ndarray, 'B ...']:
  """Returns computed targets, replaced by cached `rows` where present."""
  targets = np.array(new)
  if there.any():
    targets[there] = rows
  return targets


def _key(
  run: Run, phase: phase_lib.Phase, kept: policy.Cached
) -> dict[str, Any]:
  """Returns the cache key: everything that the stored targets depend on."""
  return {
    'examples': run.clips.num_examples,
    'videos': run.clips.fingerprint,
    'clip': policy.clip_key(run.config),
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


def _weights(run: Run, teacher: phase_lib.Teacher) -> str:
  """Returns a hash of a teacher's parameters without loading them."""
  if isinstance(teacher.source, phase_lib.FromWeights):
    return encoder.fingerprint(teacher.source.path)
  saved = run.checkpoints.params_of(teacher.source.name)
  if saved is None:
    raise run_lib.TrainingError(
      f'teacher {teacher.source}: its parameters were never saved under '
      f'{run.checkpoints.params_folder}'
    )
  return integrity.fingerprint(saved, f'params/{teacher.subtree}')
