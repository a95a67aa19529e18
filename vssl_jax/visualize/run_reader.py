"""Opens a run for visualisation: clips, phases and saved parameters."""

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import SingleDeviceSharding

from vssl_jax import encoder, rngs
from vssl_jax.checkpoint import integrity, manager
from vssl_jax.data import batch as batch_lib
from vssl_jax.data import pipeline
from vssl_jax.methods import phase as phase_lib
from vssl_jax.utils import config_io, image_grid


@dataclasses.dataclass(frozen=True)
class Shown:
  """A run opened for visualisation.

  Attributes:
    folder: the run folder.
    record: contents of its `run.json`.
    config: config of the record.
    phases: the phases of the run.
    batch: `video` and `index` of the clips to draw.
  """

  folder: pathlib.Path
  record: dict[str, Any]
  config: ml_collections.ConfigDict
  phases: tuple[phase_lib.Phase, ...]
  batch: batch_lib.Batch


def phases_of(
  folder: pathlib.Path,
) -> tuple[
  dict[str, Any], ml_collections.ConfigDict, tuple[phase_lib.Phase, ...]
]:
  """Returns the record of a run (`run.json`), its config and its phases."""
  record = integrity.load_record(folder)
  config = config_io.from_json(record['config'])
  return record, config, encoder.phases_of(record)


def open_run(folder: pathlib.Path, clips: int) -> Shown:
  """Opens a run with its first clips.

  Args:
    folder: the run folder.
    clips: number of clips.

  Raises:
    ValueError: `clips` is below 1, or no clip can be read.
  """
  if clips < 1:
    raise ValueError(f'--clips: found {clips}, wanted at least 1')
  record, config, phases = phases_of(folder)
  data = config.data.to_dict() | {'workers': 0}
  first = next(iter(pipeline.evaluation(data, batch_size=clips)))
  is_real = first['weight'] > 0
  batch = batch_lib.Batch(
    **{k: np.asarray(first[k])[is_real] for k in ('video', 'index')}
  )
  if not is_real.any():
    raise ValueError(f'{folder}: none of the first {clips} videos can be read')
  return Shown(folder, record, config, phases, batch)


def params(
  folder: pathlib.Path, phase: phase_lib.Phase, subtree: str = 'params'
) -> Any:
  """Returns the newest intact parameters of a phase; None if there are none."""
  checkpoints = [s for s in integrity.listing(folder) if s.phase == phase.name]
  checkpoints = [s for s in checkpoints if not integrity.damage(s)]
  if not checkpoints:
    return None
  newest = max(checkpoints, key=lambda s: s.step)
  device = SingleDeviceSharding(jax.local_devices()[0])
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
    newest.shapes(subtree),
  )
  return manager.restore(newest, target, subtree)


def rng(shown: Shown) -> rngs.Rng:
  """Returns the random streams of the run's first step."""
  return rngs.Rng(jax.random.key(shown.config.seed), jax.numpy.int32(0))


def frames(clips: np.ndarray, i: int) -> list[np.ndarray]:
  """Returns evenly spaced frames of clip `i`, in colour."""
  return list(image_grid.some(image_grid.rgb(clips[i])))


def teachers(
  shown: Shown, phase: phase_lib.Phase, names: Iterable[str]
) -> dict[str, Any]:
  """Returns the parameters of the named teachers of a phase.

  Raises:
    ValueError: the weights of a teacher are not available.
  """
  teacher_params = {}
  for name in names:
    teacher = phase.teachers[name]
    source = str(teacher.source)
    if isinstance(teacher.source, phase_lib.FromPhase):
      source = f'{shown.folder}{source}'
    teacher_encoder = encoder.load_as(source, teacher.module)
    teacher_params[name] = teacher_encoder.at(
      shown.batch.video.shape[1:]
    ).params
  return teacher_params
