"""Reads and writes safetensors, and reads JSON, from untrusted files.

A file from the internet can contain wrong sizes and executable code. The
readers of this package check every size against the file before they use it,
read tensors on access, and never execute code.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
import safetensors as safetensors_lib
from safetensors import numpy as safetensors_numpy

# A ViT-G has about 800 tensors and a header of 100 kB. The library allows
# 100 MB, which is more than a million tensors.
MAX_HEADER = 8 * 2**20
MAX_JSON = 8 * 2**20
MAX_NESTED = 16  # depth of nested objects and lists in a config
MAX_AXES = 32

# What the library can read into numpy and models need; numpy has no float8.
DTYPES = {
  'F64': np.dtype('<f8'),
  'F32': np.dtype('<f4'),
  'F16': np.dtype('<f2'),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'I64': np.dtype('<i8'),
  'I32': np.dtype('<i4'),
  'I16': np.dtype('<i2'),
  'I8': np.dtype('i1'),
  'U8': np.dtype('u1'),
  'BOOL': np.dtype('?'),
}


class WeightsError(ValueError):
  """Raised for weight files that are corrupt, hostile or incompatible."""


def short(x: Any) -> str:
  """Formats a value for messages, in bounded time for any value of a file."""
  if isinstance(x, str):
    return repr(x[:60]) + ('...' if len(x) > 60 else '')
  if x is None or isinstance(x, bool | float):
    return repr(x)
  if isinstance(x, int):
    return str(x) if abs(x) < 2**63 else 'a huge integer'
  if isinstance(x, list | tuple) and len(x) <= MAX_AXES:
    if all(isinstance(n, int) and abs(n) < 2**63 for n in x):
      return str(x)
  return f'a {type(x).__name__}'


def one_line(error: Exception) -> str:
  """Formats another library's message, which can contain text of the file."""
  # What follows the first sentence is advice, such as to allow pickles.
  text = re.split(r'\.\s', str(error)[:200], maxsplit=1)[0]
  return ''.join(c if c.isprintable() else ' ' for c in text)


def json_object(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON file that contains an object.

  Raises:
    WeightsError: not an object, too large, nested too deeply, or with numbers
      that are not finite.
  """
  size = path.stat().st_size
  if size > MAX_JSON:
    raise WeightsError(f'{path}: {size} bytes, wanted at most {MAX_JSON}')

  def refuse(name: str) -> None:
    raise ValueError(f'{name} is no number')

  try:
    config = json.loads(path.read_bytes(), parse_constant=refuse)
  except (ValueError, RecursionError) as e:
    raise WeightsError(f'{path}: not valid JSON: {one_line(e)}') from e
  if not isinstance(config, dict):
    raise WeightsError(f'{path}: no JSON object')
  level = list(config.values())
  for _ in range(MAX_NESTED):
    level = [
      y
      for x in level
      if isinstance(x, dict | list)
      for y in (x.values() if isinstance(x, dict) else x)
    ]
  if level:
    raise WeightsError(
      f'{path}: nested more than {MAX_NESTED} deep, wanted a config'
    )
  return config


@runtime_checkable
class Tensor(Protocol):
  """A lazily loaded tensor: the shape is known, the data is read on access."""

  shape: tuple[int, ...]

  def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
    """Reads the data."""
    ...


@dataclasses.dataclass(frozen=True, eq=False)
class Lazy:
  """A tensor of an opened file, read on conversion to numpy.

  Attributes:
    name: the file and the tensor, for messages.
    shape: shape of the tensor.
    dtype: dtype of the tensor.
    read: reads the data into a new array.
  """

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]

  def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
    """Reads the data; two calls share no memory.

    Raises:
      WeightsError: the data is damaged, or the file was cut short.
    """
    try:
      x = self.read()
    except Exception as e:  # damage can raise anything
      raise WeightsError(
        f'{self.name} is damaged ({one_line(e)}); download it again'
      ) from e
    return x.astype(dtype or self.dtype, copy=False)


def safetensors(path: str | os.PathLike[str]) -> dict[str, Lazy]:
  """Opens a safetensors file.

  Args:
    path: the file.

  Returns:
    Key -> tensor, whose data is read on access.

  Raises:
    WeightsError: the file cannot be read, the header is too large or malformed,
      a name occurs twice, or the tensors overlap, leave gaps or extend beyond
      the file.
  """
  try:
    header = _header(path)
    # Not memory-mapped: a file that is cut short later would end the process.
    file = safetensors_lib.safe_open(path, framework='numpy', backend='pread')
    # The library takes the last of several tensors of the same name.
    json.loads(header, object_pairs_hook=_unique)
  except OSError as e:
    raise WeightsError(
      f'{path}: cannot be read ({one_line(e)}); wanted a safetensors file'
    ) from e
  except (safetensors_lib.SafetensorError, ValueError) as e:
    raise WeightsError(
      f'{path}: {one_line(e)}. It is no safetensors file, was cut short, or is '
      'hostile; download it again'
    ) from e
  return {key: _tensor(path, file, key) for key in file.offset_keys()}


def _header(path: str | os.PathLike[str]) -> bytes:
  """Returns the header, or what there is of it."""
  with open(path, 'rb') as file:
    prefix = file.read(8)
    length = int.from_bytes(prefix, 'little')
    if len(prefix) == 8 and length > MAX_HEADER:
      raise ValueError(
        f'claims a header of {length} bytes, wanted at most {MAX_HEADER}'
      )
    return file.read(min(length, MAX_HEADER))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Builds a dict and raises for duplicate names."""
  result = dict(pairs)
  if len(result) != len(pairs):
    raise ValueError('a name occurs twice in the header')
  return result


def _tensor(path: str | os.PathLike[str], file: Any, key: str) -> Lazy:
  """Returns a tensor of an open file after checking its type and shape."""
  found = file.get_slice(key)
  shape, dtype = tuple(found.get_shape()), found.get_dtype()
  name = f'{path}: tensor {short(key)}'
  if dtype not in DTYPES or len(shape) > MAX_AXES:
    raise WeightsError(
      f'{name} has type {dtype} and {len(shape)} axes, wanted a type out of '
      f'{sorted(DTYPES)} and at most {MAX_AXES} axes; convert it where it was '
      'made'
    )
  return Lazy(name, shape, DTYPES[dtype], lambda: file.get_tensor(key))


def write_safetensors(
  path: str | os.PathLike[str], tensors: Mapping[str, Any]
) -> None:
  """Writes arrays as a safetensors file, atomically.

  Args:
    path: the file; an existing one is replaced.
    tensors: key -> array, or lazy tensor, with a dtype in `DTYPES`.

  Raises:
    WeightsError: unsupported dtype, or the disk is full.
  """
  path = pathlib.Path(path)
  # The library writes memory as it is, which is wrong in any other order.
  arrays = {key: np.asarray(x, order='C') for key, x in tensors.items()}
  for key, x in arrays.items():
    if x.dtype not in DTYPES.values():
      raise WeightsError(f'{key}: cannot write arrays of type {x.dtype}')
  temporary = path.with_name(path.name + '.part')
  temporary.touch()
  mode = temporary.stat().st_mode  # the library's files are private
  try:
    safetensors_numpy.save_file(arrays, temporary, metadata={'format': 'pt'})
  except safetensors_lib.SafetensorError as e:
    raise WeightsError(f'{path}: cannot be written ({one_line(e)})') from e
  temporary.chmod(mode)
  temporary.replace(path)
