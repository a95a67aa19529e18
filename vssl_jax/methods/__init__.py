"""Training methods, by name.

Each method is one module that implements the interface of `methods/phase.py`.
A second module, `<method>_config.py`, has its config keys and its builder.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections

from vssl_jax.methods import (
  kdhiera_config,
  layerlock_config,
  pmd_config,
  salt_config,
  supervised_config,
)
from vssl_jax.methods import phase as phase_lib
from vssl_jax.utils import colours, ranges

METHODS = {
  'kdhiera': kdhiera_config,
  'layerlock': layerlock_config,
  'pmd': pmd_config,
  'salt': salt_config,
  'supervised': supervised_config,
}


def keys(name: str) -> ranges.Section:
  """Returns the config keys of a method, with defaults and ranges.

  Raises:
    ValueError: no method has that name.
  """
  return _find(name).KEYS


def default(name: str) -> ml_collections.ConfigDict:
  """Returns the default config section of a method."""
  return keys(name).defaults()


def build(
  config: ml_collections.ConfigDict,
  video: tuple[int, ...],
  resolve: Callable[[str], Any],
  pixels: colours.Colours | None = None,
) -> phase_lib.Method:
  """Builds the method that `config.method` describes.

  Args:
    config: `config.method`.
    video: (T, H, W, C) of a clip.
    resolve: source of an outside teacher (run folder, published model) ->
      its module.
    pixels: mean and standard deviation of the pixels; None for the defaults of
      C channels.

  Raises:
    ValueError: an option is invalid, or the phases cannot run.
  """
  pixels = pixels or colours.of(video[-1])
  method = _find(config.name).build(config, video, resolve, pixels)
  for phase in phase_lib.check(method.phases()):
    for name, teacher in phase.teachers.items():
      if teacher.source.startswith('@'):  # uses this run's mean and std
        continue
      mean = getattr(teacher.module, 'image', teacher.module).mean
      colours.check(video[-1], mean, f'teacher {name!r} ({teacher.source})')
  return method


def undecided(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """Returns the options of `config.method` that a short run determines."""
  options = getattr(_find(config.name), 'AUTO', ())
  return tuple(name for name in options if config[name] == 'auto')


def trial(
  config: ml_collections.ConfigDict,
) -> tuple[ml_collections.ConfigDict, int, int]:
  """Returns the config of the short run that determines open options.

  Returns:
    `config.method` of the short run, its number of steps, and the number of
    steps of the whole run.

  Raises:
    ValueError: the method has no option that a run determines.
  """
  module = _find(config.name)
  if not hasattr(module, 'trial'):
    raise ValueError(f'--suggest: {config.name} has no knob that a run decides')
  return module.trial(config)


def decide(
  config: ml_collections.ConfigDict,
  steps: Sequence[int],
  drift: Sequence[Mapping[int, float]],
) -> dict[str, Any]:
  """Returns the options that a short run proposes, name -> value.

  Args:
    config: `config.method`.
    steps: steps of the short run at which drift was measured.
    drift: per measurement, block -> relative change of its weights since the
      previous measurement.
  """
  return _find(config.name).decide(config, steps, drift)


def _find(name: str) -> Any:
  if name not in METHODS:
    matches = difflib.get_close_matches(name, METHODS, 1)
    raise ValueError(
      f'method.name: found {name!r}, wanted one of {sorted(METHODS)}'
      + (f'; did you mean {matches[0]!r}?' if matches else '')
    )
  return METHODS[name]
