"""Reads PyTorch `.pth` files without PyTorch and without executing code.

Such a file is a zip archive of raw tensor data and one pickle. A pickle is a
program that can import and call any function. This reader interprets the
instructions itself. It builds only containers, strings, numbers and `Tensor`s,
and calls only the functions in its own tables. It never formats, hashes or
compares unpickled objects, which can be exponentially large. The names in
`INERT` (options saved by trainers) become empty objects; any other name is an
error.
"""

import dataclasses
import math
import os
import pathlib
import pickletools
import zipfile
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from vssl_jax.weights.readers import archives
from vssl_jax.weights.readers import tensors as tensors_lib

# For comparison: the training state of a ViT-g has 4,000 tensors, and a pickle
# of 1 MB and 200,000 instructions.
MAX_PICKLE = 16 * 2**20
MAX_STEPS = 1_000_000
# Limit of the total size of all tensors, as a multiple of the file size:
# tensors can share data.
MAX_SHARED = 4

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

# Names in training states that are not tensors: options, schedules, numbers and
# numpy states. None of them is called or built.
INERT = {
  ('argparse', 'Namespace'),
  ('collections', 'Counter'),
  ('collections', 'defaultdict'),
  ('pathlib', 'PosixPath'),
  # The type set, and default factories of defaultdicts.
  *(
    (module, name)
    for module in ('__builtin__', 'builtins')
    for name in ('set', 'int', 'long', 'float', 'dict', 'list')
  ),
  ('_codecs', 'encode'),  # for bytes in protocol 2
  ('numpy', 'dtype'),
  ('numpy', 'ndarray'),
  ('numpy.core.multiarray', '_reconstruct'),
  ('numpy._core.multiarray', '_reconstruct'),
  ('numpy.core.multiarray', 'scalar'),
  ('numpy._core.multiarray', 'scalar'),
  ('torch', 'device'),
}
# Instructions that push their argument.
CONSTANTS = {
  'BINFLOAT', 'BININT', 'BININT1', 'BININT2', 'LONG1', 'LONG4',
  'BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8', 'BINBYTES',
  'SHORT_BINBYTES', 'BINBYTES8', 'BINSTRING', 'SHORT_BINSTRING', 'BYTEARRAY8',
  'INT', 'LONG', 'FLOAT', 'STRING', 'UNICODE',
}  # fmt: skip
SINGLES = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
TUPLES = {'EMPTY_TUPLE': 0, 'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
  """A tensor inside an archive, read on conversion to numpy.

  Attributes:
    storage: the raw data.
    dtype: dtype of the elements.
    offset: offset of the first element in the storage, in elements.
    shape: shape of the tensor.
    strides: strides of each axis, in elements.
  """

  storage: archives.Stored
  dtype: np.dtype
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]

  @property
  def nbytes(self) -> int:
    """Size of the tensor in bytes."""
    return math.prod(self.shape) * self.dtype.itemsize

  def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
    """Returns a copy of the data."""
    data, size = self.storage.data(), self.dtype.itemsize
    flat = data[: len(data) // size * size].view(self.dtype)
    view = np.lib.stride_tricks.as_strided(
      flat[self.offset :], self.shape, [s * size for s in self.strides]
    )
    return np.array(view, dtype)


class Inert:
  """Placeholder for an object that is not needed."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Kind:
  """A storage type that a pickle may name."""

  dtype: np.dtype


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
  """A function that a pickle may call."""

  function: Callable[..., Any]


@dataclasses.dataclass(frozen=True, eq=False)
class _Storage:
  """Raw data of tensors.

  Attributes:
    data: entry of the archive.
    dtype: dtype of the elements.
    length: number of elements.
  """

  data: archives.Stored
  dtype: np.dtype
  length: int


class _Machine:
  """Interpreter for the pickle of one file."""

  def __init__(self, path: str, storages: dict[str, archives.Stored]) -> None:
    self._path, self._storages = path, storages
    self._stack: list[Any] = []
    self._below: list[list[Any]] = []  # stacks before each mark
    self._memo: dict[int, Any] = {}
    self._steps = 0
    self.tensors: list[Tensor] = []
    self._names = {
      ('collections', 'OrderedDict'): _Call(self._dict),
      ('torch._utils', '_rebuild_tensor_v2'): _Call(self._tensor),
      ('torch._utils', '_rebuild_parameter'): _Call(lambda data, *rest: data),
      ('torch', 'Size'): _Call(self._size),
    }

  def run(self, data: bytes) -> Any:
    """Interprets a pickle and returns the object that it builds."""
    for opcode, argument, _ in pickletools.genops(data):
      self._spend(1)
      if opcode.name == 'STOP':
        return self._stack.pop()
      self._step(opcode.name, argument)
    raise self._error('the pickle has no end')

  def _spend(self, steps: int) -> None:
    self._steps += steps
    if self._steps > MAX_STEPS:
      raise self._error(
        f'a pickle of more than {MAX_STEPS} steps, wanted the names and shapes '
        'of some thousand tensors'
      )

  def _step(self, name: str, argument: Any) -> None:
    """Executes one instruction."""
    stack = self._stack
    if name in CONSTANTS:
      stack.append(argument)
    elif name in SINGLES:
      stack.append(SINGLES[name])
    elif name in TUPLES:
      count = TUPLES[name]
      items = tuple(stack[len(stack) - count :])
      if len(items) != count:
        raise IndexError('stack')
      del stack[len(stack) - count :]
      stack.append(items)
    elif name in ('BINGET', 'LONG_BINGET', 'GET'):
      stack.append(self._memo[argument])
    elif name in ('BINPUT', 'LONG_BINPUT', 'PUT'):
      self._memo[argument] = stack[-1]
    elif name == 'MEMOIZE':
      self._memo[len(self._memo)] = stack[-1]
    else:
      instruction = getattr(self, f'_do_{name.lower()}', None)
      if instruction is None:
        raise self._error(
          f'the pickle has the instruction {name}, which torch.save does not '
          'write'
        )
      instruction(argument)

  def _do_proto(self, argument: Any) -> None:
    pass

  _do_frame = _do_proto

  def _do_mark(self, _: Any) -> None:
    self._below.append(self._stack)
    self._stack = []

  def _above_mark(self) -> list[Any]:
    """Pops the last mark and all items above it, and returns the items."""
    items, self._stack = self._stack, self._below.pop()
    self._spend(len(items))
    return items

  def _do_pop(self, _: Any) -> None:
    self._stack.pop()

  def _do_pop_mark(self, _: Any) -> None:
    self._above_mark()

  def _do_dup(self, _: Any) -> None:
    self._stack.append(self._stack[-1])

  def _do_tuple(self, _: Any) -> None:
    items = tuple(self._above_mark())
    self._stack.append(items)

  def _do_list(self, _: Any) -> None:
    items = self._above_mark()
    self._stack.append(items)

  # Members of sets are not hashed.
  _do_frozenset = _do_list

  def _do_empty_list(self, _: Any) -> None:
    self._stack.append([])

  _do_empty_set = _do_empty_list

  def _do_append(self, _: Any) -> None:
    item = self._stack.pop()
    self._top(list).append(item)

  def _do_appends(self, _: Any) -> None:
    items = self._above_mark()
    self._top(list).extend(items)

  _do_additems = _do_appends

  def _do_empty_dict(self, _: Any) -> None:
    self._stack.append({})

  def _do_dict(self, _: Any) -> None:
    items = self._above_mark()
    self._stack.append({})
    self._set(items)

  def _do_setitem(self, _: Any) -> None:
    value, key = self._stack.pop(), self._stack.pop()
    self._set([key, value])

  def _do_setitems(self, _: Any) -> None:
    self._set(self._above_mark())

  def _set(self, items: list[Any]) -> None:
    top = self._top(dict)
    for key, value in zip(items[::2], items[1::2], strict=True):
      top[key if _is_plain(key) else Inert()] = value

  def _top(self, kind: type) -> Any:
    top = self._stack[-1]
    if isinstance(top, Inert):  # options that are not needed
      return kind()
    if not isinstance(top, kind):
      raise TypeError(f'{type(top).__name__} is no {kind.__name__}')
    return top

  def _do_global(self, argument: Any) -> None:
    module, _, name = argument.partition(' ')
    self._stack.append(self._resolve(module, name))

  def _do_inst(self, argument: Any) -> None:
    self._do_global(argument)
    raise self._error('the pickle makes an object, which torch.save does not')

  def _do_stack_global(self, _: Any) -> None:
    name, module = self._stack.pop(), self._stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
      raise TypeError('a name is no text')
    self._stack.append(self._resolve(module, name))

  def _resolve(self, module: str, name: str) -> Any:
    """Returns the object for a name in the pickle."""
    if (module, name) in self._names:
      return self._names[module, name]
    if module == 'torch' and name in STORAGES:
      return _Kind(STORAGES[name])
    if (module, name) in INERT:
      return Inert
    raise self._error(
      f'the pickle refers to {module[:60]}.{name[:60]}, which is not on the '
      'list of harmless names; it may be an attempt to run code. If you trust '
      'the file, load it where it was made and save its state_dict as '
      'safetensors'
    )

  def _do_reduce(self, _: Any) -> None:
    arguments, function = self._stack.pop(), self._stack.pop()
    if not isinstance(arguments, tuple):
      raise TypeError('arguments are no tuple')
    if function is Inert:
      self._stack.append(Inert())
    elif isinstance(function, _Call):
      self._stack.append(function.function(*arguments))
    else:
      raise self._error('the pickle calls what is no function')

  _do_newobj = _do_reduce

  def _do_build(self, _: Any) -> None:
    self._stack.pop()
    top = self._stack[-1]
    # State of dicts (attributes of a module's state_dict) and of options.
    if not isinstance(top, dict | Inert):
      names = {Tensor: 'a tensor', _Kind: 'a type', _Call: 'a function'}
      description = names.get(type(top), 'an object')
      raise self._error(f'the pickle tries to change {description}')

  def _do_binpersid(self, _: Any) -> None:
    """Replaces the description of a storage by its entry in the archive."""
    description = self._stack.pop()
    key = length = None
    if isinstance(description, tuple) and len(description) == 5:
      tag, kind, key, _, length = description
      data = self._storages.get(key) if isinstance(key, str) else None
      is_storage = isinstance(tag, str) and tag == 'storage'
      if is_storage and isinstance(kind, _Kind) and data and _is_size(length):
        if data.size >= length * kind.dtype.itemsize:
          self._stack.append(_Storage(data, kind.dtype, length))
          return
    raise self._error(
      'the pickle describes data that the file does not hold (storage '
      f'{tensors_lib.short(key)} of {tensors_lib.short(length)} numbers)'
    )

  def _dict(self, *arguments: Any) -> dict[Any, Any]:
    """Builds a dict for an OrderedDict: empty or from lists of pairs."""
    items: list[Any] = []
    for pairs in arguments:
      if not isinstance(pairs, list | tuple):
        raise TypeError('an OrderedDict of no list')
      self._spend(len(pairs))
      items += pairs
    result: dict[Any, Any] = {}
    for pair in items:
      if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise TypeError('an OrderedDict of no pairs')
      result[pair[0] if _is_plain(pair[0]) else Inert()] = pair[1]
    return result

  def _size(self, sizes: Any = ()) -> tuple[int, ...]:
    """Builds a tuple for a torch.Size."""
    is_list = (
      isinstance(sizes, list | tuple) and len(sizes) <= tensors_lib.MAX_AXES
    )
    if not is_list or not all(_is_size(n) for n in sizes):
      raise self._error(
        f'a shape that is none, of at most {tensors_lib.MAX_AXES} axes'
      )
    return tuple(sizes)

  def _tensor(self, storage: Any, offset: Any, shape: Any, strides: Any,
              *rest: Any) -> Tensor:  # fmt: skip
    del rest  # gradients and hooks
    if not isinstance(storage, _Storage) or not _is_size(offset):
      raise self._error('malformed tensor')
    shape, strides = self._size(shape), self._size(strides)
    if len(shape) != len(strides):
      raise self._error('malformed tensor')
    last_index = offset + sum(
      (n - 1) * s for n, s in zip(shape, strides, strict=True)
    )
    # Not larger than its storage: with strides of 0 the size could be anything.
    size = math.prod(shape)
    if size and (last_index >= storage.length or size > storage.length):
      raise self._error(f'a tensor of shape {shape} reaches outside its data')
    tensor = Tensor(storage.data, storage.dtype, offset, shape, strides)
    self.tensors.append(tensor)
    return tensor

  def _error(self, what: str) -> tensors_lib.WeightsError:
    return tensors_lib.WeightsError(f'{self._path}: {what}')


def _is_size(x: Any) -> bool:
  return type(x) is int and 0 <= x < 2**63


def _is_plain(key: Any) -> bool:
  """Returns whether a key can be hashed quickly and without collisions."""
  if type(key) is int:
    return abs(key) < 2**60
  return key is None or isinstance(key, str | bytes | bool)


def load(path: str | os.PathLike[str]) -> Any:
  """Loads a file of `torch.save`, with a lazy `Tensor` for every tensor.

  Args:
    path: a file in the zip format of PyTorch 1.6 and later.

  Returns:
    The saved object.

  Raises:
    WeightsError: unsupported format, corrupt, or a pickle with other objects
      than tensors and plain containers.
  """
  path = str(pathlib.Path(path))
  try:
    infos = archives.entries(path)
    data, storages = _parts(path, infos)
    machine = _Machine(path, storages)
    payload = machine.run(data)
    _check_shared(path, machine.tensors, infos)
  except zipfile.BadZipFile as e:
    raise tensors_lib.WeightsError(
      f'{path}: not the zip format of torch.save ({e}). Files from before '
      'PyTorch 1.6 must be saved again by torch, or as safetensors'
    ) from e
  except (tensors_lib.WeightsError, OSError):
    raise
  except Exception as e:  # a corrupt pickle can raise anything
    raise tensors_lib.WeightsError(
      f'{path}: damaged pickle ({type(e).__name__}: {str(e)[:200]})'
    ) from e
  return payload


def _parts(
  path: str, infos: list[zipfile.ZipInfo]
) -> tuple[bytes, dict[str, archives.Stored]]:
  """Returns the pickle of an archive, and its storages by key."""
  pickles = [i for i in infos if i.filename.endswith('/data.pkl')]
  if len(pickles) != 1:
    raise tensors_lib.WeightsError(
      f'{path}: {len(pickles)} pickles, wanted one'
    )
  if any(i.compress_type != zipfile.ZIP_STORED for i in infos):
    raise tensors_lib.WeightsError(
      f'{path}: compressed entries, which torch.save does not write; they '
      'could unpack to any size'
    )
  if any(i.file_size != i.compress_size for i in infos):
    raise tensors_lib.WeightsError(f'{path}: an entry has two sizes')
  if pickles[0].file_size > MAX_PICKLE:
    raise tensors_lib.WeightsError(
      f'{path}: a pickle of {pickles[0].file_size} bytes, wanted at most '
      f'{MAX_PICKLE}'
    )
  root = pickles[0].filename.removesuffix('data.pkl')
  for info in infos:
    if info.filename == root + 'byteorder':
      byte_order = archives.Stored(path, info)
      if byte_order.size > 16 or byte_order.data().tobytes() != b'little':
        raise tensors_lib.WeightsError(
          f'{path}: byte order is not little-endian'
        )
  start = f'{root}data/'
  storages = {
    i.filename.removeprefix(start): archives.Stored(path, i)
    for i in infos
    if i.filename.startswith(start)
  }
  return archives.Stored(path, pickles[0]).data().tobytes(), storages


def _check_shared(
  path: str, tensors: list[Tensor], infos: list[zipfile.ZipInfo]
) -> None:
  """Raises if tensors share data so often that memory would run out."""
  distinct = {
    (id(t.storage), t.offset, t.shape, t.strides, t.dtype.str): t.nbytes
    for t in tensors
  }
  claimed, size = sum(distinct.values()), sum(i.file_size for i in infos)
  if claimed > MAX_SHARED * size:
    raise tensors_lib.WeightsError(
      f'{path}: tensors of {claimed} bytes in a file of {size}, wanted at most '
      f'{MAX_SHARED} times as many; it is damaged or hostile'
    )
