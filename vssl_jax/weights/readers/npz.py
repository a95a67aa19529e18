"""Reads `.npz` files lazily and rejects arrays of objects.

An npz file is a zip archive of arrays, each with a short header and its data.
An array of objects is a pickle, which can execute code: it raises an error and
is never read. `numpy.load` reads the arrays on access, so that opening a file
of 14 GB is fast. Their sizes are checked before: numpy allocates what a header
claims, and ignores what follows an array.
"""

import math
import os
import pathlib
import zipfile

import numpy as np

from vssl_jax.weights.readers import archives, tensors

# Weights compress poorly: a file with a higher compression ratio than this is
# hostile.
MAX_RATIO = 20


def load(path: str | os.PathLike[str]) -> dict[str, tensors.Lazy]:
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
    with np.load(path, allow_pickle=False) as file:
      return {
        info.filename.removesuffix('.npy'): _tensor(path, file.zip, info)
        for info in infos
      }
  except tensors.WeightsError:
    raise
  except Exception as e:  # a corrupt header can raise anything
    raise tensors.WeightsError(
      f'{path}: no npz file, or a damaged one ({tensors.one_line(e)}); '
      'download it again'
    ) from e


def _check(path: pathlib.Path, infos: list[zipfile.ZipInfo]) -> None:
  """Raises for archives that numpy does not write."""
  size = path.stat().st_size
  unpacked = sum(i.file_size for i in infos)
  methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
  if any(i.compress_type not in methods for i in infos):
    raise tensors.WeightsError(f'{path}: packed in a way that numpy never does')
  if unpacked > MAX_RATIO * size:
    raise tensors.WeightsError(
      f'{path}: {size} bytes that claim to unpack to {unpacked}; wanted at '
      f'most {MAX_RATIO} times as many. It is damaged or hostile'
    )


def _tensor(
  path: pathlib.Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo
) -> tensors.Lazy:
  """Reads the header of an array and checks its size."""
  entry = info.filename
  name = f'{path}: {tensors.short(entry)}'
  if not entry.endswith('.npy'):
    raise tensors.WeightsError(f'{name} is no array')
  with archive.open(info) as data:
    version = np.lib.format.read_magic(data)
    reader = {
      (1, 0): np.lib.format.read_array_header_1_0,
      (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if reader is None:
      raise tensors.WeightsError(f'{name} has version {version}')
    shape, _, dtype = reader(data)
    stored = info.file_size - data.tell()
  if dtype.kind not in 'biuf':
    raise tensors.WeightsError(
      f'{name} holds {str(dtype)[:80]}, wanted numbers. Objects can run code; '
      'if you trust the file, load it where it was made and save plain arrays'
    )
  if len(shape) > tensors.MAX_AXES or not all(0 <= n < 2**63 for n in shape):
    raise tensors.WeightsError(
      f'{name} has the shape {tensors.short(shape)}, wanted natural numbers, '
      f'and at most {tensors.MAX_AXES} axes'
    )
  size = math.prod(shape) * dtype.itemsize
  if size != stored:
    raise tensors.WeightsError(
      f'{name} of shape {shape} and type {dtype} needs {size} bytes and has '
      f'{stored}'
    )

  def read() -> np.ndarray:
    with np.load(path, allow_pickle=False) as file:
      return file[entry]

  return tensors.Lazy(name, shape, dtype, read)
