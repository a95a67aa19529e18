"""Writes `.pth` files as torch does, without torch."""

import io
import pickle
import sys
import types
import zipfile

import numpy as np


class FakeTensor:
  """Pickles like a tensor of torch."""

  def __init__(self, x, **changes):
    self.x = np.asarray(x)
    strides = [s // self.x.itemsize for s in self.x.strides]
    self.fields = {'offset': 0, 'shape': self.x.shape, 'strides': strides}
    self.fields |= changes


class _Storage:
  def __init__(self, x):
    self.x = x


def save(path, payload, *, module=None, compression=zipfile.ZIP_STORED):
  """Writes the archive; `payload` may hold `FakeTensor`s."""
  fake = module or _fake_torch()
  utils = types.ModuleType('torch._utils')
  saved = {n: sys.modules.get(n) for n in ('torch', 'torch._utils')}
  sys.modules |= {'torch': fake, 'torch._utils': utils}

  def _rebuild_tensor_v2(*args):
    raise AssertionError('only its name is saved')

  _rebuild_tensor_v2.__module__ = 'torch._utils'
  _rebuild_tensor_v2.__qualname__ = '_rebuild_tensor_v2'
  utils._rebuild_tensor_v2 = _rebuild_tensor_v2
  storages = []

  class Pickler(pickle.Pickler):
    def reducer_override(self, x):
      if isinstance(x, FakeTensor):
        f = x.fields
        args = (_Storage(x.x), f['offset'], tuple(f['shape']))
        return _rebuild_tensor_v2, (*args, tuple(f['strides']), False, {})
      return NotImplemented

    def persistent_id(self, x):
      if not isinstance(x, _Storage):
        return None
      storages.append(x.x)
      names = {'float32': 'FloatStorage', 'int64': 'LongStorage'}
      kind = getattr(fake, names[str(x.x.dtype)])
      return ('storage', kind, str(len(storages) - 1), 'cpu', x.x.size)

  data = io.BytesIO()
  try:
    Pickler(data, protocol=2).dump(payload)
  finally:
    for name, old in saved.items():
      if old is None:
        del sys.modules[name]
      else:
        sys.modules[name] = old
  write(path, data.getvalue(), storages, compression)


def write(path, data, storages=(), compression=zipfile.ZIP_STORED):
  """Writes an archive from a finished pickle."""
  with zipfile.ZipFile(path, 'w', compression) as archive:
    archive.writestr('model/data.pkl', data)
    archive.writestr('model/version', '3\n')
    archive.writestr('model/byteorder', 'little')
    for i, x in enumerate(storages):
      archive.writestr(f'model/data/{i}', np.ascontiguousarray(x).tobytes())


def _fake_torch():
  fake = types.ModuleType('torch')
  for name in ('FloatStorage', 'LongStorage'):
    setattr(fake, name, type(name, (), {'__module__': 'torch'}))
  return fake
