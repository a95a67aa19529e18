"""Lists of videos: a folder, a manifest, shards, or several of these.

Every source answers three questions: how many examples, which classes, and
what is example i. The order is a pure function of the names, so that a number
means the same video on every machine.
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

from vssl_jax.data import (
  decode,
  folders,
  labels,
  manifests,
  records,
  tfds_folder,
)
from vssl_jax.data import item as item_lib


@runtime_checkable
class Source(Protocol):
  """What batches are made from."""

  classes: tuple[str, ...] | None

  def __len__(self) -> int:
    """Number of examples."""

  def item(self, index: int) -> item_lib.Item:
    """Example `index`; may raise decode.VideoError or OSError."""


@runtime_checkable
class Listing(Source, Protocol):
  """A source that describes what it is made of."""

  def lines(self) -> Iterator[str]:
    """Yields what the source is made of: a name, a tab and what may change."""

  def describe(self) -> str:
    """Returns a line for the start: where, how many, what is passed over."""


@dataclasses.dataclass(frozen=True)
class Files:
  """Videos that are files of their own.

  Attributes:
    root: folder that names are relative to.
    names: path of each, relative or absolute.
    labels: int per name, item.UNKNOWN without one.
    classes: class names by label, or None.
    place: what the list comes from, for reports.
    notes: what was passed over or is odd, for reports.
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
    """Returns where the videos are, how many, and what was passed over."""
    images = sum(name.lower().endswith(decode.IMAGES) for name in self.names)
    videos = len(self) - images
    counts = [f'{videos:,} videos'] if videos or not images else []
    counts += [f'{images:,} pictures'] if images else []
    facts = [_described_classes(self.classes), *self.notes]
    unlabelled = self.labels.count(item_lib.UNKNOWN)
    if self.classes and unlabelled:
      facts.insert(1, f'{unlabelled:,} without a label')
    text = f'{self.place}: {" and ".join(counts)}, {"; ".join(facts)}'
    return item_lib.printable(text)

  def item(self, index: int) -> item_lib.Item:
    """Example `index`."""
    name = self.names[index]
    if '\0' in name:
      raise decode.VideoError('missing', 'its name holds a NUL')
    return item_lib.Item(
      name, os.path.join(self.root, name), self.labels[index]
    )

  def lines(self) -> Iterator[str]:
    """Yields the name, label and size in bytes (-1: no file) of each video."""
    sizes = _sizes(self.root, self.names)
    for row in zip(self.names, self.labels, sizes, strict=True):
      yield '{}\tlabel {}, {} bytes'.format(*row)


@dataclasses.dataclass(frozen=True)
class Joined:
  """Several sources behind each other, with one list of classes."""

  parts: tuple[Listing, ...]

  def __len__(self) -> int:
    return sum(len(part) for part in self.parts)

  @functools.cached_property
  def offsets(self) -> tuple[int, ...]:
    """Number of the first example of each part, and the total."""
    return (0, *np.cumsum([len(part) for part in self.parts]).tolist())

  @functools.cached_property
  def classes(self) -> tuple[str, ...] | None:
    """Classes of all parts: whole numbers sorted, others as they appear."""
    names = tuple({c: None for part in self.parts for c in part.classes or ()})
    if len(self.parts) > 1 and all(labels.is_whole(name) for name in names):
      names = tuple(sorted(names, key=int))
    return names or None

  @functools.cached_property
  def _numbers(self) -> dict[str, int]:
    return {name: i for i, name in enumerate(self.classes or ())}

  def lines(self) -> Iterator[str]:
    """Yields the lines of all parts, numbered if there are several."""
    for number, part in enumerate(self.parts):
      start = f'{number}: ' if len(self.parts) > 1 else ''
      for line in part.lines():
        yield start + line

  def describe(self) -> str:
    """Returns a line for each part."""
    return '\n'.join(part.describe() for part in self.parts)

  @functools.cached_property
  def fingerprint(self) -> str:
    """Hash of names, labels and sizes (not of the files' content)."""
    lines = itertools.chain(self.lines(), self.classes or ())
    return item_lib.FINGERPRINT + item_lib.digest(lines)

  def item(self, index: int) -> item_lib.Item:
    """Example `index`, its label in the joint list of classes."""
    number = int(np.searchsorted(self.offsets, index, side='right')) - 1
    part = self.parts[number]
    item = part.item(index - self.offsets[number])
    if item.label == item_lib.UNKNOWN or not part.classes:
      return dataclasses.replace(item, label=item_lib.UNKNOWN)
    label = self._numbers[part.classes[item.label]]
    return dataclasses.replace(item, label=label)


def split(text: str) -> tuple[str, ...]:
  """Splits data.source at its commas, but for those in names that exist."""
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
  """Finds out what each source is and lists it.

  A folder is a TFDS directory if it has `features.json`, shards if it holds
  `*.array_record*`, and videos otherwise; a file by its ending a shard, one
  video, or a manifest; a pattern with `*` shards or videos.

  Args:
    source: path, or paths.
    where: rows of a manifest to take: 'fold=0,1' or 'fold!=3'.
    classes: class names in the order of their labels; () finds them out.
    path_column: name of a manifest's column; '' finds it out.
    label_column: the same for labels.
    split: of TFDS directories.

  Raises:
    FileNotFoundError: nothing there, or no videos in it.
    ValueError: a manifest or shard that cannot be understood.
  """
  given = [source] if isinstance(source, str) else source
  paths = [_local(path) for path in given]
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
    elif records.matches(path):
      part = records.open_source(path, classes)
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
        'neither a folder nor a file; several sources have commas between them'
      )
    parts.append(part)
  return Joined(tuple(parts))


def folder(root: str, classes: tuple[str, ...] = ()) -> Files:
  """Lists the videos and images under a folder.

  If each lies in a folder of its own inside `root`, the first folder's name
  is its class. `folders.listing` says what is passed over.
  """
  names, notes = folders.listing(root)
  heads = [name.split(os.sep)[0] for name in names]
  outside = sum(a == b for a, b in zip(heads, names, strict=True))
  if outside:
    if outside < len(names):
      notes = (
        f'its folders are no classes, because {outside} lie outside of them',
        *notes,
      )
    numbers, known = (item_lib.UNKNOWN,) * len(names), None
  else:
    known = classes or tuple(sorted(set(heads)))
    numbers, known = labels.number(heads, known, root)
  return Files(root, tuple(names), numbers, known, root, notes)


def _files(place: str, paths: Sequence[str]) -> Files:
  """Returns videos that are named one by one, or by a pattern."""
  strange = [path for path in paths if not path.lower().endswith(MEDIA)]
  if strange:
    raise ValueError(
      f'data.source: {place!r} matches {strange[0]!r}, wanted a pattern of '
      f'videos ({", ".join(MEDIA)}) or of shards (.array_record) alone'
    )
  unknown = (item_lib.UNKNOWN,) * len(paths)
  paths = tuple(os.path.abspath(path) for path in paths)
  names = tuple(os.path.basename(path) for path in paths)
  root = os.path.dirname(paths[0])
  if len({os.path.dirname(path) for path in paths}) > 1:
    root, names = os.path.commonpath(paths), paths
    names = tuple(os.path.relpath(path, root) for path in paths)
  return Files(root, names, unknown, None, place)


def _listed(
  path: str,
  where: str,
  classes: tuple[str, ...],
  path_column: str,
  label_column: str,
) -> Files:
  """Returns the videos that a manifest names."""
  if not path.lower().endswith(manifests.ENDINGS):
    _check_is_text(path)
  manifest = manifests.read(
    path, where=where, path_column=path_column, label_column=label_column
  )
  root = os.path.dirname(os.path.abspath(path))
  names = tuple(row.path for row in manifest.rows)
  texts = [row.label for row in manifest.rows]
  numbers, known = labels.number(texts, classes, path)
  return Files(root, names, numbers, known, path, manifest.notes)


def _check_is_text(path: str) -> None:
  """Refuses archives and other files that are no list of videos."""
  try:
    with open(path, 'rb') as file:
      raw = file.read(4096)
  except OSError as error:
    raise ValueError(f'{path}: cannot be read ({error.strerror})') from error
  if not manifests.is_text(raw):
    raise ValueError(
      f'data.source: {path!r} is neither a video ({", ".join(MEDIA)}) nor a '
      f'list of some ({", ".join(manifests.ENDINGS)}) nor ArrayRecord shards; '
      'unpack archives (.tar, .zip) and give the folder'
    )


def _described_classes(classes: tuple[str, ...] | None, shown: int = 5) -> str:
  """Returns the number of classes and the first names."""
  if not classes:
    return 'no labels'
  names = ', '.join(classes[:shown]) + (', ...' if len(classes) > shown else '')
  return f'{len(classes):,} classes ({names})'


def _sizes(root: str, names: Sequence[str]) -> list[int]:
  """Returns the sizes of files in bytes, -1 where there is none."""

  def measure(part: Sequence[str]) -> list[int]:
    sizes = []
    for name in part:
      try:
        sizes.append(os.stat(os.path.join(root, name)).st_size)
      except (OSError, ValueError):  # not there; a NUL in its name
        sizes.append(-1)
    return sizes

  # Network disks answer slowly, and many questions at a time.
  with concurrent.futures.ThreadPoolExecutor(_STAT_THREADS) as threads:
    parts = [
      names[i : i + _STAT_FILES] for i in range(0, len(names), _STAT_FILES)
    ]
    return [size for part in threads.map(measure, parts) for size in part]


_STAT_THREADS, _STAT_FILES = 32, 500
MEDIA = folders.MEDIA
