"""Video lists of an evaluation, and the videos that two lists share."""

from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np
from jaxtyping import Bool

from vssl_jax.data import options
from vssl_jax.data.sources import example, holdout
from vssl_jax.data.sources import source as source_lib
from vssl_jax.evals import split_overlap


def of(
  config: ml_collections.ConfigDict, section: str, which: str
) -> dict[str, Any]:
  """Returns `config.data` of one list of videos.

  Args:
    config: the whole config; keys that the list leaves open are those of
      `config.data`.
    section: config section with the lists, such as `probe`.
    which: name of the list: `train` reads `train` and `train_where`.
  """
  data, lists = config.data.to_dict(), config[section]
  return data | {
    'source': ','.join(s for s in lists[which] if s) or data['source'],
    'where': lists[f'{which}_where'] or data['where'],
  }


def same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
  """Returns whether the keys of two lists name the same videos."""
  names = ('where', 'split', 'holdout')
  return _sources(a) == _sources(b) and all(a[n] == b[n] for n in names)


def check(
  section: str,
  trained: Mapping[str, Any],
  allow: bool = False,
  **others: Mapping[str, Any],
) -> dict[str, split_overlap.Overlap]:
  """Raises ValueError if other lists contain training videos.

  Args:
    section: config section with the lists.
    trained: `of` the list `train`.
    allow: return the shared videos instead of raising.
    **others: `of` further lists, by name.

  Returns:
    List name -> the videos that it shares with the training videos.

  Raises:
    ValueError: there are no training videos, or another list contains some of
      them.
  """
  if not trained['source']:
    raise ValueError(
      f'{section}.train: found no videos; wanted --config.{section}.train='
      '<folder, list or shards>, and likewise for the others'
    )
  shared = {}
  for which, data in others.items():
    names = f'{section}.train and {section}.{which}'
    remedy = (
      'a result on training videos is not meaningful. Give others, or '
      f'other rows of a manifest: --config.{section}.{which}_where; '
      f'--config.{section}.allow_overlap=True measures anyway, and the '
      'report states how many there are'
    )
    if same(trained, data) and not allow:
      raise ValueError(f'{names} name the same videos; {remedy}')
    shared[which] = split_overlap.find(
      options.find(trained), options.find(data)
    )
    if shared[which].count and not allow:
      pairs = ', '.join(f'{a!r} = {b!r}' for a, b in shared[which].examples)
      pairs = example.printable(pairs)
      raise ValueError(
        f'{names} hold the same videos: {shared[which].count} of the '
        f'{shared[which].total} videos of {section}.{which} are trained on '
        f'({which} = train: {pairs}); {remedy}'
      )
  return shared


def check_labels(section: str, **lists: Mapping[str, Any]) -> None:
  """Raises ValueError if no file of a list has a label.

  Args:
    section: config section with the lists.
    **lists: `of` each list, by name. Lists with shards are not checked: labels
      of shards are known only when they are read.

  Raises:
    ValueError: no file of a list has a label.
  """
  for which, data in lists.items():
    parts = options.find(data).parts
    if all(isinstance(part, source_lib.Files) for part in parts):
      if max(max(part.labels) for part in parts) < 0:
        raise ValueError(
          f'{section}.{which}: none of the videos of {name(data)} has a label '
          'of the classes that are trained on; give class folders or a '
          'manifest with a label column'
        )


def labelled(data: Mapping[str, Any]) -> Bool[np.ndarray, 'n']:
  """Returns a mask of the videos of a list that have a label.

  Args:
    data: `of` the list. Videos of shards all count as labelled: their labels
      are known only when they are read. So do frames with depth.
  """
  return np.concatenate(
    [
      np.asarray(part.labels) >= 0
      if isinstance(part, source_lib.Files)
      else np.ones(len(part), bool)
      for part in options.find(data).parts
    ]
  )


def check_share(
  section: str,
  data: Mapping[str, Any],
  fraction: float,
  *,
  may_be_none: bool = False,
) -> None:
  """Raises ValueError if holding out leaves one side without labels.

  Args:
    section: config section with the lists.
    data: `of` the training videos.
    fraction: fraction of the videos that is held out.
    may_be_none: accept that no video at all is held out.

  Raises:
    ValueError: no video with a label is left to train on, or to choose by.
  """
  known = labelled(data)
  held = holdout.held_out(np.arange(len(known)), fraction)
  sides = (
    (~held, 'train on', 'smaller'),
    (held, 'choose by', 'larger'),
  )
  for part, use, change in sides:
    if (known & part).any() or (
      part is held and may_be_none and not held.any()
    ):
      continue
    raise ValueError(
      f'{section}.holdout: found {fraction:g}, which holds out {held.sum()} of '
      f'{len(known)} videos, {known.sum()} of them with a label, and leaves '
      f'none with a label to {use}; wanted a {change} fraction'
    )


def describe(shared: Mapping[str, Any]) -> str:
  """Returns a remark on test videos that were trained on; '' if none were.

  Args:
    shared: `count` and `total` of an `split_overlap.Overlap`.
  """
  if not shared['count']:
    return ''
  return (
    f'{shared["count"]} of the {shared["total"]} were trained on; optimistic'
  )


def name(data: Mapping[str, Any]) -> str:
  """Returns the name of a list of videos for reports."""
  return data['source'] + (f' where {data["where"]}' if data['where'] else '')


def _sources(data: Mapping[str, Any]) -> set[str]:
  return {source.strip() for source in data['source'].split(',')}
