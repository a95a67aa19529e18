"""Whether a run is resumed on the videos that it was started with.

A run folder holds a list of its videos beside their hash in `run.json`, so
that a start can say which were added, are missing or changed.
"""

import collections
import gzip
import os
import pathlib
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from vssl_jax.data import item, pipeline

FILE = 'videos.txt.gz'
_SHOWN = 3  # names of each kind of change


def compare(
  workdir: pathlib.Path, record: Mapping[str, Any], clips: pipeline.Clips
) -> str:
  """Describes how the videos differ from those of a record; '' if not at all.

  Args:
    workdir: folder of the run, with the list of its videos.
    record: content of its `run.json`, or of a checkpoint's manifest.
    clips: the videos of this start.
  """
  before = str(record.get('data_fingerprint', ''))
  # Fingerprints of older versions are hashes of something else.
  if not before.startswith(item.FINGERPRINT) or before == clips.fingerprint:
    return ''
  text = f'{clips.num_examples} videos now'
  if 'num_examples' in record:
    text = f'{record["num_examples"]} videos then, {text}'
  lines = _load(workdir, before)
  if lines is None:
    return f'{text} (which ones is unknown: {FILE} is not from then)'
  return f'{text}: {_difference(lines, list(clips.lines()))}'


def store(workdir: pathlib.Path, clips: pipeline.Clips) -> None:
  """Writes the list of videos into a run folder, if it is not there yet."""
  if _load(workdir, clips.fingerprint) is not None:
    return
  path = workdir / FILE
  partial = path.with_suffix('.partial')
  with partial.open('wb') as raw:
    # mtime=0: the same list makes the same bytes.
    with gzip.GzipFile('', 'wb', compresslevel=3, fileobj=raw, mtime=0) as file:
      for line in (clips.fingerprint, *clips.lines()):
        file.write(line.replace('\n', '\\n').encode(errors='surrogatepass'))
        file.write(b'\n')
    raw.flush()
    os.fsync(raw.fileno())
  partial.replace(path)


def _load(workdir: pathlib.Path, fingerprint: str) -> list[str] | None:
  """Returns the list with a fingerprint; None if it is not there or damaged."""
  try:
    with gzip.open(workdir / FILE) as file:
      text = file.read().decode(errors='surrogatepass')
  except (OSError, EOFError, zlib.error, UnicodeDecodeError):
    return None
  first, *lines = text.removesuffix('\n').split('\n')
  return lines if first == fingerprint else None


def _difference(before: list[str], after: list[str]) -> str:
  """Describes the difference of two lists, with counts and names."""
  after = [line.replace('\n', '\\n') for line in after]
  gone = collections.Counter(before) - collections.Counter(after)
  new = collections.Counter(after) - collections.Counter(before)
  gone, new = _by_name(gone.elements()), _by_name(new.elements())
  both = [name for name in gone if name in new]
  changed = [f'{name}: {gone[name]}, now {new[name]}' for name in both]
  kinds = {
    'added': [name for name in new if name not in gone],
    'missing': [name for name in gone if name not in new],
    'changed': changed,
  }
  parts = [
    f'{len(names)} {kind} ({item.printable(", ".join(names[:_SHOWN]))}'
    f'{", ..." if len(names) > _SHOWN else ""})'
    for kind, names in kinds.items()
    if names
  ]
  return '; '.join(parts) or 'the same videos in another order or class order'


def _by_name(lines: Iterable[str]) -> dict[str, str]:
  """Splits lines into names and what may change."""
  pairs = (line.rpartition('\t') for line in lines)
  return {name: rest for name, _, rest in pairs}
