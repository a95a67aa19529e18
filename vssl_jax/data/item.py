"""One example of a source, and the hash of many."""

import dataclasses
import hashlib
from collections.abc import Iterable

UNKNOWN = -1  # the label of a video without one


@dataclasses.dataclass(frozen=True)
class Item:
  """One example: its name in reports, where or what it is, its label.

  Attributes:
    name: what reports call it.
    media: path of a file, or the content of one.
    label: number of its class, UNKNOWN without one.
  """

  name: str
  media: str | bytes
  label: int = UNKNOWN


def digest(lines: Iterable[str]) -> str:
  """Short hash of lines of text."""
  state = hashlib.sha256()
  for line in lines:
    state.update(line.encode() + b'\n')
  return state.hexdigest()[:16]
