"""Resolves the size of a network: a name, or a mapping of fields."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn


def fields(
  module: type[nn.Module],
  size: str | Mapping[str, Any],
  overrides: Mapping[str, Any],
  sizes: Mapping[str, Mapping[str, Any]],
  needed: Sequence[str],
) -> dict[str, Any]:
  """Returns the fields of a network of the given size.

  Args:
    module: class of the network.
    size: a name in `sizes`, or a mapping of fields.
    overrides: further fields, which override those of `size`; `init` is an
      alias of `init_family`.
    sizes: name -> fields.
    needed: required fields of a mapping, for the error message.

  Raises:
    ValueError: a size or field is unknown; the message gives the known sizes
      or the nearest field.
  """
  if isinstance(size, str):
    if size not in sizes:
      raise ValueError(
        f'encoder size is {size!r}, wanted one of {list(sizes)} or a mapping '
        f'of {", ".join(needed)}'
      )
    size = sizes[size]
  values = {**size, **overrides}
  if 'init' in values:  # a field cannot be named like the method of Linen
    values['init_family'] = values.pop('init')
  known = [
    f for f in module.__dataclass_fields__ if f not in ('parent', 'name')
  ]
  for name, value in values.items():
    if name not in known:
      nearest = difflib.get_close_matches(name, known, n=1) or known
      raise ValueError(
        f'{module.__name__} has no field {name!r}; nearest: {nearest[0]!r}'
      )
    if isinstance(value, list):  # lists of a config are not hashable
      values[name] = tuple(value)
  return values
