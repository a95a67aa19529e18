"""An example of a source, and the hash of a list of examples."""

import dataclasses
import hashlib
from collections.abc import Iterable

UNKNOWN = -1  # label of a video without one
# Prefix of the fingerprints of sources. Fingerprints without it are older, do
# not include file sizes and cannot be compared.
FINGERPRINT = 'v2-'


@dataclasses.dataclass(frozen=True)
class Item:
  """One example of a source.

  Attributes:
    name: name in reports.
    media: path of a file, or the content of one.
    label: class index, UNKNOWN without one.
  """

  name: str
  media: str | bytes
  label: int = UNKNOWN


def digest(lines: Iterable[str]) -> str:
  """Returns a short hash of lines of text."""
  state = hashlib.sha256()
  for line in lines:
    # File names may not be UTF-8; Python stores such bytes as surrogates.
    state.update(line.encode(errors='surrogatepass') + b'\n')
  return state.hexdigest()[:16]


def printable(text: str) -> str:
  """Returns text in which bytes that are not UTF-8 are escaped."""
  return text.encode(errors='backslashreplace').decode()
