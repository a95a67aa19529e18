"""Readers of weight files that trust nothing they read.

A file from the internet can lie about sizes and can hold programs. These
readers check every size against the file before they use it, map tensors
instead of copying them, and never run anything.
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
MAX_NESTED = 16  # objects and lists within each other, in a config
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
  """A weight file that is damaged, hostile, or does not fit."""


def short(x: Any) -> str:
  """Returns a text for messages, in bounded time whatever a file built."""
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
  """Reads a JSON object of a folder with weights.

  Raises:
    WeightsError: no object, too large, nested too deeply, or with numbers that
      are not finite.
  """
  size = path.stat().st_size
  if size > MAX_JSON:
    raise WeightsError(f'{path}: {size} bytes, wanted at most {MAX_JSON}')

  def refuse(name: str) -> None:
    raise ValueError(f'{name} is no number')

  try:
    found = json.loads(path.read_bytes(), parse_constant=refuse)
  except (ValueError, RecursionError) as e:
    raise WeightsError(f'{path}: not valid JSON: {str(e)[:200]}') from e
  if not isinstance(found, dict):
    raise WeightsError(f'{path}: no JSON object')
  level = list(found.values())
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
  return found


@runtime_checkable
class Tensor(Protocol):
  """What a reader gives: sizes at once, numbers when asked for."""

  shape: tuple[int, ...]

  def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
    """Returns the numbers."""
    ...


def safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  """Maps the tensors of a safetensors file.

  Args:
    path: the file.

  Returns:
    Key -> read-only array; pages are read when they are touched.

  Raises:
    WeightsError: the header is too large or malformed, or its tensors
      overlap, leave gaps or reach outside the file.
  """
  path = pathlib.Path(path)
  header, start = _header(path)
  size = path.stat().st_size - start
  entries = {k: v for k, v in header.items() if k != '__metadata__'}
  spans = {key: _span(path, key, entry) for key, entry in entries.items()}
  at = 0
  for key, (begin, end) in sorted(spans.items(), key=lambda x: x[1]):
    if begin != at:
      what = 'overlaps the tensor before it' if begin < at else 'leaves a gap'
      raise WeightsError(f'{path}: tensor {short(key)} at byte {begin} {what}')
    at = end
  if at != size:
    raise WeightsError(
      f'{path}: the header describes {at} bytes of tensors and the file has '
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
  """Returns the header and the byte at which the tensors start."""
  size = path.stat().st_size
  with path.open('rb') as file:
    first = file.read(8)
    if len(first) < 8:
      raise WeightsError(f'{path}: {size} bytes, too short for safetensors')
    (length,) = struct.unpack('<Q', first)
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
  found = dict(pairs)
  if len(found) != len(pairs):
    raise ValueError('a name occurs twice')
  return found


def _span(path: pathlib.Path, key: str, entry: Any) -> tuple[int, int]:
  """Returns the first and last byte of a tensor, checked against its shape."""

  def natural(x: Any) -> bool:
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
  long = len(sizes) > MAX_AXES
  if long or not all(natural(n) for n in [*sizes, begin, end]):
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
  """Returns the parts of a tensor's description for a message."""
  if not isinstance(entry, dict):
    return short(entry)
  parts = [f'{short(k)}: {short(x)}' for k, x in list(entry.items())[:4]]
  return '{' + ', '.join(parts) + '}'


def write_safetensors(
  path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray]
) -> None:
  """Writes arrays as a safetensors file, whole or not at all.

  Args:
    path: the file; an existing one is replaced.
    tensors: key -> array of a type in `DTYPES`.

  Raises:
    WeightsError: an array of another type.
  """
  path, names = pathlib.Path(path), {d: n for n, d in DTYPES.items()}
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  at = 0
  for key, x in tensors.items():
    if np.asarray(x).dtype not in names:
      raise WeightsError(f'{key}: cannot write arrays of type {x.dtype}')
    size = math.prod(x.shape) * x.dtype.itemsize
    header[key] = {
      'dtype': names[x.dtype],
      'shape': list(x.shape),
      'data_offsets': [at, at + size],
    }
    at += size
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)  # tensors start on 8 bytes
  part = path.with_name(path.name + '.part')
  with part.open('wb') as file:
    file.write(struct.pack('<Q', len(text)) + text)
    for x in tensors.values():
      file.write(np.ascontiguousarray(x).tobytes())
  part.replace(path)
