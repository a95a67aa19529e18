"""Lists of videos: a folder, a manifest, shards, or several of these.

Every source answers three questions: how many examples, which classes, and
what is example i. The order is a pure function of the names, so that a number
means the same video on every machine.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from vssl_jax.data import decode, manifests, records, tfds_folder
from vssl_jax.data import item as item_lib


@runtime_checkable
class Source(Protocol):
  """What the pipeline wants of a list of videos."""

  classes: tuple[str, ...] | None

  def __len__(self) -> int:
    """Number of examples."""

  def lines(self) -> Iterator[str]:
    """Yields what the source is made of: a name, a tab and what may change."""

  def item(self, index: int) -> item_lib.Item:
    """Example `index`; may raise decode.VideoError or OSError."""


@dataclasses.dataclass(frozen=True)
class Files:
  """Videos that are files of their own.

  Attributes:
    root: folder that names are relative to.
    names: path of each, relative or absolute.
    labels: int per name, item.UNKNOWN without one.
    classes: class names by label, or None.
  """

  root: str
  names: tuple[str, ...]
  labels: tuple[int, ...]
  classes: tuple[str, ...] | None = None

  def __len__(self) -> int:
    return len(self.names)

  def item(self, index: int) -> item_lib.Item:
    """Example `index`."""
    name = self.names[index]
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

  parts: tuple[Source, ...]

  def __len__(self) -> int:
    return sum(len(part) for part in self.parts)

  @functools.cached_property
  def offsets(self) -> tuple[int, ...]:
    """Number of the first example of each part, and the total."""
    return (0, *np.cumsum([len(part) for part in self.parts]).tolist())

  @functools.cached_property
  def classes(self) -> tuple[str, ...] | None:
    """Classes of all parts, in order of appearance."""
    names = {c: None for part in self.parts for c in part.classes or ()}
    return tuple(names) or None

  @functools.cached_property
  def _numbers(self) -> dict[str, int]:
    return {name: i for i, name in enumerate(self.classes or ())}

  def lines(self) -> Iterator[str]:
    """Yields the lines of all parts, numbered if there are several."""
    for number, part in enumerate(self.parts):
      start = f'{number}: ' if len(self.parts) > 1 else ''
      for line in part.lines():
        yield start + line

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

  A folder holding `*.array_record*` is read as shards (as a TFDS directory if
  it has `features.json`), any other folder as videos; a file by its ending as
  a manifest or as a shard; a pattern with `*` as shards.

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
  paths = [os.path.expanduser(path.strip()) for path in given]
  if not paths or not all(paths):
    raise FileNotFoundError(
      'data.source is empty; set it to a folder of videos, a manifest or '
      'shards, such as --config.data.source=/my/videos'
    )
  parts = []
  for path in paths:
    if tfds_folder.matches(path):
      part = tfds_folder.open_source(path, tuple(classes), split)
    elif records.matches(path):
      part = records.open_source(path, tuple(classes))
    elif os.path.isdir(path):
      part = folder(path, tuple(classes))
    elif os.path.isfile(path):
      part = _listed(path, where, tuple(classes), path_column, label_column)
    else:
      raise FileNotFoundError(
        f'data.source: there is nothing at {path!r} (from {os.getcwd()})'
      )
    parts.append(part)
  return Joined(tuple(parts))


def folder(root: str, classes: tuple[str, ...] = ()) -> Files:
  """Lists the videos and images under a folder.

  If each lies in a folder of its own inside `root`, the first folder's name
  is its class; hidden files and folders are passed over.
  """
  names = []
  for base, folders, files in os.walk(root, followlinks=True):
    folders[:] = sorted(f for f in folders if not f.startswith('.'))
    names += [
      os.path.relpath(os.path.join(base, f), root)
      for f in files
      if not f.startswith('.') and f.lower().endswith(MEDIA)
    ]
  names.sort()
  if not names:
    raise FileNotFoundError(
      f'no videos in {root!r}; files ending in {", ".join(MEDIA)} are taken, '
      'and shards ending in .array_record'
    )
  heads = [name.split(os.sep)[0] for name in names]
  if any(head == name for head, name in zip(heads, names, strict=True)):
    return Files(root, tuple(names), (item_lib.UNKNOWN,) * len(names))
  known = classes or tuple(sorted(set(heads)))
  return Files(root, tuple(names), _number(heads, known, root), known)


def _listed(
  path: str,
  where: str,
  classes: tuple[str, ...],
  path_column: str,
  label_column: str,
) -> Files:
  """The videos that a manifest names."""
  rows = manifests.read(
    path, where=where, path_column=path_column, label_column=label_column
  )
  root = os.path.dirname(os.path.abspath(path))
  names = tuple(row.path for row in rows)
  labels = [row.label for row in rows]
  present = sorted({label for label in labels if label})
  if not present:
    return Files(root, names, (item_lib.UNKNOWN,) * len(names))
  if not classes:
    if all(label.isdecimal() for label in present):
      classes = tuple(str(i) for i in range(max(map(int, present)) + 1))
    else:
      classes = tuple(present)
  return Files(root, names, _number(labels, classes, path), classes)


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


def _number(
  labels: Sequence[str], classes: tuple[str, ...], where: str
) -> tuple[int, ...]:
  numbers = {name: i for i, name in enumerate(classes)}
  strange = sorted({label for label in labels if label} - set(numbers))
  if strange:
    raise ValueError(
      f'{where}: labels {strange[:5]} are not among the {len(classes)} in '
      'data.classes'
    )
  return tuple(numbers.get(label, item_lib.UNKNOWN) for label in labels)


_STAT_THREADS, _STAT_FILES = 32, 500
MEDIA = decode.VIDEOS + decode.IMAGES
