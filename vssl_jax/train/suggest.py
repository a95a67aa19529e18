"""Knobs that a short run decides: `--suggest`, and `auto` in a config.

A method may leave knobs open (`methods.undecided`). The short run it asks for
(`methods.trial`) trains at a constant learning rate after its warm-up, while
the health panel follows how far every block moves; from that the method
decides (`methods.decide`).
"""

import pathlib
from typing import Any

import jax
import ml_collections
from jax.experimental import multihost_utils

from vssl_jax import config as config_lib
from vssl_jax import methods
from vssl_jax.train import manifests, metrics, trainer

LOOKS = 20  # of the health panel in a short run


def train(config: ml_collections.ConfigDict, **kwargs: Any) -> int:
  """Decides what is `auto`, once, and trains.

  A run that has begun keeps what it was begun with.

  Args:
    config: a resolved config; what is decided is written into it.
    **kwargs: of `trainer.train`.

  Returns:
    The exit status, as of `trainer.train`.
  """
  open_knobs = methods.undecided(config.method)
  if open_knobs:
    found = _begun_with(config, open_knobs)
    if not found:
      status, found = decide(config)
      if status:
        return status
    with config.unlocked():
      config.method.update(found)
    if jax.process_index() == 0:
      print(text(found), flush=True)
  return trainer.train(config, **kwargs)


def show(config: ml_collections.ConfigDict) -> int:
  """Runs the short run of a config and prints what it proposes.

  Raises:
    ValueError: the method has nothing to decide.
  """
  status, found = decide(config)
  if not status and jax.process_index() == 0:
    print(text(found), flush=True)
  return status


def decide(config: ml_collections.ConfigDict) -> tuple[int, dict[str, Any]]:
  """Returns an exit status, and the knobs that a short run proposes.

  Args:
    config: a resolved config; the short run's folder is `suggest` in its
      workdir, and is resumed like any run.
  """
  trial = config_lib.from_json(config_lib.to_json(config))
  trial.method, steps, total = methods.trial(config.method)
  trial.workdir = str(pathlib.Path(config.workdir) / 'suggest')
  trial.health.every = 1 / min(LOOKS, steps)
  trial.checkpoint.every = max(steps // 2, 1)
  trial.checkpoint.keep_phases = ('.*',)  # it has phases of its own
  trial.optim.schedule = 'constant'  # else every block slows down with it
  if config.optim.warmup > 0:
    trial.optim.warmup = max(round(config.optim.warmup * steps / total), 1)
  status = trainer.train(trial)
  if status:
    return status, {}
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('suggest')  # the log is written
  at, drift = _drift(pathlib.Path(trial.workdir) / metrics.FILE)
  return 0, methods.decide(config.method, at, drift)


def text(found: dict[str, Any]) -> str:
  """Returns knobs as the flags that set them."""
  return ' '.join(
    f"'--config.method.{key}={value}'" for key, value in found.items()
  )


def _begun_with(
  config: ml_collections.ConfigDict, knobs: tuple[str, ...]
) -> dict[str, Any]:
  """Returns the knobs of a run that has begun in this workdir, if one has."""
  path = pathlib.Path(config.workdir) / 'run.json'
  if not path.exists():
    return {}
  record = manifests.load_record(path.parent)
  before = config_lib.from_json(record['config'])
  return {name: before.method[name] for name in knobs}


def _drift(path: pathlib.Path) -> tuple[list[int], list[dict[int, float]]]:
  """Returns the steps at which the panel looked, and block -> drift there."""
  prefix, found = 'drift/block_', {}
  for record in metrics.read(path):
    moved = {
      int(key.removeprefix(prefix)): value
      for key, value in record.items()
      if key.startswith(prefix)
    }
    if moved:
      found[record['step']] = moved
  # The first stretch is shorter: the panel also looks early in a phase.
  steps = sorted(found)[1:]
  return steps, [found[step] for step in steps]
