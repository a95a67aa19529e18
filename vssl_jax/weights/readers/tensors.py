"""Reads and writes safetensors, and reads JSON, from untrusted files.

A file from the internet can contain wrong sizes and executable code. The
readers of this package check every size against the file before they use it,
memory-map tensors instead of copying them, and never execute code.
"""

import json
import math
import os
import pathlib
import struct
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

# A ViT-G has about 800 tensors and a header of 100 kB.
MAX_HEADER = 8 * 2**20
MAX_JSON = 8 * 2**20
MAX_NESTED = 16  # depth of nested objects and lists in a config
MAX_AXES = 32

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
    raise WeightsError(f'{path}: not valid JSON: {str(e)[:200]}') from e
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


def safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  """Memory-maps the tensors of a safetensors file.

  Args:
    path: the file.

  Returns:
    Key -> read-only array; pages are read on access.

  Raises:
    WeightsError: the header is too large or malformed, or its tensors overlap,
      leave gaps or extend beyond the file.
  """
  path = pathlib.Path(path)
  header, start = _header(path)
  size = path.stat().st_size - start
  entries = {k: v for k, v in header.items() if k != '__metadata__'}
  spans = {key: _span(path, key, entry) for key, entry in entries.items()}
  total = 0
  for key, (begin, end) in sorted(spans.items(), key=lambda x: x[1]):
    if begin != total:
      error = (
        'overlaps the tensor before it' if begin < total else 'leaves a gap'
      )
      raise WeightsError(f'{path}: tensor {short(key)} at byte {begin} {error}')
    total = end
  if total != size:
    raise WeightsError(
      f'{path}: the header describes {total} bytes of tensors and the file has '
      f'{size}; download it again'
    )
  if not size:
    data = np.zeros(0, np.uint8)
  else:
    data = np.memmap(path, np.uint8, 'r', offset=start)
  return {
    key: data[begin:end]
    .view(DTYPES[entries[key]['dtype']])
    .reshape(entries[key]['shape'])
    for key, (begin, end) in spans.items()
  }


def _header(path: pathlib.Path) -> tuple[dict[str, Any], int]:
  """Returns the header and the offset of the tensors, in bytes."""
  size = path.stat().st_size
  with path.open('rb') as file:
    prefix = file.read(8)
    if len(prefix) < 8:
      raise WeightsError(f'{path}: {size} bytes, too short for safetensors')
    (length,) = struct.unpack('<Q', prefix)
    if length > min(MAX_HEADER, size - 8):
      raise WeightsError(
        f'{path}: claims a header of {length} bytes; wanted at most '
        f'{MAX_HEADER}, within the {size} bytes of the file. It is no '
        'safetensors file, was cut short, or is hostile'
      )
    text = file.read(length)
  try:
    header = json.loads(text, object_pairs_hook=_unique)
  except (ValueError, RecursionError) as e:
    raise WeightsError(
      f'{path}: the header is not valid JSON: {str(e)[:200]}'
    ) from e
  if not isinstance(header, dict):
    raise WeightsError(f'{path}: the header is no JSON object')
  return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Builds a dict and raises for duplicate names."""
  result = dict(pairs)
  if len(result) != len(pairs):
    raise ValueError('a name occurs twice')
  return result


def _span(path: pathlib.Path, key: str, entry: Any) -> tuple[int, int]:
  """Returns the byte range [begin, end) of a tensor after checking its size."""

  def is_natural(x: Any) -> bool:
    return type(x) is int and 0 <= x < 2**63

  try:
    dtype, shape = DTYPES[entry['dtype']], entry['shape']
    begin, end = entry['data_offsets']
  except (KeyError, TypeError, ValueError) as e:
    raise WeightsError(
      f'{path}: tensor {short(key)} is described by {_described(entry)}; '
      f'wanted shape, data_offsets and a dtype out of {sorted(DTYPES)}'
    ) from e
  sizes = shape if isinstance(shape, list) else [None]
  too_long = len(sizes) > MAX_AXES
  if too_long or not all(is_natural(n) for n in [*sizes, begin, end]):
    raise WeightsError(
      f'{path}: tensor {short(key)} has shape {short(shape)} at bytes '
      f'{short(begin)} to {short(end)}; wanted natural numbers, and at most '
      f'{MAX_AXES} axes'
    )
  if end - begin != math.prod(shape) * dtype.itemsize:
    raise WeightsError(
      f'{path}: tensor {short(key)} of shape {shape} and type {entry["dtype"]} '
      f'needs {math.prod(shape) * dtype.itemsize} bytes and has {end - begin}'
    )
  return begin, end


def _described(entry: Any) -> str:
  """Formats a tensor's header entry for a message."""
  if not isinstance(entry, dict):
    return short(entry)
  parts = [f'{short(k)}: {short(x)}' for k, x in list(entry.items())[:4]]
  return '{' + ', '.join(parts) + '}'


def write_safetensors(
  path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]
) -> None:
  """Writes arrays as a safetensors file, atomically.

  Args:
    path: the file; an existing one is replaced.
    tensors: key -> array with a dtype in `DTYPES`.

  Raises:
    WeightsError: unsupported dtype.
  """
  path, names = pathlib.Path(path), {d: n for n, d in DTYPES.items()}
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  offset = 0
  for key, x in tensors.items():
    if np.asarray(x).dtype not in names:
      raise WeightsError(f'{key}: cannot write arrays of type {x.dtype}')
    size = math.prod(x.shape) * x.dtype.itemsize
    header[key] = {
      'dtype': names[x.dtype],
      'shape': list(x.shape),
      'data_offsets': [offset, offset + size],
    }
    offset += size
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)  # tensors are aligned to 8 bytes
  temporary = path.with_name(path.name + '.part')
  with temporary.open('wb') as file:
    file.write(struct.pack('<Q', len(text)) + text)
    for x in tensors.values():
      file.write(np.ascontiguousarray(x).tobytes())
  temporary.replace(path)
