"""Reads `.npz` files array by array, and none that holds objects.

An npz file is a zip archive of arrays, each a short header and its numbers. An
array of objects is a pickle, and a pickle is a program: here it is refused and
never read. Sizes are checked against the archive before anything is unpacked;
a tensor's numbers are read when they are asked for, so that opening a file of
14 GB costs nothing.
"""

import dataclasses
import math
import os
import pathlib
import zipfile
import zlib
from typing import Any

import numpy as np

from vssl_jax.weights import archives, read

# Weights hardly shrink: a file that unpacks to more than this many times its
# size is a trap.
MAX_RATIO = 20


@dataclasses.dataclass(frozen=True)
class Tensor:
  """An array inside an archive, read when numpy asks for it.

  Attributes:
    path: the archive.
    entry: its name inside.
    shape: sizes.
    dtype: of the numbers.
    start: byte of the entry at which they start.
    order: `C`, or `F` where the first axis is the fastest.
  """

  path: str
  entry: str
  shape: tuple[int, ...]
  dtype: np.dtype
  start: int
  order: str

  def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
    """Returns the numbers, checked against the archive's checksum."""
    try:
      with zipfile.ZipFile(self.path) as archive:
        data = archive.read(self.entry)
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as e:
      raise read.WeightsError(
        f'{self.path}: {self.entry} is damaged ({e}); download it again'
      ) from e
    flat = np.frombuffer(data, self.dtype, offset=self.start)
    return flat.reshape(self.shape, order=self.order).astype(
      dtype or self.dtype, copy=bool(copy)
    )


def load(path: str | os.PathLike[str]) -> dict[str, Tensor]:
  """Opens an npz file.

  Args:
    path: what `numpy.savez` or `numpy.savez_compressed` wrote.

  Returns:
    Key -> tensor, whose numbers are read later.

  Raises:
    WeightsError: no npz file, damaged, with arrays of objects, or one that
      would unpack to far more than it is.
  """
  path = pathlib.Path(path)
  try:
    infos = archives.entries(path)
    _check(path, infos)
    with zipfile.ZipFile(path) as archive:
      return {
        info.filename.removesuffix('.npy'): _tensor(path, archive, info)
        for info in infos
      }
  except (read.WeightsError, OSError):
    raise
  except Exception as e:  # a damaged header can fail in any way
    raise read.WeightsError(
      f'{path}: no npz file, or a damaged one ({str(e)[:200]}); download it '
      'again'
    ) from e


def _check(path: pathlib.Path, infos: list[zipfile.ZipInfo]) -> None:
  """Refuses archives that numpy does not write."""
  size = path.stat().st_size
  unpacked = sum(i.file_size for i in infos)
  stored = [i for i in infos if i.compress_type == zipfile.ZIP_STORED]
  known = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
  if any(i.compress_type not in known for i in infos):
    raise read.WeightsError(f'{path}: packed in a way that numpy never does')
  if any(i.file_size != i.compress_size for i in stored):
    raise read.WeightsError(f'{path}: an array has two sizes')
  if unpacked > MAX_RATIO * size:
    raise read.WeightsError(
      f'{path}: {size} bytes that claim to unpack to {unpacked}; wanted at '
      f'most {MAX_RATIO} times as many. It is damaged or hostile'
    )


def _tensor(
  path: pathlib.Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo
) -> Tensor:
  """Returns an array by its header, checked against its size."""
  name = info.filename
  if not name.endswith('.npy'):
    raise read.WeightsError(f'{path}: {read.short(name)} is no array')
  with archive.open(info) as file:
    version = np.lib.format.read_magic(file)
    reader = {
      (1, 0): np.lib.format.read_array_header_1_0,
      (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if reader is None:
      raise read.WeightsError(
        f'{path}: {read.short(name)} has version {version}'
      )
    shape, columns, dtype = reader(file)
    start = file.tell()
  if dtype.kind not in 'biuf':
    raise read.WeightsError(
      f'{path}: {read.short(name)} holds {str(dtype)[:80]}, wanted numbers. '
      'Objects can run code; if you trust the file, load it where it was made '
      'and save plain arrays'
    )
  if len(shape) > read.MAX_AXES or not all(0 <= n < 2**63 for n in shape):
    raise read.WeightsError(
      f'{path}: {read.short(name)} has the shape {read.short(shape)}, wanted '
      f'natural numbers, and at most {read.MAX_AXES} axes'
    )
  size = math.prod(shape) * dtype.itemsize
  if size != info.file_size - start:
    raise read.WeightsError(
      f'{path}: {read.short(name)} of shape {shape} and type {dtype} needs '
      f'{size} bytes and has {info.file_size - start}'
    )
  return Tensor(str(path), name, shape, dtype, start, 'F' if columns else 'C')
