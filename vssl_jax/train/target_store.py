"""What frozen teachers say of every training clip, on disk.

    <folder>/<teachers>-<hash>/manifest.json   what the numbers were made of
                               filled          a byte per example: 0 or 1
                               sums            a hash per example over its rows
                               image.bin ...   an array [E, ...] per target

A row counts once its byte in `filled` is 1. That is written after the rows are
on the disk, so what is killed computes some rows again and reads no wrong one.
A row whose hash is not that in `sums` counts as missing and is computed again.
Files are sparse: rows that were never written take no room.
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

from vssl_jax.train import manifests

GIB = 2**30
MANIFEST, FILLED, SUMS = 'manifest.json', 'filled', 'sums'
# Parts of a manifest that may differ: who wrote it.
NOTES = 'made_with'
FLUSH_SECONDS = 30.0

Rows = Mapping[str, Shaped[np.ndarray, 'B ...']]


class Store:
  """Rows of targets by the number of an example.

  Args:
    path: its own folder.
    key: what the numbers are made of, as JSON: `examples`, `targets` (name ->
      `shape` of one example and `dtype`) and whatever else makes them differ.
    read_only: write nothing; what is not there is not made.

  Raises:
    ValueError: the folder was filled for another key or is damaged, or the
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
    """Examples whose rows are there."""
    return int(self._filled.sum())

  def has(self, index: Int[np.ndarray, 'B']) -> Bool[np.ndarray, 'B']:
    """Returns whose rows are there, as written; never those of a substitute."""
    known = index < len(self._filled)
    there = known & self._filled[np.where(known, index, 0)]
    for place in np.flatnonzero(there):
      number = int(index[place])
      rows = {name: x[number] for name, x in self._rows.items()}
      if _row_sum(rows) != self._sums[number]:
        logging.warning(
          '%s: the targets of example %d are not those that were written; they '
          'are computed again',
          self.path,
          number,
        )
        there[place] = self._filled[number] = False
    return there

  def read(self, index: Int[np.ndarray, 'B']) -> Rows:
    """Returns the rows of examples that are there."""
    return {name: rows[index] for name, rows in self._rows.items()}

  def write(self, index: Int[np.ndarray, 'B'], rows: Rows) -> None:
    """Keeps rows of examples; substitutes and those that are there are left.

    Args:
      index: numbers; from the number of examples on they are substitutes.
      rows: name -> [B, ...] in the stored type.
    """
    if self._read_only:
      return
    missing = (index < len(self._filled)) & ~self.has(index)
    for place in np.flatnonzero(missing):
      number = int(index[place])
      row = {name: np.array(values[place]) for name, values in rows.items()}
      for name, values in row.items():
        _write_all(self._files[name], values.tobytes(), number * values.nbytes)
      self._sums[number] = _row_sum(row)
      self._filled[number] = True
      self._waiting.append(number)
    if time.monotonic() - self._flushed > FLUSH_SECONDS:
      self.flush()

  def flush(self) -> None:
    """Makes what was written count: rows first, then that they are there."""
    self._flushed = time.monotonic()
    if not self._waiting:
      return
    for file in self._files.values():
      os.fsync(file)
    self._sums.flush()
    filled = os.open(self.path / FILLED, os.O_WRONLY)
    for number in self._waiting:
      _write_all(filled, b'\1', number)
    os.fsync(filled)
    os.close(filled)
    self._waiting = []

  def close(self) -> None:
    """Flushes, and lets the files go."""
    self.flush()
    for file in self._files.values():
      os.close(file)
    self._files, self._rows = {}, {}

  def _create(self) -> None:
    """Makes empty files, and last the manifest that says what they are."""
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
    made = {NOTES: {'jax': jax.__version__}}
    manifests.write_atomic(self.path / MANIFEST, self._key | made, indent=1)

  def _open(self) -> None:
    differing = difference(read_key(self.path), self._key)
    if differing:
      raise ValueError(
        f'cache_targets: {self.path} was filled for something else:\n'
        f'{differing}\ngive another --config.cache_targets, or remove that '
        'folder to have it filled anew'
      )
    if not self._read_only and not (self.path / SUMS).exists():
      # Of an earlier version: all rows count as missing.
      _empty(self.path / SUMS, _sizes(self._key)[SUMS])
    for name, size in _sizes(self._key).items():
      found = self.path / name
      there = found.stat().st_size if found.exists() else 0
      if there != size:
        raise ValueError(
          f'cache_targets: {found} has {there} bytes, wanted {size}; remove '
          f'{self.path} to have it filled anew'
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
  """Returns the file of a target such as `image/deep`."""
  return target.replace('/', '.') + '.bin'


def nbytes(key: Mapping[str, Any]) -> int:
  """Returns the size of all rows in bytes."""
  return key['examples'] * row_nbytes(key['targets'])


def row_nbytes(targets: Mapping[str, Any]) -> int:
  """Returns the size of what is said of one example in bytes."""
  return sum(
    int(np.prod(spec['shape'])) * jnp.dtype(spec['dtype']).itemsize
    for spec in targets.values()
  )


def count_filled(path: pathlib.Path) -> int:
  """Returns how many examples a folder holds; 0 if there is none."""
  filled = path / FILLED
  if not (path / MANIFEST).exists() or not filled.exists():
    return 0
  return int((np.fromfile(filled, np.uint8) == 1).sum())


def read_key(path: pathlib.Path) -> dict[str, Any]:
  """Returns what a folder was filled for.

  Raises:
    ValueError: its manifest cannot be read.
  """
  try:
    return manifests.load(path / MANIFEST)
  except manifests.CorruptError as error:
    raise ValueError(
      f'cache_targets: {error}. The next start of training fills the folder '
      'again'
    ) from error


def _is_corrupt(path: pathlib.Path) -> bool:
  try:
    manifests.load(path / MANIFEST)
  except manifests.CorruptError:
    return True
  return False


def _row_sum(rows: Mapping[str, Shaped[np.ndarray, '...']]) -> int:
  """Returns a hash over the rows of one example; never 0."""
  digest = xxhash.xxh3_64()
  for name in sorted(rows):
    digest.update(np.ascontiguousarray(rows[name]).tobytes())
  return digest.intdigest() | 1


def _empty(path: pathlib.Path, size: int) -> None:
  """Makes a file of zeros that takes no room."""
  with path.open('wb') as f:
    f.truncate(size)


def difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
  """Returns a line for each part of two keys that differs; '' if none does."""
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
  """Returns file -> bytes."""
  rows = {
    file_name(name): key['examples'] * row_nbytes({name: spec})
    for name, spec in key['targets'].items()
  }
  return rows | {FILLED: key['examples'], SUMS: 8 * key['examples']}


def _write_all(file: int, data: bytes, place: int) -> None:
  """Writes bytes at a place; an error where the disk takes no more."""
  while data:
    done = os.pwrite(file, data, place)
    data, place = data[done:], place + done
