"""The methods, each one file on the contract of `methods/base.py`.

Beside it stands a file with its knobs and the builder that reads them.
"""

import difflib
from collections.abc import Callable
from typing import Any

import ml_collections

from vssl_jax.methods import base, layerlock_config, salt_config

METHODS = {'layerlock': layerlock_config, 'salt': salt_config}


def default(name: str) -> ml_collections.ConfigDict:
  """Returns the knobs of a method.

  Raises:
    ValueError: no method has that name.
  """
  return _find(name).default()


def build(
  config: ml_collections.ConfigDict,
  video: tuple[int, ...],
  resolve: Callable[[str], Any],
) -> base.Method:
  """Builds the method that `config.method` describes.

  Args:
    config: `config.method`.
    video: (T, H, W, C) of a clip.
    resolve: source of an outside teacher (run folder, published model) ->
      its module.
  """
  return _find(config.name).build(config, video, resolve)


def _find(name: str) -> Any:
  if name not in METHODS:
    near = difflib.get_close_matches(name, METHODS, 1)
    raise ValueError(
      f'method.name: found {name!r}, wanted one of {sorted(METHODS)}'
      + (f'; did you mean {near[0]!r}?' if near else '')
    )
  return METHODS[name]
