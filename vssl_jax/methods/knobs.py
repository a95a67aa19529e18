"""Reading of a method's section of the config: refusals name the knob."""

from collections.abc import Collection, Mapping
from typing import Any

import ml_collections


def check(
  config: ml_collections.ConfigDict, knobs: Mapping[str, Collection[Any]]
) -> None:
  """Refuses knobs with a value that they do not know.

  Args:
    config: `config.method`.
    knobs: name -> known values.

  Raises:
    ValueError: an unknown value.
  """
  for knob, values in knobs.items():
    known(f'method.{knob}', config[knob], values)


def known(name: str, value: Any, values: Collection[Any]) -> Any:
  """Returns a knob's value if it is a known one.

  Raises:
    ValueError: it is not.
  """
  if value not in values:
    raise ValueError(f'{name}: found {value!r}, wanted one of {tuple(values)}')
  return value


def shape(
  name: str, section: ml_collections.ConfigDict, sizes: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the fields of a named size, but for those given beside it.

  Args:
    name: of the section, for refusals.
    section: `size`, and fields that are given where they are not 0.
    sizes: size -> fields.

  Raises:
    ValueError: an unknown size.
  """
  fields = {k: v for k, v in section.items() if k != 'size' and v}
  return {**sizes[known(f'{name}.size', section.size, sizes)], **fields}
