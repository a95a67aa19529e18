"""Training methods, by name.

Each method is one module with its phases, see `methods/phase.py`, and a second
one, `<method>_config.py`, with its config keys and its builder. A method may
also be a Python module outside this package; `README.md` has an example.
"""

import difflib
import importlib
import importlib.util
from collections.abc import Callable
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

  Args:
    name: one of `METHODS`, or a module on Python's path with `KEYS` and
      `build`.

  Raises:
    ValueError: no method has that name.
  """
  own = {'name': (name, ranges.Choice((name,)))}
  return ranges.Section(**own | dict(_find(name).KEYS))


def default(name: str) -> ml_collections.ConfigDict:
  """Returns the default config section of a method."""
  return keys(name).defaults()


def build(
  config: ml_collections.ConfigDict,
  video: tuple[int, ...],
  resolve: Callable[[str], Any],
  pixels: colours.Colours | None = None,
) -> tuple[phase_lib.Phase, ...]:
  """Builds the phases of the run that `config.method` describes.

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
  phases = _find(config.name).build(config, video, resolve, pixels)
  for phase in phase_lib.check(phases):
    for name, teacher in phase.teachers.items():
      if not isinstance(teacher.source, phase_lib.FromWeights):
        continue  # uses this run's mean and std
      mean = getattr(teacher.module, 'image', teacher.module).mean
      colours.check(video[-1], mean, f'teacher {name!r} ({teacher.source})')
  return phases


def _find(name: str) -> Any:
  """Returns the module of a method, of this package or of the user."""
  if name in METHODS:
    return METHODS[name]
  try:
    there = importlib.util.find_spec(name) is not None
  except (ImportError, ValueError):
    there = False
  if not there:
    matches = difflib.get_close_matches(name, METHODS, 1)
    raise ValueError(
      f'method.name: found {name!r}, wanted one of {sorted(METHODS)}, or a '
      "module on Python's path, such as my_method for my_method.py in this "
      'folder' + (f'; did you mean {matches[0]!r}?' if matches else '')
    )
  module = importlib.import_module(name)
  missing = [x for x in ('KEYS', 'build') if not hasattr(module, x)]
  if missing:
    raise ValueError(
      f'method.name: found the module {name!r} ({module.__file__}) without '
      f'{" and ".join(missing)}; wanted a method as in '
      'vssl_jax/methods/README.md'
    )
  return module
