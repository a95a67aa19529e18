"""Numbers for labels: from the text of lists and the names of folders."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from vssl_jax.data import item as item_lib

NONE = ('', '-1', 'nan', 'NaN')  # how lists write that there is no label
_REAL = re.compile(r'[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?')
_INTEGER = re.compile(r'\d{1,18}')  # longer ones are identifiers, not numbers


class Labels(NamedTuple):
  """Labels of a list of videos.

  Attributes:
    numbers: for each video, item.UNKNOWN without a label.
    classes: their names by number, or None without any label.
  """

  numbers: tuple[int, ...]
  classes: tuple[str, ...] | None


def number(
  texts: Sequence[str], classes: tuple[str, ...] = (), where: str = ''
) -> Labels:
  """Numbers labels.

  Classes are the labels that occur: sorted as numbers if all are whole
  numbers ('2' before '10', '02' is '2'), as text otherwise. Those of
  `NONE` are no label.

  Args:
    texts: label of each video.
    classes: names in the order of their numbers; () takes those that occur.
    where: place of the list, for messages.

  Raises:
    ValueError: labels that are real or negative numbers, or that are not
      among the classes.
  """
  occurring = dict.fromkeys(text for text in texts if text not in NONE)
  if not occurring:
    return Labels((item_lib.UNKNOWN,) * len(texts), classes or None)
  if occurring.keys() <= set(classes):
    names = {text: text for text in occurring}
  else:
    names = _whole(tuple(occurring), where)
  if not classes:
    whole = all(is_whole(name) for name in names.values())
    classes = tuple(sorted(set(names.values()), key=int if whole else str))
  numbers = {name: i for i, name in enumerate(classes)}
  # '02' and '2' are the same number, whichever the list of classes holds.
  for i, name in enumerate(classes):
    if is_whole(name):
      numbers.setdefault(str(int(name)), i)
  found = {text: numbers.get(text) for text in names}
  for text, name in names.items():
    found[text] = numbers.get(name) if found[text] is None else found[text]
  unknown = [text for text, index in found.items() if index is None]
  if unknown:
    raise ValueError(
      f'{where}: labels {sorted(unknown)[:5]} are not among the {len(classes)} '
      f'classes {list(classes[:8])}{"..." if len(classes) > 8 else ""}: those '
      'in data.classes, or for test videos those of the training videos'
    )
  found |= dict.fromkeys(NONE, item_lib.UNKNOWN)
  return Labels(tuple(found[text] for text in texts), classes)


def is_whole(text: str) -> bool:
  """Returns whether a class is named by a whole number."""
  return bool(_INTEGER.fullmatch(text))


def _whole(texts: tuple[str, ...], where: str) -> dict[str, str]:
  """Returns text -> name of a class; whole numbers are written in one way.

  Raises:
    ValueError: all are numbers, and some are real or negative.
  """
  identifiers = any(text.isdecimal() and not is_whole(text) for text in texts)
  if identifiers or not all(_REAL.fullmatch(text) for text in texts):
    return {text: text for text in texts}
  strange = [t for t in texts if t.startswith('-') or float(t) % 1]
  if strange:
    raise ValueError(
      f'{where}: the label {strange[0][:80]!r} is a real or negative number; '
      'wanted names or whole numbers of classes (-1 or nothing: no label). '
      'Regression is not supported; name another column: data.label_column'
    )
  # Tables with gaps write whole numbers as '3.0'.
  return {
    text: str(int(text) if is_whole(text) else int(float(text)))
    for text in texts
  }
