"""Networks by the name of a size, or from a mapping of fields."""

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
  """Returns the fields that a network is made with.

  Args:
    module: its class.
    size: a name in `sizes`, or a mapping of fields.
    overrides: further fields, which come first; `init` stands for
      `init_family`.
    sizes: name -> fields.
    needed: what a mapping has at least.

  Raises:
    ValueError: an unknown size or field; the message has the nearest one.
  """
  if isinstance(size, str):
    if size not in sizes:
      raise ValueError(
        f'encoder size is {size!r}, wanted one of {list(sizes)} or a mapping '
        f'of {", ".join(needed)}'
      )
    size = sizes[size]
  found = {**size, **overrides}
  if 'init' in found:  # Linen modules have a method of that name
    found['init_family'] = found.pop('init')
  known = [
    f for f in module.__dataclass_fields__ if f not in ('parent', 'name')
  ]
  for name, value in found.items():
    if name not in known:
      near = difflib.get_close_matches(name, known, n=1) or known
      raise ValueError(
        f'{module.__name__} has no field {name!r}; nearest: {near[0]!r}'
      )
    if isinstance(value, list):  # lists of a config would not hash
      found[name] = tuple(value)
  return found
