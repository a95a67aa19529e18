"""Detects changes of the videos between starts of a run.

The run folder contains a list of the videos in addition to their hash in
`run.json`, so that messages can name the added, missing and changed videos.
"""

import collections
import gzip
import os
import pathlib
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from vssl_jax.data import pipeline
from vssl_jax.data.sources import example

FILE = 'videos.txt.gz'
_SHOWN = 3  # names shown per kind of change


def compare(
  workdir: pathlib.Path, record: Mapping[str, Any], clips: pipeline.Clips
) -> str:
  """Describes how the videos differ from those of a record; '' if equal.

  Args:
    workdir: the run folder, with the list of videos.
    record: content of `run.json` or of a checkpoint's manifest.
    clips: the videos of this start.
  """
  fingerprint = str(record.get('data_fingerprint', ''))
  # Fingerprints of older versions are hashes of other data.
  if (
    not fingerprint.startswith(example.FINGERPRINT)
    or fingerprint == clips.fingerprint
  ):
    return ''
  text = f'{clips.num_examples} videos now'
  if 'num_examples' in record:
    text = f'{record["num_examples"]} videos then, {text}'
  lines = _load(workdir, fingerprint)
  if lines is None:
    return f'{text} (which ones is unknown: {FILE} is not from then)'
  return f'{text}: {_difference(lines, list(clips.lines()))}'


def store(workdir: pathlib.Path, clips: pipeline.Clips) -> None:
  """Writes the list of videos to the run folder unless it is there."""
  if _load(workdir, clips.fingerprint) is not None:
    return
  path = workdir / FILE
  partial = path.with_suffix('.partial')
  with partial.open('wb') as raw:
    # mtime=0: equal lists give equal files.
    with gzip.GzipFile('', 'wb', compresslevel=3, fileobj=raw, mtime=0) as file:
      for line in (clips.fingerprint, *clips.lines()):
        file.write(line.replace('\n', '\\n').encode(errors='surrogatepass'))
        file.write(b'\n')
    raw.flush()
    os.fsync(raw.fileno())
  partial.replace(path)


def _load(workdir: pathlib.Path, fingerprint: str) -> list[str] | None:
  """Loads the list of videos; None if absent, corrupt or of another hash."""
  try:
    with gzip.open(workdir / FILE) as file:
      text = file.read().decode(errors='surrogatepass')
  except (OSError, EOFError, zlib.error, UnicodeDecodeError):
    return None
  first, *lines = text.removesuffix('\n').split('\n')
  return lines if first == fingerprint else None


def _difference(before: list[str], after: list[str]) -> str:
  """Describes the difference of two lists of videos by counts and names."""
  after = [line.replace('\n', '\\n') for line in after]
  missing = collections.Counter(before) - collections.Counter(after)
  added = collections.Counter(after) - collections.Counter(before)
  missing, added = _by_name(missing.elements()), _by_name(added.elements())
  common = [name for name in missing if name in added]
  changed = [f'{name}: {missing[name]}, now {added[name]}' for name in common]
  kinds = {
    'added': [name for name in added if name not in missing],
    'missing': [name for name in missing if name not in added],
    'changed': changed,
  }
  parts = [
    f'{len(names)} {kind} ({example.printable(", ".join(names[:_SHOWN]))}'
    f'{", ..." if len(names) > _SHOWN else ""})'
    for kind, names in kinds.items()
    if names
  ]
  return '; '.join(parts) or 'the same videos in another order or class order'


def _by_name(lines: Iterable[str]) -> dict[str, str]:
  """Splits lines at the last tab into name -> properties that may change."""
  pairs = (line.rpartition('\t') for line in lines)
  return {name: properties for name, _, properties in pairs}
