"""The methods, each one file on the contract of `methods/base.py`.

Beside it stands a file with its knobs and the builder that reads them.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections

from vssl_jax import colours, ranges
from vssl_jax.methods import (
  base,
  kdhiera_config,
  layerlock_config,
  pmd_config,
  salt_config,
  supervised_config,
)

METHODS = {
  'kdhiera': kdhiera_config,
  'layerlock': layerlock_config,
  'pmd': pmd_config,
  'salt': salt_config,
  'supervised': supervised_config,
}


def keys(name: str) -> ranges.Section:
  """Returns the keys of a method, with defaults and ranges.

  Raises:
    ValueError: no method has that name.
  """
  return _find(name).KEYS


def default(name: str) -> ml_collections.ConfigDict:
  """Returns the section of a method at its defaults."""
  return keys(name).defaults()


def build(
  config: ml_collections.ConfigDict,
  video: tuple[int, ...],
  resolve: Callable[[str], Any],
  pixels: colours.Colours | None = None,
) -> base.Method:
  """Builds the method that `config.method` describes.

  Args:
    config: `config.method`.
    video: (T, H, W, C) of a clip.
    resolve: source of an outside teacher (run folder, published model) ->
      its module.
    pixels: mean and deviation of the clips; None for the defaults of so many
      channels.

  Raises:
    ValueError: a knob or a plan that cannot run.
  """
  pixels = pixels or colours.of(video[-1])
  method = _find(config.name).build(config, video, resolve, pixels)
  for phase in base.check(method.phases()):
    for name, teacher in phase.teachers.items():
      if teacher.source.startswith('@'):  # it has the colours of this run
        continue
      mean = getattr(teacher.module, 'image', teacher.module).mean
      colours.check(video[-1], mean, f'teacher {name!r} ({teacher.source})')
  return method


def undecided(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """Returns the knobs of `config.method` that a short run is to decide."""
  knobs = getattr(_find(config.name), 'AUTO', ())
  return tuple(name for name in knobs if config[name] == 'auto')


def trial(
  config: ml_collections.ConfigDict,
) -> tuple[ml_collections.ConfigDict, int, int]:
  """Returns `config.method` of the short run that decides.

  Beside it stand the short run's steps and those of the whole run.

  Raises:
    ValueError: the method leaves nothing open.
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
  """Returns the knobs that a short run proposes.

  Args:
    config: `config.method`.
    steps: at which the health panel looked at the short run.
    drift: at each look, block -> relative change since the look before.
  """
  return _find(config.name).decide(config, steps, drift)


def _find(name: str) -> Any:
  if name not in METHODS:
    near = difflib.get_close_matches(name, METHODS, 1)
    raise ValueError(
      f'method.name: found {name!r}, wanted one of {sorted(METHODS)}'
      + (f'; did you mean {near[0]!r}?' if near else '')
    )
  return METHODS[name]
