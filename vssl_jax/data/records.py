"""Videos inside shards: ArrayRecord files of ours, and TFDS directories.

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

import numpy as np
from array_record.python import array_record_data_source

from vssl_jax.data import decode
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
    header = json.loads(record[start : start + length])
    if not isinstance(header, dict):
      raise ValueError('a header that is not an object')
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

  @property
  def fingerprint(self) -> str:
    """Hash of the shards' names, sizes and classes."""
    return item_lib.digest(
      (
        *(f'{os.path.basename(p)}\t{os.path.getsize(p)}' for p in self.paths),
        *(self.classes or ()),
      )
    )

  def item(self, index: int) -> item_lib.Item:
    """Example `index`."""
    with _reading(self.paths[0]):
      record = self._data[index]
    header, media = unpack(record)
    name = str(header.get('name') or f'record {index}')
    label = self._numbers.get(header.get('class'), item_lib.UNKNOWN)
    return item_lib.Item(name, media, label)


@dataclasses.dataclass(frozen=True)
class Tfds:
  """A split of a TFDS directory that holds encoded videos or images.

  Attributes:
    folder: the version's directory (with features.json).
    split: such as 'train' or 'train[:90%]'.
    media_key: feature that holds a file's content.
    label_key: integer feature, '' for none.
    classes: class names by label, or None.
  """

  folder: str
  split: str
  media_key: str
  label_key: str
  classes: tuple[str, ...] | None = None

  @functools.cached_property
  def _data(self) -> object:
    return _builder(self.folder).as_data_source(split=self.split)

  def __getstate__(self) -> dict:
    return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

  def __setstate__(self, state: dict) -> None:
    self.__dict__.update(state)

  def __len__(self) -> int:
    return len(self._data)

  @property
  def fingerprint(self) -> str:
    """Hash of the split, its length and the classes."""
    return item_lib.digest((self.split, str(len(self)), *(self.classes or ())))

  def item(self, index: int) -> item_lib.Item:
    """Example `index`."""
    with _reading(self.folder):
      example = self._data[index]
    label = int(example[self.label_key]) if self.label_key else -1
    name = f'{self.split} {index}'
    return item_lib.Item(name, bytes(example[self.media_key]), label)


def matches(path: str) -> bool:
  """Whether this path or pattern is for this module."""
  if os.path.isdir(path):
    return bool(glob.glob(os.path.join(glob.escape(path), PATTERN)))
  if os.path.isfile(path):
    return '.array_record' in os.path.basename(path)
  return bool(glob.glob(path))


def open_source(
  path: str, classes: tuple[str, ...] = (), split: str = 'train'
) -> Shards | Tfds:
  """Opens shards: a file, a pattern, a folder of them or a TFDS directory.

  Args:
    path: where they are.
    classes: class names by label; () takes those beside the shards.
    split: of a TFDS directory.

  Raises:
    ValueError: what was found is not what it should be.
  """
  if os.path.isdir(path):
    if os.path.isfile(os.path.join(path, 'features.json')):
      return _open_tfds(path, classes, split)
    pattern = os.path.join(glob.escape(path), PATTERN)
  else:
    pattern = glob.escape(path) if os.path.isfile(path) else path
  paths = tuple(sorted(glob.glob(pattern)))
  index = os.path.join(os.path.dirname(paths[0]), INDEX)
  if not classes and os.path.isfile(index):
    with open(index, encoding='utf-8') as file:
      found = json.load(file)
    classes = tuple(found.get('classes') or ())
    missing = sorted(
      set(found.get('shards', ())) - {os.path.basename(p) for p in paths}
    )
    if missing and os.path.isdir(path):
      raise ValueError(
        f'{path}: {INDEX} lists shards that are not there: {missing[:5]}; '
        'copy them, or run vssl_jax.data.prepare again'
      )
  return Shards(paths, classes or None)


def _open_tfds(folder: str, classes: tuple[str, ...], split: str) -> Tfds:
  features = _builder(folder).info.features
  media = [k for k, v in features.items() if _holds_bytes(v)]
  known = [k for k in ('video', 'image', 'clip', 'media') if k in media]
  if len(known or media) != 1:
    raise ValueError(
      f'{folder}: wanted one feature with the bytes of a video (object, '
      f'without TensorFlow), found {media} among {dict(features)}'
    )
  label = 'label' if 'label' in features else ''
  if label and not classes:
    classes = tuple(getattr(features[label], 'names', None) or ())
  return Tfds(folder, split, (known or media)[0], label, classes or None)


def _holds_bytes(feature: object) -> bool:
  """Whether a feature is one string of bytes (not a class label)."""
  kind = np.dtype(feature.np_dtype).kind if feature.shape == () else ''
  return kind in 'OSU' and bool(kind)


@functools.lru_cache(maxsize=8)
def _builder(folder: str) -> object:
  """Reads a TFDS directory whose features are TFDS's own classes.

  features.json names Python classes that TFDS imports: others are refused.
  """
  path = os.path.join(folder, 'features.json')
  with open(path, encoding='utf-8') as file:
    strange = sorted(set(_class_names(json.load(file))))
  if strange:
    raise ValueError(
      f'{path} asks to import {strange}; only tensorflow_datasets.core is '
      'trusted'
    )
  import tensorflow_datasets as tfds  # slow, and needed here only

  return tfds.builder_from_directory(folder)


def _class_names(tree: object) -> Iterator[str]:
  """Yields the class names in features.json that are not TFDS's own."""
  if isinstance(tree, dict):
    for key, value in tree.items():
      if key == 'pythonClassName':
        if not str(value).startswith('tensorflow_datasets.core.features.'):
          yield str(value)
      else:
        yield from _class_names(value)
  elif isinstance(tree, list):
    for value in tree:
      yield from _class_names(value)


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
  try:
    yield
  except (RuntimeError, ValueError, IndexError, OSError) as error:
    raise decode.VideoError('io', f'shard near {path}: {error}') from error
