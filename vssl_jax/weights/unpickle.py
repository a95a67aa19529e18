"""Reads `.pth` files of PyTorch without PyTorch and without running them.

Such a file is a zip archive of raw tensor data and one pickle, and a pickle
is a program: it can name any function and call it. The reader below resolves
only the names in its own tables, to objects of this file. The few names of
`INERT` (options that trainers saved) become empty objects; any other name is
an error.
"""

import dataclasses
import io
import math
import os
import pathlib
import pickle
import zipfile
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from vssl_jax.weights import read

MAX_PICKLE = 256 * 2**20

STORAGES = {
  'DoubleStorage': np.dtype('<f8'),
  'FloatStorage': np.dtype('<f4'),
  'HalfStorage': np.dtype('<f2'),
  'BFloat16Storage': np.dtype(ml_dtypes.bfloat16),
  'LongStorage': np.dtype('<i8'),
  'IntStorage': np.dtype('<i4'),
  'ShortStorage': np.dtype('<i2'),
  'CharStorage': np.dtype('i1'),
  'ByteStorage': np.dtype('u1'),
  'BoolStorage': np.dtype('?'),
}

INERT = {
  ('argparse', 'Namespace'),
  ('numpy', 'dtype'),
  ('numpy.core.multiarray', 'scalar'),
  ('numpy._core.multiarray', 'scalar'),
  ('torch', 'device'),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor inside an archive, read when numpy asks for it.

  Attributes:
    path: the archive.
    entry: name of the storage inside it.
    dtype: of the numbers.
    offset: of the first number in the storage, counted in numbers.
    shape: sizes.
    strides: steps between neighbours along each axis, counted in numbers.
  """

  path: str
  entry: str
  dtype: np.dtype
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]

  def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
    """Returns the numbers, always a copy."""
    with zipfile.ZipFile(self.path) as archive:
      flat = np.frombuffer(archive.read(self.entry), self.dtype)
    size = self.dtype.itemsize
    view = np.lib.stride_tricks.as_strided(
      flat[self.offset :], self.shape, [s * size for s in self.strides]
    )
    return np.array(view, dtype)

  def __setstate__(self, state: Any) -> None:
    """Refuses: a pickle could point the tensor at another file."""
    raise read.WeightsError('the pickle tries to change a tensor')


class Inert:
  """Takes the place of an object that nobody needs; does nothing."""

  def __init__(self, *args: Any) -> None:
    del args

  def __setstate__(self, state: Any) -> None:
    del state


class _Dict(dict):
  """Stands for OrderedDict; takes the attributes that modules leave on it."""

  def __setstate__(self, state: Any) -> None:
    del state


class _Kind:
  """A type of storage that a pickle may name and cannot change."""

  __slots__ = ('dtype',)

  def __init__(self, dtype: np.dtype) -> None:
    self.dtype = dtype

  def __setstate__(self, state: Any) -> None:
    raise read.WeightsError('the pickle tries to change a type')


class _Call:
  """A function that a pickle may call and cannot change."""

  __slots__ = ('_function',)

  def __init__(self, function: Callable[..., Any]) -> None:
    self._function = function

  def __call__(self, *args: Any) -> Any:
    return self._function(*args)

  def __setstate__(self, state: Any) -> None:
    raise read.WeightsError('the pickle tries to change a function')


class _Storage(tuple):
  """(dtype, entry, length) of the raw data of a tensor."""

  __slots__ = ()


class _Unpickler(pickle.Unpickler):
  """Resolves the names of tensors and nothing else."""

  def __init__(self, path: str, archive: zipfile.ZipFile, root: str) -> None:
    data = archive.read(root + 'data.pkl')
    super().__init__(io.BytesIO(data))
    self._path, self._root = path, root
    self._sizes = {i.filename: i.file_size for i in archive.infolist()}
    self._names = {
      ('collections', 'OrderedDict'): _Dict,
      ('torch._utils', '_rebuild_tensor_v2'): _Call(self._tensor),
      ('torch._utils', '_rebuild_parameter'): _Call(lambda data, *rest: data),
      ('torch', 'Size'): _Call(tuple),
    }

  def find_class(self, module: str, name: str) -> Any:
    """Returns what stands for a name in the pickle."""
    if (module, name) in self._names:
      return self._names[module, name]
    if module == 'torch' and name in STORAGES:
      return _Kind(STORAGES[name])
    if (module, name) in INERT:
      return Inert
    raise read.WeightsError(
      f'{self._path}: the pickle asks for {module}.{name}, which is not on '
      'the list of harmless names; it may be an attempt to run code. If you '
      'trust the file, load it where it was made and save its state_dict as '
      'safetensors'
    )

  def persistent_load(self, pid: Any) -> _Storage:
    """Returns the place of a storage; checks that the file holds it."""
    try:
      word, kind, key, _, length = pid
      entry, dtype = f'{self._root}data/{key}', kind.dtype
      if word != 'storage' or not isinstance(kind, _Kind) or length < 0:
        raise ValueError
      if self._sizes.get(entry, -1) < length * dtype.itemsize:
        raise ValueError
    except (TypeError, ValueError, AttributeError) as e:
      raise read.WeightsError(
        f'{self._path}: the pickle describes data that the file does not hold '
        f'({str(pid)[:120]})'
      ) from e
    return _Storage((dtype, entry, length))

  def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any,
              *rest: Any) -> Tensor:  # fmt: skip
    del rest  # gradients and hooks
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or len(shape) != len(strides):
      raise read.WeightsError(f'{self._path}: malformed tensor')
    dtype, entry, length = storage
    last = offset + sum(
      (n - 1) * s for n, s in zip(shape, strides, strict=True)
    )
    # No more numbers than are stored: a stride of 0 could ask for any amount.
    size = math.prod(shape)
    inside = (last < length and size <= length) or not size
    if not all(isinstance(n, int) and n >= 0 for n in numbers) or not inside:
      raise read.WeightsError(
        f'{self._path}: a tensor of shape {shape} reaches outside its data'
      )
    return Tensor(
      self._path, entry, dtype, offset, tuple(shape), tuple(strides)
    )


def load(path: str | os.PathLike[str]) -> Any:
  """Reads what `torch.save` wrote, with a `Tensor` for every tensor.

  Args:
    path: a file in the zip format of PyTorch 1.6 and later.

  Raises:
    WeightsError: another format, damaged, or a pickle that asks for more than
      tensors and plain containers.
  """
  path = str(pathlib.Path(path))
  try:
    with zipfile.ZipFile(path) as archive:
      root = _root(path, archive)
      return _Unpickler(path, archive, root).load()
  except zipfile.BadZipFile as e:
    raise read.WeightsError(
      f'{path}: not the zip format of torch.save ({e}). Files from before '
      'PyTorch 1.6 must be saved again by torch, or as safetensors'
    ) from e
  except read.WeightsError:
    raise
  except Exception as e:  # a damaged pickle can fail in any way
    raise read.WeightsError(f'{path}: damaged pickle: {e!r}') from e


def _root(path: str, archive: zipfile.ZipFile) -> str:
  """Returns the folder inside the archive, checked."""
  infos = archive.infolist()
  pickles = [i for i in infos if i.filename.endswith('/data.pkl')]
  if len(pickles) != 1 or len({i.filename for i in infos}) != len(infos):
    raise read.WeightsError(f'{path}: {len(pickles)} pickles, wanted one')
  if any(i.compress_type != zipfile.ZIP_STORED for i in infos):
    raise read.WeightsError(
      f'{path}: compressed entries, which torch.save does not write; they '
      'could unpack to any size'
    )
  if pickles[0].file_size > MAX_PICKLE:
    raise read.WeightsError(
      f'{path}: a pickle of {pickles[0].file_size} bytes, wanted at most '
      f'{MAX_PICKLE}'
    )
  root = pickles[0].filename.removesuffix('data.pkl')
  orders = [i for i in infos if i.filename == root + 'byteorder']
  if orders and archive.read(orders[0]) != b'little':
    raise read.WeightsError(f'{path}: byte order is not little-endian')
  return root
