"""Lists of videos of an evaluation, and the videos that two of them share."""

from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np
from jaxtyping import Bool

from vssl_jax.data import holdout, item, options, sources
from vssl_jax.evals import overlap


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
  """Returns whether the keys of two lists name the same videos."""
  names = ('where', 'split', 'holdout')
  return _sources(a) == _sources(b) and all(a[n] == b[n] for n in names)


def check(
  section: str,
  trained: Mapping[str, Any],
  allow: bool = False,
  **others: Mapping[str, Any],
) -> dict[str, overlap.Overlap]:
  """Refuses to measure on videos that were trained on.

  Args:
    section: key of the config with the lists.
    trained: `of` the list `train`.
    allow: return the shared videos instead.
    **others: `of` further lists, by their names.

  Returns:
    The videos that each of the others shares with the training videos.

  Raises:
    ValueError: there are no training videos, or one of the others holds some
      of them.
  """
  if not trained['source']:
    raise ValueError(
      f'{section}.train: found no videos; wanted --config.{section}.train='
      '<folder, list or shards>, and such for the others'
    )
  shared = {}
  for which, data in others.items():
    names = f'{section}.train and {section}.{which}'
    remedy = (
      'a figure on videos that were trained on says nothing. Give others, or '
      f'other rows of a manifest: --config.{section}.{which}_where; '
      f'--config.{section}.allow_overlap=True measures all the same, and the '
      'report states how many there are'
    )
    if same(trained, data) and not allow:
      raise ValueError(f'{names} name the same videos; {remedy}')
    shared[which] = overlap.find(options.find(trained), options.find(data))
    if shared[which].count and not allow:
      pairs = ', '.join(f'{a!r} = {b!r}' for a, b in shared[which].examples)
      pairs = item.printable(pairs)
      raise ValueError(
        f'{names} hold the same videos: {shared[which].count} of the '
        f'{shared[which].total} videos of {section}.{which} are trained on '
        f'({which} = train: {pairs}); {remedy}'
      )
  return shared


def check_labels(section: str, **lists: Mapping[str, Any]) -> None:
  """Refuses lists of files of which none has a label.

  Args:
    section: key of the config with the lists.
    **lists: `of` each of them, by their names. Labels of shards are known
      only when they are read, and are left to that.

  Raises:
    ValueError: there is such a list.
  """
  for which, data in lists.items():
    parts = options.find(data).parts
    if all(isinstance(part, sources.Files) for part in parts):
      if max(max(part.labels) for part in parts) < 0:
        raise ValueError(
          f'{section}.{which}: none of the videos of {name(data)} has a label '
          'of the classes that are trained on; give class folders or a '
          'manifest with a label column'
        )


def labelled(data: Mapping[str, Any]) -> Bool[np.ndarray, 'n']:
  """Returns which videos of a list have a label.

  Args:
    data: `of` the list. Labels of shards are known only when they are read:
      all of theirs count as labelled. So do frames with depth.
  """
  return np.concatenate(
    [
      np.asarray(part.labels) >= 0
      if isinstance(part, sources.Files)
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
  """Refuses to hold out all videos with a label, or only others.

  Args:
    section: key of the config with the lists.
    data: `of` the training videos.
    fraction: of the videos that is held out.
    may_be_none: go on where no video at all is held out.

  Raises:
    ValueError: no video with a label is left to train on, or to choose by.
  """
  known = labelled(data)
  out = holdout.held_out(np.arange(len(known)), fraction)
  uses = (~out, 'train on', 'smaller'), (out, 'choose by', 'larger')
  for part, use, wanted in uses:
    if (known & part).any() or (part is out and may_be_none and not out.any()):
      continue
    raise ValueError(
      f'{section}.holdout: found {fraction:g}, which holds out {out.sum()} of '
      f'{len(known)} videos, {known.sum()} of them with a label, and leaves '
      f'none with a label to {use}; wanted a {wanted} fraction'
    )


def describe(shared: Mapping[str, Any]) -> str:
  """Returns a remark on test videos that were trained on; '' without any.

  Args:
    shared: `count` and `total` of an `overlap.Overlap`.
  """
  if not shared['count']:
    return ''
  return f'{shared["count"]} of the {shared["total"]} were trained on; flatters'


def name(data: Mapping[str, Any]) -> str:
  """Returns what a report calls a list of videos."""
  return data['source'] + (f' where {data["where"]}' if data['where'] else '')


def _sources(data: Mapping[str, Any]) -> set[str]:
  return {source.strip() for source in data['source'].split(',')}
