"""Reads `.npz` files lazily and rejects arrays of objects.

An npz file is a zip archive of arrays, each with a short header and its data.
An array of objects is a pickle, which can execute code: it raises an error and
is never read. Sizes are checked against the archive before decompression. Data
is read on access, so that opening a file of 14 GB is fast.
"""

import dataclasses
import math
import os
import pathlib
import zipfile
import zlib
from typing import Any

import numpy as np

from vssl_jax.weights.readers import archives, tensors

# Weights compress poorly: a file with a higher compression ratio than this is
# hostile.
MAX_RATIO = 20


@dataclasses.dataclass(frozen=True)
class Tensor:
  """An array inside an archive, read on conversion to numpy.

  Attributes:
    path: path of the archive.
    entry: name of the entry.
    shape: shape of the array.
    dtype: dtype of the array.
    start: offset of the data in the entry, in bytes.
    order: memory order, `C` or `F` (first axis varies fastest).
  """

  path: str
  entry: str
  shape: tuple[int, ...]
  dtype: np.dtype
  start: int
  order: str

  def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
    """Reads the data and verifies the archive's checksum."""
    try:
      with zipfile.ZipFile(self.path) as archive:
        data = archive.read(self.entry)
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as e:
      raise tensors.WeightsError(
        f'{self.path}: {self.entry} is damaged ({e}); download it again'
      ) from e
    flat = np.frombuffer(data, self.dtype, offset=self.start)
    return flat.reshape(self.shape, order=self.order).astype(
      dtype or self.dtype, copy=bool(copy)
    )


def load(path: str | os.PathLike[str]) -> dict[str, Tensor]:
  """Opens an npz file.

  Args:
    path: a file of `numpy.savez` or `numpy.savez_compressed`.

  Returns:
    Key -> tensor, whose data is read on access.

  Raises:
    WeightsError: not an npz file, corrupt, with arrays of objects, or with an
      implausible compression ratio.
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
  except (tensors.WeightsError, OSError):
    raise
  except Exception as e:  # a corrupt header can raise anything
    raise tensors.WeightsError(
      f'{path}: no npz file, or a damaged one ({str(e)[:200]}); download it '
      'again'
    ) from e


def _check(path: pathlib.Path, infos: list[zipfile.ZipInfo]) -> None:
  """Raises for archives that numpy does not write."""
  size = path.stat().st_size
  unpacked = sum(i.file_size for i in infos)
  stored = [i for i in infos if i.compress_type == zipfile.ZIP_STORED]
  methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
  if any(i.compress_type not in methods for i in infos):
    raise tensors.WeightsError(f'{path}: packed in a way that numpy never does')
  if any(i.file_size != i.compress_size for i in stored):
    raise tensors.WeightsError(f'{path}: an array has two sizes')
  if unpacked > MAX_RATIO * size:
    raise tensors.WeightsError(
      f'{path}: {size} bytes that claim to unpack to {unpacked}; wanted at '
      f'most {MAX_RATIO} times as many. It is damaged or hostile'
    )


def _tensor(
  path: pathlib.Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo
) -> Tensor:
  """Reads the header of an array and checks its size."""
  name = info.filename
  if not name.endswith('.npy'):
    raise tensors.WeightsError(f'{path}: {tensors.short(name)} is no array')
  with archive.open(info) as file:
    version = np.lib.format.read_magic(file)
    reader = {
      (1, 0): np.lib.format.read_array_header_1_0,
      (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if reader is None:
      raise tensors.WeightsError(
        f'{path}: {tensors.short(name)} has version {version}'
      )
    shape, fortran, dtype = reader(file)
    start = file.tell()
  if dtype.kind not in 'biuf':
    raise tensors.WeightsError(
      f'{path}: {tensors.short(name)} holds {str(dtype)[:80]}, wanted numbers. '
      'Objects can run code; if you trust the file, load it where it was made '
      'and save plain arrays'
    )
  if len(shape) > tensors.MAX_AXES or not all(0 <= n < 2**63 for n in shape):
    raise tensors.WeightsError(
      f'{path}: {tensors.short(name)} has the shape {tensors.short(shape)}, '
      f'wanted natural numbers, and at most {tensors.MAX_AXES} axes'
    )
  size = math.prod(shape) * dtype.itemsize
  if size != info.file_size - start:
    raise tensors.WeightsError(
      f'{path}: {tensors.short(name)} of shape {shape} and type {dtype} needs '
      f'{size} bytes and has {info.file_size - start}'
    )
  return Tensor(str(path), name, shape, dtype, start, 'F' if fortran else 'C')
