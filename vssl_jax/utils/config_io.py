"""Converts configs to flat keys, JSON and text, and compares two configs."""

import json
from typing import Any

import ml_collections


def flatten(
  config: ml_collections.ConfigDict, prefix: str = ''
) -> list[tuple[str, Any]]:
  """Flattens a config to `(dotted key, value)` pairs."""
  items = []
  for key, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      items += flatten(value, f'{prefix}{key}.')
    else:
      items.append((prefix + key, value))
  return items


def to_json(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Converts a config to JSON-compatible nested dicts."""
  return json.loads(json.dumps(config.to_dict(), default=list))


def from_json(tree: dict[str, Any]) -> ml_collections.ConfigDict:
  """Inverts `to_json`: lists become tuples."""

  def convert(x: Any) -> Any:
    if isinstance(x, dict):
      return {k: convert(v) for k, v in x.items()}
    return tuple(convert(v) for v in x) if isinstance(x, list) else x

  return ml_collections.ConfigDict(convert(tree))


def difference(
  before: ml_collections.ConfigDict,
  after: ml_collections.ConfigDict,
  except_for: tuple[str, ...] = (),
) -> str:
  """Returns one line per key with different values; '' if there is none.

  Args:
    before: one config.
    after: another.
    except_for: keys or sections that may differ.
  """
  a, b = dict(flatten(before)), dict(flatten(after))
  lines = [
    f'  {k}: was {a.get(k, "absent")!r}, is {b.get(k, "absent")!r}'
    for k in sorted(a.keys() | b.keys())
    if a.get(k) != b.get(k)
    and not any(k == e or k.startswith(e + '.') for e in except_for)
  ]
  return '\n'.join(lines)


def describe(
  config: ml_collections.ConfigDict, base: ml_collections.ConfigDict
) -> str:
  """Returns one line per key; those that differ from `base` begin with *."""
  defaults = dict(flatten(base))
  lines = []
  for key, value in flatten(config):
    mark = ' ' if defaults.get(key, value) == value else '*'
    lines.append(f'{mark} {key} = {value!r}')
  return '\n'.join(lines)
