"""Source of videos in shards, which are ArrayRecord files.

A record written by `pack` consists of `MAGIC`, the length of a JSON header (4
bytes, little endian), the header {"name": ..., "class": ...} and the content of
a video file. A record without `MAGIC` is the content of a video file alone. The
file `index.json` in the same folder lists the shards and the class names.
"""

import contextlib
import dataclasses
import functools
import glob
import json
import os
import struct
from collections.abc import Iterator

from array_record.python import (
  array_record_data_source,
  array_record_module,
)

from vssl_jax.data.clips import decode
from vssl_jax.data.sources import example as example_lib
from vssl_jax.data.sources import json_files

MAGIC = b'VSSLREC1'
INDEX = 'index.json'
PATTERN = '*.array_record*'
_MAX_HEADER = 2**16


def pack(media: bytes, name: str, label: str | None = None) -> bytes:
  """Builds a record.

  Args:
    media: content of a video file.
    name: name in reports.
    label: class name, or None.
  """
  header = json.dumps({'name': name, 'class': label}).encode()
  return MAGIC + struct.pack('<I', len(header)) + header + media


def unpack(record: bytes) -> tuple[dict, bytes]:
  """Splits a record into its header and the media.

  Returns:
    The header, {} for a record without one, and the content of a video file.

  Raises:
    decode.VideoError: the record is corrupt.
  """
  if not record.startswith(MAGIC):
    return {}, record
  start = len(MAGIC) + 4
  try:
    (length,) = struct.unpack('<I', record[len(MAGIC) : start])
    if length > _MAX_HEADER:
      raise ValueError(f'a header of {length} bytes')
    header = json_files.parse(record[start : start + length])
  except (ValueError, struct.error) as error:
    raise decode.VideoError('unreadable', f'damaged record: {error}') from error
  return header, record[start + length :]


@dataclasses.dataclass(frozen=True)
class Shards:
  """A source of videos in ArrayRecord files.

  Attributes:
    paths: paths of the files, in order.
    classes: class names by label, or None.
  """

  paths: tuple[str, ...]
  classes: tuple[str, ...] | None = None

  @functools.cached_property
  def _data(self) -> array_record_data_source.ArrayRecordDataSource:
    return array_record_data_source.ArrayRecordDataSource(list(self.paths))

  @functools.cached_property
  def _numbers(self) -> dict[str, int]:
    return {name: i for i, name in enumerate(self.classes or ())}

  def __getstate__(self) -> dict:
    return {'paths': self.paths, 'classes': self.classes}

  def __setstate__(self, state: dict) -> None:
    self.__dict__.update(state)

  def __len__(self) -> int:
    return len(self._data)

  def lines(self) -> Iterator[str]:
    """Yields the name and size of each shard."""
    for path in self.paths:
      yield f'{os.path.basename(path)}\t{os.path.getsize(path)} bytes'

  def describe(self) -> str:
    """Returns a summary: folder, number of videos, shards and classes."""
    folder = os.path.dirname(self.paths[0]) or '.'
    classes = f'{len(self.classes):,} classes' if self.classes else 'no labels'
    return (
      f'{folder}: {len(self):,} videos in {len(self.paths)} shards, {classes}'
    )

  def item(self, index: int) -> example_lib.Item:
    """Returns example `index`."""
    with reading(f'shard near {self.paths[0]}'):
      record = self._data[index]
    header, media = unpack(record)
    name = str(header.get('name') or f'record {index}')
    label = self._numbers.get(str(header.get('class')), example_lib.UNKNOWN)
    return example_lib.Item(name, media, label)


def matches(path: str) -> bool:
  """Returns whether a path or pattern refers to shards."""
  if os.path.isdir(path):
    return bool(glob.glob(os.path.join(glob.escape(path), PATTERN)))
  names = [path] if os.path.isfile(path) else glob.glob(path)
  return bool(names) and all(
    '.array_record' in os.path.basename(n) for n in names
  )


def open_source(path: str, classes: tuple[str, ...] = ()) -> Shards:
  """Opens the shards of a file, a pattern or a folder.

  Args:
    path: path of the file or folder, or the pattern.
    classes: class names by label; () takes those of `index.json`.

  Raises:
    ValueError: a shard is missing or cannot be opened.
  """
  if os.path.isdir(path):
    pattern = os.path.join(glob.escape(path), PATTERN)
  else:
    pattern = glob.escape(path) if os.path.isfile(path) else path
  paths = tuple(sorted(glob.glob(pattern)))
  for shard in paths:
    count(shard)
  index = os.path.join(os.path.dirname(paths[0]), INDEX)
  if os.path.isfile(index):
    names, shards = _read_index(index)
    classes = classes or names
    missing = sorted(shards - {os.path.basename(p) for p in paths})
    if missing and os.path.isdir(path):
      raise ValueError(
        f'{path}: {INDEX} lists shards that are not there: {missing[:5]}; '
        'copy them, or run vssl_jax.data.tools.prepare again'
      )
  return Shards(paths, classes or None)


def _read_index(path: str) -> tuple[tuple[str, ...], set[str]]:
  """Reads the class names and the names of the shards from an index."""
  try:
    index = json_files.load(path)
    names, shards = index.get('classes') or [], index.get('shards') or []
    for key, values in (('classes', names), ('shards', shards)):
      if not isinstance(values, list) or not all(
        isinstance(value, str) for value in values
      ):
        raise ValueError(f'{path}: {key!r} is not a list of names')
  except ValueError as error:
    raise ValueError(
      f'{error}. Copy it again, or write it again: run '
      'vssl_jax.data.tools.prepare with the same --out'
    ) from error
  return tuple(names), set(shards)


def count(path: str) -> int:
  """Returns the number of records of a shard.

  Raises:
    ValueError: the file is not a complete ArrayRecord file; with its path.
  """
  try:
    reader = array_record_module.ArrayRecordReader(path)
    num_records = reader.num_records()
    reader.close()
  except (RuntimeError, ValueError, OSError) as error:
    size = os.path.getsize(path) if os.path.exists(path) else 0
    raise ValueError(
      f'{path}: found {size} bytes that are not a complete ArrayRecord file '
      f'({str(error).split(";")[0][:200] or "its end is missing"}); copy or '
      'make it again, or remove it'
    ) from error
  return num_records


@contextlib.contextmanager
def reading(place: str) -> Iterator[None]:
  """Converts errors of record readers to VideoError.

  Args:
    place: description of the record, for the message.
  """
  try:
    yield
  except decode.VideoError:
    raise
  except (OSError, RuntimeError) as error:
    raise decode.VideoError('io', f'{place}: {error}') from error
  except (
    ValueError, IndexError, KeyError, TypeError, AttributeError,
  ) as error:  # fmt: skip
    raise decode.VideoError('unreadable', f'{place}: {error}') from error
