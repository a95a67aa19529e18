"""Source of videos in a TFDS directory; runs no code that the directory names.

`features.json` names a Python class for every feature, and TFDS imports those
classes. This module parses the file as plain data and builds the features from
an allow-list of scalar features. TFDS only splits the shards and decodes the
records with these features.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_data_source

from vssl_jax.data.clips import decode
from vssl_jax.data.sources import example as example_lib
from vssl_jax.data.sources import json_files, shards

FEATURES = 'features.json'
INFO = 'dataset_info.json'
# Features of TFDS are named tensorflow_datasets.core.features.<module>.<class>.
_PREFIX = 'tensorflow_datasets.core.features.'
_MEDIA_KEYS = ('video', 'image', 'clip', 'media')
# Field of a feature message that holds its content, by class.
_FIELDS = {
  'FeaturesDict': ('featuresDict', 'features_dict'),
  'Tensor': ('tensor',),
  'Scalar': ('tensor',),
  'Text': ('text',),
  'ClassLabel': ('classLabel', 'class_label'),
}


class Feature(NamedTuple):
  """Description of a feature in `features.json`.

  Attributes:
    kind: name of the TFDS class, without the module.
    content: description of the feature; {} for classes that are not supported.
  """

  kind: str
  content: Mapping[str, Any]

  @property
  def scalar(self) -> str:
    """Type of the scalar: 'bytes', 'int', 'other', or '' if not a scalar."""
    if self.kind == 'Text':
      return 'bytes'
    if self.kind == 'ClassLabel':
      return 'int'
    if self.kind not in ('Tensor', 'Scalar'):
      return ''
    shape = self.content.get('shape') or ()
    if isinstance(shape, dict):
      shape = shape.get('dimensions') or ()
    if shape:
      return ''
    dtype = str(self.content.get('dtype', ''))
    if dtype in ('string', 'object', 'bytes', 'str'):
      return 'bytes'
    return 'int' if dtype.lstrip('u').startswith('int') else 'other'


@dataclasses.dataclass(frozen=True)
class Tfds:
  """A split of a TFDS directory that holds encoded videos or images.

  Attributes:
    folder: directory of the dataset version (with features.json).
    split: split, such as 'train' or 'train[:90%]'.
    media_key: feature that holds the content of a file.
    label_key: integer feature, '' for none.
    classes: class names by label, or None.
  """

  folder: str
  split: str
  media_key: str
  label_key: str
  classes: tuple[str, ...] | None = None

  @functools.cached_property
  def _records(self) -> array_record_data_source.ArrayRecordDataSource:
    return array_record_data_source.ArrayRecordDataSource(
      _shards(self.folder, self.split)
    )

  @functools.cached_property
  def _features(self) -> Any:
    """The two features to decode, built by this module."""
    import tensorflow_datasets as tfds  # lazy, because the import is slow

    kinds = {self.media_key: np.object_}
    if self.label_key:
      kinds[self.label_key] = np.int64
    return tfds.features.FeaturesDict(
      {
        name: tfds.features.Tensor(shape=(), dtype=dtype)
        for name, dtype in kinds.items()
      }
    )

  def __getstate__(self) -> dict:
    return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

  def __setstate__(self, state: dict) -> None:
    self.__dict__.update(state)

  def __len__(self) -> int:
    return len(self._records)

  def lines(self) -> Iterator[str]:
    """Yields the name, records and size of each shard of the split."""
    for part in _shards(self.folder, self.split):
      size = os.path.getsize(part.filename)
      yield (
        f'{os.path.basename(part.filename)}\trecords {part.skip} to '
        f'{part.skip + part.take}, {size} bytes'
      )

  def describe(self) -> str:
    """Returns a summary: folder, number of videos, split and classes."""
    classes = f'{len(self.classes):,} classes' if self.classes else 'no labels'
    return (
      f'{self.folder}: {len(self):,} videos in the split {self.split}, feature '
      f'{self.media_key!r}, {classes}'
    )

  def item(self, index: int) -> example_lib.Item:
    """Returns example `index`."""
    name = f'{self.split} {index}'
    with shards.reading(f'{self.folder}, {name}'):
      example = self._features.deserialize_example_np(self._records[index])
      media = example[self.media_key]
      label = int(example[self.label_key]) if self.label_key else -1
    if not isinstance(media, bytes):
      raise decode.VideoError('unreadable', f'{self.media_key} is not bytes')
    if label < 0 or (self.classes and label >= len(self.classes)):
      label = example_lib.UNKNOWN
    return example_lib.Item(name, media, label)


def open_source(
  folder: str, classes: tuple[str, ...] = (), split: str = 'train'
) -> Tfds:
  """Opens a split of a TFDS directory.

  Args:
    folder: directory of the dataset version (with features.json).
    classes: class names by label; () takes those of the directory.
    split: split, such as 'train' or 'train[:90%]'.

  Raises:
    ValueError: the features are not classes of TFDS, none of them holds encoded
      videos, the split does not exist or is empty, or shards are missing.
  """
  feature_by_name = features(folder)
  scalars = {name: feature.scalar for name, feature in feature_by_name.items()}
  media = [name for name, scalar in scalars.items() if scalar == 'bytes']
  usual = [name for name in _MEDIA_KEYS if name in media]
  if len(usual or media) != 1:
    raise ValueError(
      f'{folder}: wanted one feature with the bytes of a video (object, '
      f'without TensorFlow), found {media} among '
      f'{ {name: feature.kind for name, feature in feature_by_name.items()} }'
    )
  label = 'label' if 'label' in feature_by_name else ''
  if label and scalars[label] != 'int':
    raise ValueError(
      f"{folder}: the feature 'label' is a {feature_by_name[label].kind} of "
      f'{scalars[label] or "several values"}; wanted a ClassLabel or one '
      'integer'
    )
  if label and not classes:
    classes = _class_names(folder, label)
  source = Tfds(folder, split, (usual or media)[0], label, classes or None)
  if not len(source):
    raise ValueError(
      f'{folder}: data.split={split!r} holds no examples; wanted another split'
    )
  return source


def matches(path: str) -> bool:
  """Returns whether a folder is a TFDS directory."""
  return all(os.path.isfile(os.path.join(path, f)) for f in (FEATURES, INFO))


def features(folder: str) -> dict[str, Feature]:
  """Parses the `features.json` of a directory.

  Returns:
    Feature by name.

  Raises:
    ValueError: the file is not a dictionary of features of TFDS.
  """
  path = os.path.join(folder, FEATURES)
  top = _feature(path, json_files.load(path))
  if top.kind != 'FeaturesDict':
    raise ValueError(f'{path}: found a {top.kind}, wanted a FeaturesDict')
  return {
    str(name): _feature(path, value) for name, value in top.content.items()
  }


def _feature(path: str, tree: Any) -> Feature:
  """Parses the description of one feature, in any format that TFDS reads.

  The formats are the JSON of the message `Feature` (names in camel or snake
  case), JSON as text in its field `json_feature`, and the older
  {'type', 'content'}.
  """
  if not isinstance(tree, dict):
    raise ValueError(f'{path}: wanted an object, found {str(tree)[:80]!r}')
  keys = ('type', 'pythonClassName', 'python_class_name')
  names = [str(tree[key]) for key in keys if key in tree]
  tfds_names = [name for name in names if name.startswith(_PREFIX)]
  if len(names) != 1 or not tfds_names:
    raise ValueError(
      f'{path} would import {names}; wanted one class of '
      'tensorflow_datasets.core.features for each feature. No class that data '
      'name is imported'
    )
  kind = names[0].rsplit('.', 1)[-1]
  if kind not in _FIELDS:
    return Feature(kind, {})
  content = _content(path, kind, tree)
  is_message = 'type' not in tree or bool(tree.get('proto_cls'))
  if kind == 'FeaturesDict' and is_message and 'jsonFeature' not in tree:
    content = content.get('features') or {}
  return Feature(kind, content)


def _content(path: str, kind: str, tree: dict[str, Any]) -> dict[str, Any]:
  """Returns the content of a feature; parses it if it is JSON as text."""
  content = tree.get('content', {})
  for key in _FIELDS[kind]:
    content = tree.get(key, content)
  for key in ('jsonFeature', 'json_feature'):
    if key in tree:
      content = tree[key]
      content = content.get('json') if isinstance(content, dict) else content
  if isinstance(content, str):
    try:
      content = json_files.parse(content)
    except ValueError as error:
      raise ValueError(f'{path}, inside a {kind}: {error}') from error
  if not isinstance(content, dict):
    raise ValueError(
      f'{path}: wanted an object inside a {kind}, found {str(content)[:80]!r}'
    )
  return content


def _class_names(folder: str, label: str) -> tuple[str, ...]:
  """Reads the class names from the labels file; () if there is none."""
  path = os.path.join(folder, f'{label}.labels.txt')
  if not os.path.isfile(path):
    return ()
  with open(path, encoding='utf-8', errors='surrogateescape') as file:
    return tuple(line.strip() for line in file if line.strip())


def _shards(folder: str, split: str) -> list[Any]:
  """Returns the files of a split, and the range of records in each file.

  Raises:
    ValueError: the shards are not described, or differ from the description.
  """
  import tensorflow_datasets as tfds  # lazy, because the import is slow

  path = os.path.join(folder, INFO)
  info = json_files.load(path)
  try:
    if info.get('fileFormat') != 'array_record':
      raise ValueError(
        f'fileFormat is {info.get("fileFormat")!r}, wanted array_record (TFDS: '
        'download_and_prepare with file_format="array_record")'
      )
    splits = tfds.core.SplitDict(
      [_split_info(folder, info['name'], s) for s in info['splits']]
    )
    parts = splits[split].file_instructions
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    names = [
      s.get('name') for s in info.get('splits') or () if isinstance(s, dict)
    ]
    raise ValueError(
      f'{path}, data.split={split!r}: {error}; the splits are {names}'
    ) from error
  for part in parts:
    _check_shard(folder, part)
  return parts


def _split_info(folder: str, name: str, split: dict[str, Any]) -> Any:
  import tensorflow_datasets as tfds

  template = tfds.core.ShardedFileTemplate(
    dataset_name=name,
    data_dir=folder,
    filetype_suffix='array_record',
    split=split['name'],
    template=split.get('filepathTemplate')
    or '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
  )
  lengths = [int(length) for length in split['shardLengths']]
  return tfds.core.SplitInfo(
    name=split['name'],
    shard_lengths=lengths,
    num_bytes=0,
    filename_template=template,
  )


def _check_shard(folder: str, part: Any) -> None:
  """Raises ValueError for shards outside `folder`, missing or incomplete."""
  path, root = (os.path.abspath(p) for p in (part.filename, folder))
  if not path.startswith(os.path.join(root, '')):
    raise ValueError(f'{folder}: {INFO} names a file elsewhere: {path}')
  if not os.path.isfile(path):
    raise ValueError(
      f'{folder}: {INFO} lists a shard that is not there: '
      f'{os.path.basename(path)}; copy it'
    )
  count = shards.count(path)
  if count != part.examples_in_shard:
    raise ValueError(
      f'{path}: found {count} records, {INFO} lists {part.examples_in_shard}; '
      'copy the file again'
    )
