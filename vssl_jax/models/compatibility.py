"""Compares networks by the fields that define their function."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

# Fields that do not change the function of parameters and clips: precision,
# layout, memory, training noise, initial values, and the resizing of position
# tables. All other fields are compared.
NEUTRAL = frozenset(
  {
    'parent',
    'name',
    'dtype',
    'products',
    'attention',
    'remat',
    'loops',
    'drop_path',
    'dropout',
    'init_family',
    'embed_init',
    'resize',
  }
)


def differing_fields(
  found: nn.Module, wanted: nn.Module
) -> dict[str, tuple[Any, Any]]:
  """Returns the fields in which two networks compute different functions.

  Without such fields, the same parameters give the same outputs up to
  rounding. Parameter shapes follow from these fields and from the clip, so they
  are not compared.

  Args:
    found: a network.
    wanted: another one.

  Returns:
    Name -> (value in `found`, value in `wanted`). Fields of inner networks
    have dotted names, such as `image.norm_eps`.
  """
  if type(found) is not type(wanted):
    return {'network': (type(found).__name__, type(wanted).__name__)}
  differing: dict[str, tuple[Any, Any]] = {}
  for field in dataclasses.fields(found):
    if field.name in NEUTRAL or field.name.endswith('_init'):
      continue
    if field.name == 'rope_pairing' and not all(
      network.positions == 'rope_3d' for network in (found, wanted)
    ):
      continue  # not used by a network, or `positions` is reported
    pair = _value(found, field.name), _value(wanted, field.name)
    differing |= _differing(field.name, *pair)
  return differing


def describe(differing: Mapping[str, tuple[Any, Any]]) -> str:
  """Formats the result of `differing_fields` as text."""
  return '; '.join(
    f'{field} is {found!r} there and {wanted!r} here'
    for field, (found, wanted) in differing.items()
  )


def _differing(name: str, a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
  """Compares two values of a field; inner networks by their fields."""
  if isinstance(a, nn.Module) and isinstance(b, nn.Module):
    inner = differing_fields(a, b)
    return {f'{name}.{field}': values for field, values in inner.items()}
  if isinstance(a, Mapping) and isinstance(b, Mapping):
    out: dict[str, tuple[Any, Any]] = {}
    for key in {**a, **b}:
      out |= _differing(f'{name}.{key}', a.get(key), b.get(key))
    return out
  return {} if a == b else {name: (a, b)}


def _value(network: nn.Module, name: str) -> Any:
  """Returns the value of a field, with the default of `mlp_width` resolved."""
  value = getattr(network, name)
  if name == 'mlp_width' and value is None:
    return 4 * network.width
  return value
