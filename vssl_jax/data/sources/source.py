"""Sources of videos: a folder, a manifest, shards, or several of these.

Every source provides the number of examples, the classes, and example i. The
order is a pure function of the names, so that an index refers to the same video
on every machine.
"""

import concurrent.futures
import dataclasses
import functools
import glob
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from vssl_jax.data.clips import decode
from vssl_jax.data.sources import example as example_lib
from vssl_jax.data.sources import (
  folders,
  labels,
  shards,
  tfds_folder,
  video_lists,
)


@runtime_checkable
class Source(Protocol):
  """A sequence of examples with class names."""

  classes: tuple[str, ...] | None

  def __len__(self) -> int:
    """Returns the number of examples."""

  def item(self, index: int) -> example_lib.Item:
    """Returns example `index`; may raise decode.VideoError or OSError."""


@runtime_checkable
class Listing(Source, Protocol):
  """A source that lists and describes its content."""

  def lines(self) -> Iterator[str]:
    """Yields a line per part: name, a tab, and properties that may change."""

  def describe(self) -> str:
    """Returns a summary line: place, number of videos, skipped files."""


@dataclasses.dataclass(frozen=True)
class Files:
  """A source of video files.

  Attributes:
    root: folder that names are relative to.
    names: paths of the files, relative or absolute.
    labels: label per name, example.UNKNOWN without one.
    classes: class names by label, or None.
    place: origin of the list, for the summary.
    notes: skipped files and warnings, for the summary.
  """

  root: str
  names: tuple[str, ...]
  labels: tuple[int, ...]
  classes: tuple[str, ...] | None = None
  place: str = ''
  notes: tuple[str, ...] = ()

  def __len__(self) -> int:
    return len(self.names)

  def describe(self) -> str:
    """Returns a summary: place, number of videos, classes, skipped files."""
    images = sum(name.lower().endswith(decode.IMAGES) for name in self.names)
    videos = len(self) - images
    counts = [f'{videos:,} videos'] if videos or not images else []
    counts += [f'{images:,} pictures'] if images else []
    facts = [_described_classes(self.classes), *self.notes]
    unlabelled = self.labels.count(example_lib.UNKNOWN)
    if self.classes and unlabelled:
      facts.insert(1, f'{unlabelled:,} without a label')
    text = f'{self.place}: {" and ".join(counts)}, {"; ".join(facts)}'
    return example_lib.printable(text)

  def item(self, index: int) -> example_lib.Item:
    """Returns example `index`."""
    name = self.names[index]
    if '\0' in name:
      raise decode.VideoError('missing', 'its name holds a NUL')
    return example_lib.Item(
      name, os.path.join(self.root, name), self.labels[index]
    )

  def lines(self) -> Iterator[str]:
    """Yields the name, label and size in bytes (-1: no file) of each video."""
    sizes = _sizes(self.root, self.names)
    for row in zip(self.names, self.labels, sizes, strict=True):
      yield '{}\tlabel {}, {} bytes'.format(*row)


@dataclasses.dataclass(frozen=True)
class Joined:
  """Several sources in sequence, with one list of classes."""

  parts: tuple[Listing, ...]

  def __len__(self) -> int:
    return sum(len(part) for part in self.parts)

  @functools.cached_property
  def offsets(self) -> tuple[int, ...]:
    """Index of the first example of each part, then the total."""
    return (0, *np.cumsum([len(part) for part in self.parts]).tolist())

  @functools.cached_property
  def classes(self) -> tuple[str, ...] | None:
    """Class names of all parts: integers sorted, others in order of parts."""
    names = tuple({c: None for part in self.parts for c in part.classes or ()})
    if len(self.parts) > 1 and all(labels.is_whole(name) for name in names):
      names = tuple(sorted(names, key=int))
    return names or None

  @functools.cached_property
  def _numbers(self) -> dict[str, int]:
    return {name: i for i, name in enumerate(self.classes or ())}

  def lines(self) -> Iterator[str]:
    """Yields the lines of all parts, with a prefix if there are several."""
    for index, part in enumerate(self.parts):
      prefix = f'{index}: ' if len(self.parts) > 1 else ''
      for line in part.lines():
        yield prefix + line

  def describe(self) -> str:
    """Returns a summary line for each part."""
    return '\n'.join(part.describe() for part in self.parts)

  @functools.cached_property
  def fingerprint(self) -> str:
    """Hash of names, labels and sizes, not of the content of the files."""
    lines = itertools.chain(self.lines(), self.classes or ())
    return example_lib.FINGERPRINT + example_lib.digest(lines)

  def item(self, index: int) -> example_lib.Item:
    """Returns example `index`, with its label in the joint list of classes."""
    part_index = int(np.searchsorted(self.offsets, index, side='right')) - 1
    part = self.parts[part_index]
    item = part.item(index - self.offsets[part_index])
    if item.label == example_lib.UNKNOWN or not part.classes:
      return dataclasses.replace(item, label=example_lib.UNKNOWN)
    label = self._numbers[part.classes[item.label]]
    return dataclasses.replace(item, label=label)


def split(text: str) -> tuple[str, ...]:
  """Splits data.source at commas, except for commas in existing paths."""
  pieces, paths = text.split(','), []
  while pieces:
    ends = range(len(pieces), 1, -1)
    joined = (','.join(pieces[:end]).strip() for end in ends)
    existing = (path for path in joined if os.path.exists(_local(path)))
    path = next(existing, pieces[0].strip())
    paths.append(path)
    del pieces[: path.count(',') + 1]
  return tuple(paths)


def _local(path: str) -> str:
  return os.path.expanduser(path.strip())


def find(
  source: str | Sequence[str],
  *,
  where: str = '',
  classes: Sequence[str] = (),
  path_column: str = '',
  label_column: str = '',
  split: str = 'train',
) -> Joined:
  """Detects the type of each source and lists its videos.

  A folder with `features.json` is a TFDS directory, one with `*.array_record*`
  holds shards, and any other holds videos. A file is a shard, a video or a
  manifest, by its extension. A pattern with `*` matches shards or videos.

  Args:
    source: path, or paths.
    where: filter for the rows of a manifest: 'fold=0,1' or 'fold!=3'.
    classes: class names in the order of their labels; () takes those found.
    path_column: column of paths in manifests; '' takes the first known name.
    label_column: column of labels in manifests; '' takes the first known name.
    split: split of TFDS directories.

  Returns:
    The videos of all sources.

  Raises:
    FileNotFoundError: a path does not exist or has no videos.
    ValueError: a manifest or shard is invalid.
  """
  sources = [source] if isinstance(source, str) else source
  paths = [_local(path) for path in sources]
  if not paths or not all(paths):
    raise FileNotFoundError(
      'data.source is empty; set it to a folder of videos, a manifest or '
      'shards, such as --config.data.source=/my/videos'
    )
  classes, parts = tuple(classes), []
  for path in paths:
    if '://' in path:
      raise ValueError(
        f'data.source: found the address {path!r}, wanted a local path; mount '
        'it (gcsfuse, s3fs, rclone mount) or copy it, and give that folder'
      )
    if tfds_folder.matches(path):
      part = tfds_folder.open_source(path, classes, split)
    elif shards.matches(path):
      part = shards.open_source(path, classes)
    elif os.path.isdir(path):
      part = folder(path, classes)
    elif os.path.isfile(path) and path.lower().endswith(MEDIA):
      part = _files(path, [path])
    elif os.path.isfile(path):
      part = _listed(path, where, classes, path_column, label_column)
    elif glob.has_magic(path) and (matching := sorted(glob.glob(path))):
      part = _files(path, matching)
    else:
      raise FileNotFoundError(
        f'data.source: there is nothing at {path!r} (from {os.getcwd()}), or '
        'neither a folder nor a file; separate several sources by commas'
      )
    parts.append(part)
  return Joined(tuple(parts))


def folder(root: str, classes: tuple[str, ...] = ()) -> Files:
  """Lists the videos and images under a folder.

  If all of them are in subfolders of `root`, the name of the subfolder is the
  class. `folders.listing` documents which files are skipped.
  """
  names, notes = folders.listing(root)
  subfolders = [name.split(os.sep)[0] for name in names]
  outside = sum(a == b for a, b in zip(subfolders, names, strict=True))
  if outside:
    if outside < len(names):
      notes = (
        f'its folders are not classes, because {outside} lie outside of them',
        *notes,
      )
    label_numbers, class_names = (example_lib.UNKNOWN,) * len(names), None
  else:
    class_names = classes or tuple(sorted(set(subfolders)))
    label_numbers, class_names = labels.number(subfolders, class_names, root)
  return Files(root, tuple(names), label_numbers, class_names, root, notes)


def _files(place: str, paths: Sequence[str]) -> Files:
  """Returns the source of videos from explicit paths or a pattern."""
  unexpected = [path for path in paths if not path.lower().endswith(MEDIA)]
  if unexpected:
    raise ValueError(
      f'data.source: {place!r} matches {unexpected[0]!r}, wanted a pattern of '
      f'videos ({", ".join(MEDIA)}) or of shards (.array_record) alone'
    )
  no_labels = (example_lib.UNKNOWN,) * len(paths)
  paths = tuple(os.path.abspath(path) for path in paths)
  names = tuple(os.path.basename(path) for path in paths)
  root = os.path.dirname(paths[0])
  if len({os.path.dirname(path) for path in paths}) > 1:
    root, names = os.path.commonpath(paths), paths
    names = tuple(os.path.relpath(path, root) for path in paths)
  return Files(root, names, no_labels, None, place)


def _listed(
  path: str,
  where: str,
  classes: tuple[str, ...],
  path_column: str,
  label_column: str,
) -> Files:
  """Returns the source of the videos in a manifest."""
  if not path.lower().endswith(video_lists.ENDINGS):
    _check_is_text(path)
  manifest = video_lists.read(
    path, where=where, path_column=path_column, label_column=label_column
  )
  root = os.path.dirname(os.path.abspath(path))
  names = tuple(row.path for row in manifest.rows)
  label_texts = [row.label for row in manifest.rows]
  label_numbers, class_names = labels.number(label_texts, classes, path)
  return Files(root, names, label_numbers, class_names, path, manifest.notes)


def _check_is_text(path: str) -> None:
  """Raises ValueError for archives and other files that are not text."""
  try:
    with open(path, 'rb') as file:
      raw = file.read(4096)
  except OSError as error:
    raise ValueError(f'{path}: cannot be read ({error.strerror})') from error
  if not video_lists.is_text(raw):
    raise ValueError(
      f'data.source: {path!r} is neither a video ({", ".join(MEDIA)}) nor a '
      f'list of videos ({", ".join(video_lists.ENDINGS)}) nor ArrayRecord '
      'shards; unpack archives (.tar, .zip) and give the folder'
    )


def _described_classes(classes: tuple[str, ...] | None, shown: int = 5) -> str:
  """Returns the number of classes and the first names, as text."""
  if not classes:
    return 'no labels'
  names = ', '.join(classes[:shown]) + (', ...' if len(classes) > shown else '')
  return f'{len(classes):,} classes ({names})'


def _sizes(root: str, names: Sequence[str]) -> list[int]:
  """Returns the sizes of files in bytes, -1 for missing files."""

  def measure(part: Sequence[str]) -> list[int]:
    sizes = []
    for name in part:
      try:
        sizes.append(os.stat(os.path.join(root, name)).st_size)
      except (OSError, ValueError):  # missing; a NUL in its name
        sizes.append(-1)
    return sizes

  # Network file systems are slow per call, but serve many calls at a time.
  with concurrent.futures.ThreadPoolExecutor(_STAT_THREADS) as threads:
    parts = [
      names[i : i + _STAT_FILES] for i in range(0, len(names), _STAT_FILES)
    ]
    return [size for part in threads.map(measure, parts) for size in part]


_STAT_THREADS, _STAT_FILES = 32, 500
MEDIA = folders.MEDIA
