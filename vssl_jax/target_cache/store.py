"""On-disk store of frozen teachers' outputs for every training clip.

    <folder>/<teachers>-<hash>/manifest.json   key: what the targets depend on
                               filled          a byte per example: 0 or 1
                               sums            a hash per example over its rows
                               image.bin ...   an array [E, ...] per target

A row is valid if its byte in `filled` is 1. The byte is written after the row
is on disk, so after a kill some rows are computed again and none is read wrong.
A row whose hash differs from that in `sums` counts as missing and is computed
again. Files are sparse: rows that are not written use no disk space.
"""

import json
import os
import pathlib
import shutil
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from absl import logging
from jaxtyping import Bool, Int, Shaped

from vssl_jax.checkpoint import integrity

GIB = 2**30
MANIFEST, FILLED, SUMS = 'manifest.json', 'filled', 'sums'
# Entry of the manifest that may differ: versions of the writer.
NOTES = 'made_with'
FLUSH_SECONDS = 30.0

Rows = Mapping[str, Shaped[np.ndarray, 'B ...']]


class Store:
  """Stores one row of targets per training example.

  Args:
    path: folder of the store.
    key: what the targets depend on, as JSON: `examples` (their number),
      `targets` (name -> `shape` of one example and `dtype`) and other entries.
    read_only: write nothing and create no files.

  Raises:
    ValueError: the folder was filled for another key or is corrupt, or the
      disk is too small.
  """

  def __init__(
    self, path: pathlib.Path, key: Mapping[str, Any], read_only: bool = False
  ) -> None:
    self.path, self._key = path, json.loads(json.dumps(key))
    self._read_only = read_only
    self._files: dict[str, int] = {}
    self._rows: dict[str, np.ndarray] = {}
    self._waiting: list[int] = []
    self._flushed = time.monotonic()
    self._filled = np.zeros(self._key['examples'], bool)
    if not (path / MANIFEST).exists():
      if read_only:
        return
      self._create()
    elif not read_only and _is_corrupt(path):
      logging.warning(
        '%s is corrupt: the targets in its folder are computed again',
        path / MANIFEST,
      )
      self._create()
    self._open()

  @property
  def count(self) -> int:
    """Number of examples with stored rows."""
    return int(self._filled.sum())

  def has(self, index: Int[np.ndarray, 'B']) -> Bool[np.ndarray, 'B']:
    """Returns which examples have intact rows; False for substitute clips."""
    in_range = index < len(self._filled)
    present = in_range & self._filled[np.where(in_range, index, 0)]
    for position in np.flatnonzero(present):
      example = int(index[position])
      rows = {name: x[example] for name, x in self._rows.items()}
      if _row_sum(rows) != self._sums[example]:
        logging.warning(
          '%s: the stored targets of example %d are corrupt; they are computed '
          'again',
          self.path,
          example,
        )
        present[position] = self._filled[example] = False
    return present

  def read(self, index: Int[np.ndarray, 'B']) -> Rows:
    """Returns the rows of examples that are stored."""
    return {name: rows[index] for name, rows in self._rows.items()}

  def write(self, index: Int[np.ndarray, 'B'], rows: Rows) -> None:
    """Writes rows that are missing; skips substitute clips.

    Args:
      index: example indices; those past the last are substitute clips.
      rows: target name -> [B, ...] in the stored dtype.
    """
    if self._read_only:
      return
    missing = (index < len(self._filled)) & ~self.has(index)
    for position in np.flatnonzero(missing):
      example = int(index[position])
      row = {name: np.array(values[position]) for name, values in rows.items()}
      for name, values in row.items():
        _write_all(self._files[name], values.tobytes(), example * values.nbytes)
      self._sums[example] = _row_sum(row)
      self._filled[example] = True
      self._waiting.append(example)
    if time.monotonic() - self._flushed > FLUSH_SECONDS:
      self.flush()

  def flush(self) -> None:
    """Syncs the written rows to disk, then marks them as filled."""
    self._flushed = time.monotonic()
    if not self._waiting:
      return
    for file in self._files.values():
      os.fsync(file)
    self._sums.flush()
    filled = os.open(self.path / FILLED, os.O_WRONLY)
    for example in self._waiting:
      _write_all(filled, b'\1', example)
    os.fsync(filled)
    os.close(filled)
    self._waiting = []

  def close(self) -> None:
    """Flushes and closes the files."""
    self.flush()
    for file in self._files.values():
      os.close(file)
    self._files, self._rows = {}, {}

  def _create(self) -> None:
    """Creates empty files, and the manifest last."""
    self.path.mkdir(parents=True, exist_ok=True)
    need, free = nbytes(self._key), shutil.disk_usage(self.path).free
    if need > free:
      raise ValueError(
        f'cache_targets: {self.path} would grow to {need / GIB:.1f} GiB and '
        f'its disk has {free / GIB:.1f} GiB left; give a folder on a larger '
        "one, or --config.cache_targets=''"
      )
    for name, size in _sizes(self._key).items():
      _empty(self.path / name, size)
    notes = {NOTES: {'jax': jax.__version__}}
    integrity.write_atomic(self.path / MANIFEST, self._key | notes, indent=1)

  def _open(self) -> None:
    differing = difference(read_key(self.path), self._key)
    if differing:
      raise ValueError(
        f'cache_targets: {self.path} was filled for different inputs:\n'
        f'{differing}\ngive another --config.cache_targets, or remove that '
        'folder to have it filled again'
      )
    if not self._read_only and not (self.path / SUMS).exists():
      # Of an earlier version: all rows count as missing.
      _empty(self.path / SUMS, _sizes(self._key)[SUMS])
    for name, size in _sizes(self._key).items():
      file = self.path / name
      num_bytes = file.stat().st_size if file.exists() else 0
      if num_bytes != size:
        raise ValueError(
          f'cache_targets: {file} has {num_bytes} bytes, wanted {size}; remove '
          f'{self.path} to have it filled again'
        )
    self._filled = np.fromfile(self.path / FILLED, np.uint8) == 1
    self._sums = np.memmap(
      self.path / SUMS, np.uint64, 'r' if self._read_only else 'r+'
    )
    for name, spec in self._key['targets'].items():
      path = self.path / file_name(name)
      if not self._read_only:
        self._files[name] = os.open(path, os.O_WRONLY)
      shape = (len(self._filled), *spec['shape'])
      self._rows[name] = np.memmap(
        path, jnp.dtype(spec['dtype']), 'r', 0, shape
      )


def file_name(target: str) -> str:
  """Returns the file name of a target such as `image/deep`."""
  return target.replace('/', '.') + '.bin'


def nbytes(key: Mapping[str, Any]) -> int:
  """Returns the size of all rows in bytes."""
  return key['examples'] * row_nbytes(key['targets'])


def row_nbytes(targets: Mapping[str, Any]) -> int:
  """Returns the size of the targets of one example in bytes."""
  return sum(
    int(np.prod(spec['shape'])) * jnp.dtype(spec['dtype']).itemsize
    for spec in targets.values()
  )


def count_filled(path: pathlib.Path) -> int:
  """Returns the number of stored examples; 0 if there is no folder."""
  filled = path / FILLED
  if not (path / MANIFEST).exists() or not filled.exists():
    return 0
  return int((np.fromfile(filled, np.uint8) == 1).sum())


def read_key(path: pathlib.Path) -> dict[str, Any]:
  """Loads the key that a folder was filled for.

  Raises:
    ValueError: its manifest cannot be read.
  """
  try:
    return integrity.load(path / MANIFEST)
  except integrity.CorruptError as error:
    raise ValueError(
      f'cache_targets: {error}. The next start of training fills the folder '
      'again'
    ) from error


def _is_corrupt(path: pathlib.Path) -> bool:
  try:
    integrity.load(path / MANIFEST)
  except integrity.CorruptError:
    return True
  return False


def _row_sum(rows: Mapping[str, Shaped[np.ndarray, '...']]) -> int:
  """Returns a hash over the rows of one example; never 0."""
  digest = xxhash.xxh3_64()
  for name in sorted(rows):
    digest.update(np.ascontiguousarray(rows[name]).tobytes())
  return digest.intdigest() | 1


def _empty(path: pathlib.Path, size: int) -> None:
  """Creates a sparse file of zeros."""
  with path.open('wb') as f:
    f.truncate(size)


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
  """Returns a line for each entry that differs in two keys, or ''."""
  a, b = (_flat(key) for key in (found, wanted))
  return '\n'.join(
    f'  {name}: was {a.get(name, "absent")!r}, is {b.get(name, "absent")!r}'
    for name in sorted(a.keys() | b.keys())
    if a.get(name) != b.get(name) and not name.startswith(f'{NOTES}/')
  )


def _flat(tree: Mapping[str, Any], above: str = '') -> dict[str, Any]:
  """Returns path -> value of nested dicts."""
  out = {}
  for name, value in tree.items():
    inner = isinstance(value, Mapping)
    out |= _flat(value, f'{above}{name}/') if inner else {above + name: value}
  return out


def _sizes(key: Mapping[str, Any]) -> dict[str, int]:
  """Returns file name -> size in bytes."""
  rows = {
    file_name(name): key['examples'] * row_nbytes({name: spec})
    for name, spec in key['targets'].items()
  }
  return rows | {FILLED: key['examples'], SUMS: 8 * key['examples']}


def _write_all(file: int, data: bytes, place: int) -> None:
  """Writes all bytes at an offset; raises OSError if the disk is full."""
  while data:
    written = os.pwrite(file, data, place)
    data, place = data[written:], place + written
