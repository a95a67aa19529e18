"""Finds test videos that are among the training videos, by their content.

Two files are the same video if they are the same file on disk, or if their
sizes and content hashes agree. Only files whose size occurs in both lists are
opened, and at most `PIECES * PIECE` bytes of each are read, so that lists of
hundreds of thousands of videos take seconds. Files that agree in these pieces
are read in full: uncompressed videos may differ in few places. Re-encoded or
repacked videos are different files and are not found. Records of shards have
no file size: they are read, up to `MAX_SHARD_BYTES` in all.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import logging
import os
import stat
from collections.abc import Iterator, Sequence

from vssl_jax.data.clips import decode
from vssl_jax.data.sources import scenes, shards, tfds_folder
from vssl_jax.data.sources import source as source_lib

PIECES, PIECE = 16, 2**14  # evenly spaced pieces of a file, bytes of each
MAX_SHARD_BYTES = 4 * 2**30
THREADS = 16  # for files on network file systems


@dataclasses.dataclass(frozen=True)
class Overlap:
  """Videos of one list that are also in another list.

  Attributes:
    count: number of videos in both lists.
    total: number of videos in the test list.
    examples: (name in the test list, name in the other) of the first ones.
  """

  count: int
  total: int
  examples: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class _Content:
  """Content of a video, for comparison.

  Attributes:
    name: name for messages.
    path: path of its file or folder of frames; '' for a record of a shard.
    size: bytes.
    inode: device and inode of the file, () for a record.
    known: hashes of pieces and of the full content, if already computed.
  """

  name: str
  path: str
  size: int
  inode: tuple[int, ...] = ()
  known: tuple[str, str] | None = None

  @functools.cached_property
  def digest(self) -> str:
    """Hash of pieces of the content; '' if it cannot be read."""
    return self.known[0] if self.known else self._hash(PIECES)

  @functools.cached_property
  def whole(self) -> str:
    """Hash of the full content; '' if it cannot be read."""
    return self.known[1] if self.known else self._hash(0)

  def _hash(self, pieces: int) -> str:
    try:
      if os.path.isdir(self.path):
        return _digest_of_folder(self.path, pieces)
      with open(self.path, 'rb') as file:
        return _digest(file, self.size, pieces)
    except OSError:
      return ''

  def same(self, other: '_Content') -> bool:
    """Returns whether two contents are equal."""
    if self.inode and self.inode == other.inode:
      return True
    if self.size != other.size or not self.size:
      return False
    if not self.digest or self.digest != other.digest:
      return False
    return bool(self.whole) and self.whole == other.whole


def find(
  train: source_lib.Joined, test: source_lib.Joined, examples: int = 3
) -> Overlap:
  """Finds the test videos that are among the training videos.

  Args:
    train: the training videos.
    test: the test videos.
    examples: maximum number of name pairs to return.

  Returns:
    The number of shared videos and the names of the first ones. Missing files
    are left out: they are counted as unreadable later.
  """
  by_size = collections.defaultdict(list)
  for content in _contents(train):
    by_size[content.size].append(content)
  count, pairs = 0, []
  test_contents = [c for c in _contents(test) if c.size in by_size]
  train_contents = [
    c for size in {c.size for c in test_contents} for c in by_size[size]
  ]
  inodes = {c.inode: c for c in train_contents if c.inode}
  unmatched = [c for c in test_contents if c.inode not in inodes]
  unmatched_sizes = {c.size for c in unmatched}
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    train_contents = [c for c in train_contents if c.size in unmatched_sizes]
    list(
      pool.map(lambda content: content.digest, [*unmatched, *train_contents])
    )
  by_digest = collections.defaultdict(list)
  for content in train_contents:
    by_digest[content.size, content.digest].append(content)
  for content in test_contents:
    match = inodes.get(content.inode)
    if match is None:
      others = by_digest.get((content.size, content.digest), ())
      match = next((other for other in others if content.same(other)), None)
    if match is not None:
      count += 1
      pairs.append((content.name, match.name))
  return Overlap(count, len(test), tuple(pairs[:examples]))


def _contents(source: source_lib.Joined) -> Iterator[_Content]:
  """Yields the contents of the videos of a list."""
  for part in source.parts:
    if isinstance(part, shards.Shards | tfds_folder.Tfds):
      yield from _of_records(part)
    elif isinstance(part, scenes.Stretches):
      yield from _of_files(*_pictures(part))
    else:
      paths = [os.path.join(part.root, name) for name in part.names]
      yield from _of_files(part.names, paths)


def _of_files(names: Sequence[str], paths: Sequence[str]) -> Iterator[_Content]:
  def status(path: str) -> os.stat_result | None:
    try:
      return os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL in the name
      return None

  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    statuses = pool.map(status, paths, chunksize=256)
    for name, path, info in zip(names, paths, statuses, strict=True):
      if info is None:
        continue
      size, inode = info.st_size, (info.st_dev, info.st_ino)
      if stat.S_ISDIR(info.st_mode):
        size = sum(e.stat().st_size for e in os.scandir(path) if e.is_file())
      yield _Content(name, path, size, inode)


def _pictures(part: scenes.Stretches) -> tuple[list[str], list[str]]:
  """Returns names and paths of the colour images of RGB-D scenes."""
  names, paths = [], []
  for scene in part.scenes:
    for picture in scene.colour.split('\n'):
      names.append(f'{scene.name}: {picture}')
      paths.append(os.path.join(scene.folder, picture))
  return names, paths


def _of_records(
  part: shards.Shards | tfds_folder.Tfds,
) -> Iterator[_Content]:
  """Yields the records of shards; for large shards, the whole files."""
  if isinstance(part, shards.Shards):
    paths = list(part.paths)
  else:
    pattern = f'-{part.split.partition("[")[0]}.array_record'
    paths = sorted(e.path for e in os.scandir(part.folder) if pattern in e.name)
  if sum(map(os.path.getsize, paths)) > MAX_SHARD_BYTES:
    logging.getLogger(__name__).warning(
      '%s and other shards: more than %d GiB of records; only complete shards '
      'are compared with other lists, not records',
      paths[0], MAX_SHARD_BYTES // 2**30,
    )  # fmt: skip
    yield from _of_files(paths, paths)
    return
  for number in range(len(part)):
    try:
      item = part.item(number)
    except decode.VideoError:
      continue
    size = len(item.media)
    media = io.BytesIO(item.media)
    known = _digest(media, size), _digest(media, size, 0)
    yield _Content(item.name, '', size, known=known)


def _digest(file: io.BufferedIOBase, size: int, pieces: int = PIECES) -> str:
  """Returns a hash of evenly spaced pieces of a file; 0: of the full file."""
  file.seek(0)
  if not pieces or size <= pieces * PIECE:
    return hashlib.file_digest(file, 'sha256').hexdigest()
  state = hashlib.sha256()
  for number in range(pieces):
    file.seek(number * (size - PIECE) // (pieces - 1))
    state.update(file.read(PIECE))
  return state.hexdigest()


def _digest_of_folder(path: str, pieces: int = PIECES) -> str:
  """Returns a hash of sampled frames of a folder and of all file sizes."""
  files = sorted((e for e in os.scandir(path) if e.is_file()), key=_by_name)
  state = hashlib.sha256(repr([e.stat().st_size for e in files]).encode())
  for entry in files[:: max(len(files) // pieces, 1) if pieces else 1]:
    with open(entry.path, 'rb') as file:
      state.update(_digest(file, entry.stat().st_size, pieces).encode())
  return state.hexdigest()


def _by_name(entry: os.DirEntry) -> str:
  return entry.name
