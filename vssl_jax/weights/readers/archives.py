"""Opens zip archives safely: validates the directory before entries are read.

Both `.pth` and `.npz` files are zip archives. `zipfile` reads the whole
directory at the end of an archive, and the sizes in it can be wrong, so it is
first checked against the file.
"""

import os
import pathlib
import struct
import zipfile
import zlib

import numpy as np

from vssl_jax.weights.readers import tensors

# Limit of the directory in bytes; 1,000 tensors need about 100 kB.
MAX_DIRECTORY = 16 * 2**20
_END, _END_64 = b'PK\x05\x06', b'PK\x06\x06'
_END_SIZE, _LOCATOR_SIZE, _END_64_SIZE = 22, 20, 56
_HEADER = struct.Struct('<4s22xHH')  # signature, lengths of two strings


def entries(path: str | os.PathLike[str]) -> list[zipfile.ZipInfo]:
  """Returns the entries of an archive.

  Raises:
    WeightsError: the directory is too large, contains a name twice, or claims
      more bytes than the file has.
    BadZipFile: the file is not a zip archive.
  """
  path = pathlib.Path(path)
  _check_directory(path)
  with zipfile.ZipFile(path) as archive:
    infos = archive.infolist()
  if len({i.filename for i in infos}) != len(infos):
    raise tensors.WeightsError(f'{path}: a name occurs twice')
  size = path.stat().st_size
  # Overlapping entries would count the same bytes several times.
  claimed = sum(i.compress_size for i in infos)
  if claimed > size:
    raise tensors.WeightsError(
      f'{path}: entries of {claimed} bytes in a file of {size}, wanted at most '
      'as many; it is damaged or hostile'
    )
  return infos


def _check_directory(path: pathlib.Path) -> None:
  """Raises if the directory is too large to read."""
  size = path.stat().st_size
  with path.open('rb') as file:
    file.seek(max(size - _END_SIZE - _LOCATOR_SIZE - _END_64_SIZE - 2**16, 0))
    tail = file.read()
  # Same search as in zipfile: without a trailing comment, then with one.
  end = len(tail) - _END_SIZE
  if end < 0 or tail[end : end + 4] != _END or tail[-2:] != b'\0\0':
    end = tail.rfind(_END)
  if end < 0 or end + _END_SIZE > len(tail):
    return  # not an archive: zipfile raises
  (length,) = struct.unpack_from('<I', tail, end + 12)
  large = end - _LOCATOR_SIZE - _END_64_SIZE
  if large >= 0 and tail[large : large + 4] == _END_64:
    (length,) = struct.unpack_from('<Q', tail, large + 40)
  if length > MAX_DIRECTORY:
    raise tensors.WeightsError(
      f'{path}: a list of entries of {length} bytes, wanted at most '
      f'{MAX_DIRECTORY}; it is damaged or hostile'
    )


class Stored:
  """An uncompressed entry of an archive, memory-mapped on access."""

  def __init__(self, path: str, info: zipfile.ZipInfo) -> None:
    self._path, self._info = path, info
    self._is_verified = False

  @property
  def size(self) -> int:
    """Number of bytes."""
    return self._info.file_size

  def data(self) -> np.ndarray:
    """Returns the bytes; the first call verifies the archive's checksum.

    Raises:
      WeightsError: the entry is corrupt.
    """
    start = self._start()
    if not self.size:
      return np.zeros(0, np.uint8)
    data = np.memmap(self._path, np.uint8, 'r', start, (self.size,))
    if not self._is_verified and zlib.crc32(data) != self._info.CRC:
      raise self._damaged('its checksum differs')
    self._is_verified = True
    return data

  def _start(self) -> int:
    """Returns the offset of the entry's data in the file, in bytes."""
    path = pathlib.Path(self._path)
    with path.open('rb') as file:
      file.seek(self._info.header_offset)
      header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
      raise self._damaged('its header is cut off')
    signature, *lengths = _HEADER.unpack(header)
    start = self._info.header_offset + _HEADER.size + sum(lengths)
    if signature != b'PK\x03\x04' or start + self.size > path.stat().st_size:
      raise self._damaged('it has no header')
    return start

  def _damaged(self, why: str) -> tensors.WeightsError:
    return tensors.WeightsError(
      f'{self._path}: {self._info.filename[:80]!r} is damaged ({why}); '
      'download it again'
    )
