"""Lists of videos: which an evaluation is given, and whether two are one."""

from collections.abc import Mapping
from typing import Any

import ml_collections


def of(
  config: ml_collections.ConfigDict, section: str, which: str
) -> dict[str, Any]:
  """Returns `config.data` of one list of videos.

  Args:
    config: the whole config; what the list leaves open is that of
      `config.data`.
    section: key of the config with the lists, such as `probe`.
    which: name of the list there: `train` for `train` and `train_where`.
  """
  data, wanted = config.data.to_dict(), config[section]
  return data | {
    'source': ','.join(s for s in wanted[which] if s) or data['source'],
    'where': wanted[f'{which}_where'] or data['where'],
  }


def same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
  """Returns whether two lists are the same videos."""
  names = ('where', 'split', 'holdout')
  return _sources(a) == _sources(b) and all(a[n] == b[n] for n in names)


def check(section: str, trained: Mapping[str, Any], **others: Any) -> None:
  """Refuses to measure on videos that were trained on.

  Args:
    section: key of the config with the lists.
    trained: `of` the list `train`.
    **others: `of` further lists, by their names.

  Raises:
    ValueError: there are none, or one of them is the same videos.
  """
  if not trained['source']:
    raise ValueError(
      f'{section}.train: found no videos; wanted --config.{section}.train='
      '<folder, list or shards>, and such for the others'
    )
  for which, data in others.items():
    if same(trained, data):
      raise ValueError(
        f'{section}.train and {section}.{which} name the same videos; a figure '
        'on videos that were trained on says nothing. Give others, or other '
        f'rows of a manifest: --config.{section}.{which}_where'
      )


def name(data: Mapping[str, Any]) -> str:
  """Returns what a report calls a list of videos."""
  return data['source'] + (f' where {data["where"]}' if data['where'] else '')


def _sources(data: Mapping[str, Any]) -> set[str]:
  return {source.strip() for source in data['source'].split(',')}
