"""Sets open config keys by a trial run: `--suggest`, and `auto` in a config.

A method may leave config keys open (`methods.undecided`). Its trial run
(`methods.trial`) trains at a constant learning rate after the warm-up, and the
health panel logs the weight drift of every block. The method computes the keys
from the drift (`methods.decide`).
"""

import pathlib
from typing import Any

import jax
import ml_collections
from jax.experimental import multihost_utils

from vssl_jax import methods
from vssl_jax.checkpoint import integrity
from vssl_jax.train import loop
from vssl_jax.utils import config_io, metrics

LOOKS = 20  # measurements of the health panel in a trial run


def train(config: ml_collections.ConfigDict, **kwargs: Any) -> int:
  """Sets the keys that are `auto` by a trial run, once, and trains.

  A run that has started keeps the keys that it was started with.

  Args:
    config: a resolved config; the keys are written into it.
    **kwargs: passed to `loop.train`.

  Returns:
    The exit status, as of `loop.train`.
  """
  open_keys = methods.undecided(config.method)
  if open_keys:
    values = _begun_with(config, open_keys)
    if not values:
      status, values = decide(config)
      if status:
        return status
    with config.unlocked():
      config.method.update(values)
    if jax.process_index() == 0:
      print(text(values), flush=True)
  return loop.train(config, **kwargs)


def show(config: ml_collections.ConfigDict) -> int:
  """Runs the trial run of a config and prints the proposed keys.

  Returns:
    The exit status of the trial run.

  Raises:
    ValueError: the method has no key that a trial run sets.
  """
  status, values = decide(config)
  if not status and jax.process_index() == 0:
    print(text(values), flush=True)
  return status


def decide(config: ml_collections.ConfigDict) -> tuple[int, dict[str, Any]]:
  """Returns an exit status, and the keys that a trial run proposes.

  Args:
    config: a resolved config. The folder of the trial run is `suggest` in its
      workdir; the trial run is resumed like any run.
  """
  trial = config_io.from_json(config_io.to_json(config))
  trial.method, steps, total = methods.trial(config.method)
  trial.workdir = str(pathlib.Path(config.workdir) / 'suggest')
  trial.health.every = 1 / min(LOOKS, steps)
  trial.checkpoint.every = max(steps // 2, 1)
  trial.checkpoint.keep_phases = ('.*',)  # the trial has its own phases
  trial.optim.schedule = 'constant'  # a decay would slow down every block
  if config.optim.warmup > 0:
    trial.optim.warmup = max(round(config.optim.warmup * steps / total), 1)
  status = loop.train(trial)
  if status:
    return status, {}
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('suggest')  # the log is complete
  drift_steps, drift = _drift(pathlib.Path(trial.workdir) / metrics.FILE)
  return 0, methods.decide(config.method, drift_steps, drift)


def text(found: dict[str, Any]) -> str:
  """Returns config keys as command-line flags."""
  return ' '.join(
    f"'--config.method.{key}={value}'" for key, value in found.items()
  )


def _begun_with(
  config: ml_collections.ConfigDict, knobs: tuple[str, ...]
) -> dict[str, Any]:
  """Returns the keys of the run in this workdir; {} if there is none."""
  path = pathlib.Path(config.workdir) / 'run.json'
  if not path.exists():
    return {}
  record = integrity.load_record(path.parent)
  before = config_io.from_json(record['config'])
  return {name: before.method[name] for name in knobs}


def _drift(path: pathlib.Path) -> tuple[list[int], list[dict[int, float]]]:
  """Returns the steps of the measurements, and block -> drift of each."""
  prefix, drift_by_step = 'drift/block_', {}
  for record in metrics.read(path):
    drift = {
      int(key.removeprefix(prefix)): value
      for key, value in record.items()
      if key.startswith(prefix)
    }
    if drift:
      drift_by_step[record['step']] = drift
  # The first interval is shorter: the panel also measures early in a phase.
  steps = sorted(drift_by_step)[1:]
  return steps, [drift_by_step[step] for step in steps]
