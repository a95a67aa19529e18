"""One example of a source, and the hash of many."""

import dataclasses
import hashlib
from collections.abc import Iterable

UNKNOWN = -1  # the label of a video without one
# Starts every fingerprint of a source. Older ones, without sizes, lack it and
# cannot be compared.
FINGERPRINT = 'v2-'


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
  """Returns a short hash of lines of text."""
  state = hashlib.sha256()
  for line in lines:
    # Names of files need not be UTF-8; Python holds such bytes as surrogates.
    state.update(line.encode(errors='surrogatepass') + b'\n')
  return state.hexdigest()[:16]


def printable(text: str) -> str:
  """Returns text whose bytes that are not UTF-8 are written as escapes."""
  return text.encode(errors='backslashreplace').decode()
