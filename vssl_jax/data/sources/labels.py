"""Converts labels from text (lists, names of folders) to class indices."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from vssl_jax.data.sources import example as example_lib

NONE = ('', '-1', 'nan', 'NaN')  # text of missing labels
_REAL = re.compile(r'[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?')
_INTEGER = re.compile(r'\d{1,18}')  # with more digits it is an identifier


class Labels(NamedTuple):
  """Labels of a list of videos.

  Attributes:
    numbers: label of each video, example.UNKNOWN without a label.
    classes: class names by label, or None if no video has a label.
  """

  numbers: tuple[int, ...]
  classes: tuple[str, ...] | None


def number(
  texts: Sequence[str], classes: tuple[str, ...] = (), where: str = ''
) -> Labels:
  """Converts labels from text to class indices.

  The default classes are the labels that occur. They are sorted as numbers if
  all are integers ('2' before '10', '02' equals '2'), otherwise as text. Texts
  in `NONE` mean no label.

  Args:
    texts: label of each video.
    classes: class names in the order of their labels; () takes those that
      occur.
    where: origin of the labels, for messages.

  Raises:
    ValueError: a label is a real or negative number, or is not one of the
      classes.
  """
  occurring = dict.fromkeys(text for text in texts if text not in NONE)
  if not occurring:
    return Labels((example_lib.UNKNOWN,) * len(texts), classes or None)
  if occurring.keys() <= set(classes):
    names = {text: text for text in occurring}
  else:
    names = _whole(tuple(occurring), where)
  if not classes:
    all_whole = all(is_whole(name) for name in names.values())
    classes = tuple(sorted(set(names.values()), key=int if all_whole else str))
  index_by_name = {name: i for i, name in enumerate(classes)}
  # '02' and '2' are the same class, in whichever form `classes` has it.
  for i, name in enumerate(classes):
    if is_whole(name):
      index_by_name.setdefault(str(int(name)), i)
  indices = {text: index_by_name.get(text) for text in names}
  for text, name in names.items():
    indices[text] = (
      index_by_name.get(name) if indices[text] is None else indices[text]
    )
  unknown = [text for text, index in indices.items() if index is None]
  if unknown:
    raise ValueError(
      f'{where}: labels {sorted(unknown)[:5]} are not among the {len(classes)} '
      f'classes {list(classes[:8])}{"..." if len(classes) > 8 else ""}: those '
      'in data.classes, or for test videos those of the training videos'
    )
  indices |= dict.fromkeys(NONE, example_lib.UNKNOWN)
  return Labels(tuple(indices[text] for text in texts), classes)


def is_whole(text: str) -> bool:
  """Returns whether the name of a class is a non-negative integer."""
  return bool(_INTEGER.fullmatch(text))


def _whole(texts: tuple[str, ...], where: str) -> dict[str, str]:
  """Maps label texts to class names; integers are normalised ('02' to '2').

  Raises:
    ValueError: all texts are numbers, and one of them is real or negative.
  """
  identifiers = any(text.isdecimal() and not is_whole(text) for text in texts)
  if identifiers or not all(_REAL.fullmatch(text) for text in texts):
    return {text: text for text in texts}
  invalid = [t for t in texts if t.startswith('-') or float(t) % 1]
  if invalid:
    raise ValueError(
      f'{where}: the label {invalid[0][:80]!r} is a real or negative number; '
      'wanted names or whole numbers of classes (-1 or nothing: no label). '
      'Regression is not supported; name another column: data.label_column'
    )
  # Tables with missing values contain integers as '3.0'.
  return {
    text: str(int(text) if is_whole(text) else int(float(text)))
    for text in texts
  }
