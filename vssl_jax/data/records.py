"""Videos inside shards: ArrayRecord files.

A record of ours is `MAGIC`, the length of a JSON header (4 bytes, little
endian), the header {"name": ..., "class": ...} and then the bytes of an
ordinary video file. Records without the magic are taken to be such bytes
alone. `index.json` beside the shards lists them with the class names.
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

from vssl_jax.data import decode, json_files
from vssl_jax.data import item as item_lib

MAGIC = b'VSSLREC1'
INDEX = 'index.json'
PATTERN = '*.array_record*'
_MAX_HEADER = 2**16


def pack(media: bytes, name: str, label: str | None = None) -> bytes:
  """Makes a record.

  Args:
    media: content of a video file.
    name: what reports call it.
    label: class name, or None.
  """
  header = json.dumps({'name': name, 'class': label}).encode()
  return MAGIC + struct.pack('<I', len(header)) + header + media


def unpack(record: bytes) -> tuple[dict, bytes]:
  """Splits a record into its header ({} where it has none) and the media.

  Raises:
    decode.VideoError: unreadable.
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
  """ArrayRecord files.

  Attributes:
    paths: the files, in order.
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
    """Returns where the shards are and how much they hold."""
    folder = os.path.dirname(self.paths[0]) or '.'
    classes = f'{len(self.classes):,} classes' if self.classes else 'no labels'
    return (
      f'{folder}: {len(self):,} videos in {len(self.paths)} shards, {classes}'
    )

  def item(self, index: int) -> item_lib.Item:
    """Example `index`."""
    with reading(f'shard near {self.paths[0]}'):
      record = self._data[index]
    header, media = unpack(record)
    name = str(header.get('name') or f'record {index}')
    label = self._numbers.get(str(header.get('class')), item_lib.UNKNOWN)
    return item_lib.Item(name, media, label)


def matches(path: str) -> bool:
  """Whether this path or pattern is for this module."""
  if os.path.isdir(path):
    return bool(glob.glob(os.path.join(glob.escape(path), PATTERN)))
  names = [path] if os.path.isfile(path) else glob.glob(path)
  return bool(names) and all(
    '.array_record' in os.path.basename(n) for n in names
  )


def open_source(path: str, classes: tuple[str, ...] = ()) -> Shards:
  """Opens shards: a file, a pattern or a folder of them.

  Args:
    path: where they are.
    classes: class names by label; () takes those beside the shards.

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
        'copy them, or run vssl_jax.data.prepare again'
      )
  return Shards(paths, classes or None)


def _read_index(path: str) -> tuple[tuple[str, ...], set[str]]:
  """Returns class names and names of shards from an index."""
  try:
    index = json_files.load(path)
    names, shards = index.get('classes') or [], index.get('shards') or []
    for key, values in (('classes', names), ('shards', shards)):
      if not isinstance(values, list) or not all(
        isinstance(value, str) for value in values
      ):
        raise ValueError(f'{path}: {key!r} is no list of names')
  except ValueError as error:
    raise ValueError(
      f'{error}. Copy it again, or make it anew by starting '
      'vssl_jax.data.prepare again with the same --out'
    ) from error
  return tuple(names), set(shards)


def count(path: str) -> int:
  """Returns the number of records of a shard.

  Raises:
    ValueError: it is no ArrayRecord file, or is cut; its name is in the
      message.
  """
  try:
    reader = array_record_module.ArrayRecordReader(path)
    number = reader.num_records()
    reader.close()
  except (RuntimeError, ValueError, OSError) as error:
    size = os.path.getsize(path) if os.path.exists(path) else 0
    raise ValueError(
      f'{path}: found {size} bytes that are not a whole ArrayRecord file '
      f'({str(error).split(";")[0][:200] or "its end is missing"}); copy or '
      'make it again, or remove it'
    ) from error
  return number


@contextlib.contextmanager
def reading(place: str) -> Iterator[None]:
  """Turns what readers of records raise into VideoError.

  Args:
    place: the record, for the message.
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
