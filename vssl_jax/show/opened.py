"""A run opened for pictures: its clips, its method and what it saved."""

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import SingleDeviceSharding

from vssl_jax import config as config_lib
from vssl_jax import encoders, rngs
from vssl_jax.data import pipeline
from vssl_jax.methods import base
from vssl_jax.show import pixels, sheet
from vssl_jax.train import checkpoint, manifests


@dataclasses.dataclass(frozen=True)
class Shown:
  """A run opened for pictures.

  Attributes:
    folder: the run's.
    record: its `run.json`.
    config: the config in it.
    method: built from that.
    batch: `video` and `index` of the clips to draw.
  """

  folder: pathlib.Path
  record: dict[str, Any]
  config: ml_collections.ConfigDict
  method: base.Method
  batch: dict[str, np.ndarray]


def method_of(
  folder: pathlib.Path,
) -> tuple[dict[str, Any], ml_collections.ConfigDict, base.Method]:
  """Returns what `run.json` says of a run, its config and its method."""
  record = manifests.load_record(folder)
  config = config_lib.from_json(record['config'])
  return record, config, encoders.method_of(record)


def open_run(folder: pathlib.Path, clips: int) -> Shown:
  """Returns a run with its first clips.

  Raises:
    ValueError: no clips are asked for, or none can be read.
  """
  if clips < 1:
    raise ValueError(f'--clips: found {clips}, wanted at least 1')
  record, config, method = method_of(folder)
  data = config.data.to_dict() | {'workers': 0}
  first = next(iter(pipeline.evaluation(data, batch_size=clips)))
  there = first['weight'] > 0
  batch = {k: np.asarray(first[k])[there] for k in ('video', 'index')}
  if not there.any():
    raise ValueError(f'{folder}: none of the first {clips} videos can be read')
  return Shown(folder, record, config, method, batch)


def params(
  folder: pathlib.Path, phase: base.Phase, subtree: str = 'params'
) -> Any:
  """Returns the newest parameters of a phase, None if none are saved."""
  found = [s for s in manifests.listing(folder) if s.phase == phase.name]
  found = [s for s in found if not manifests.damage(s)]
  if not found:
    return None
  saved = max(found, key=lambda s: s.step)
  place = SingleDeviceSharding(jax.local_devices()[0])
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    saved.shapes(subtree),
  )
  return checkpoint.restore(saved, target, subtree)


def rng(shown: Shown) -> rngs.Rng:
  """Returns the randomness of the run's first step."""
  return rngs.Rng(jax.random.key(shown.config.seed), jax.numpy.int32(0))


def frames(clips: np.ndarray, i: int) -> list[np.ndarray]:
  """Returns some frames of a clip, in colour."""
  return list(sheet.some(pixels.rgb(clips[i])))


def teachers(
  shown: Shown, phase: base.Phase, names: Iterable[str]
) -> dict[str, Any]:
  """Returns the parameters of some of a phase's teachers.

  Raises:
    ValueError: one is not there any more.
  """
  found = {}
  for name in names:
    teacher = phase.teachers[name]
    source = teacher.source
    if source.startswith('@'):
      source = f'{shown.folder}{source}'
    loaded = encoders.load_as(source, teacher.module)
    found[name] = loaded.at(shown.batch['video'].shape[1:]).params
  return found
