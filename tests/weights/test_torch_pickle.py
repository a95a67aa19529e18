"""Reading `.pth` files without torch, and without running them."""

import argparse
import collections
import os
import pathlib
import pickle
import zipfile

import numpy as np
import pytest

from tests.weights import pth
from vssl_jax.weights.readers import tensors, torch_pickle

X = np.arange(12, dtype=np.float32).reshape(3, 4)


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'model.pth'


def test_reads_nested_tensors_lazily(path):
  state = collections.OrderedDict(a=pth.FakeTensor(X), n=pth.FakeTensor([1, 2]))
  state._metadata = {'version': 1}
  options = argparse.Namespace(lr=0.1)
  pth.save(path, {'model': state, 'epoch': 3, 'args': options})
  found = torch_pickle.load(path)
  assert found['epoch'] == 3
  assert isinstance(found['args'], torch_pickle.Inert)
  assert not hasattr(found['args'], 'lr')
  a = found['model']['a']
  assert a.shape == (3, 4)
  np.testing.assert_array_equal(np.asarray(a), X)
  np.testing.assert_array_equal(np.asarray(found['model']['n']), [1, 2])
  path.unlink()
  with pytest.raises(FileNotFoundError):  # numbers were not read before
    np.asarray(a)


def test_strides_and_offsets(path):
  pth.save(
    path,
    {
      'turned': pth.FakeTensor(X, shape=(4, 3), strides=(1, 4)),
      'row': pth.FakeTensor(X, offset=4, shape=(4,), strides=(1,)),
    },
  )
  found = torch_pickle.load(path)
  np.testing.assert_array_equal(np.asarray(found['turned']), X.T)
  np.testing.assert_array_equal(np.asarray(found['row']), X[1])


@pytest.mark.parametrize(
  'changes',
  [
    {'offset': 1},
    {'offset': -1},
    {'shape': (3, 5), 'strides': (5, 1)},
    {'shape': (10**12,), 'strides': (0,)},
    {'strides': (-4, 1)},
    {'strides': (4,)},
  ],
)
def test_tensors_outside_their_data(path, changes):
  pth.save(path, {'a': pth.FakeTensor(X, **changes)})
  with pytest.raises(tensors.WeightsError, match='tensor'):
    torch_pickle.load(path)


class Call:
  """Calls anything when it is unpickled."""

  def __init__(self, function, *args):
    self.function, self.args = function, args

  def __reduce__(self):
    return self.function, self.args


TOUCH = '__import__("pathlib").Path({!r}).touch()'
CALLS = {
  'os.system': lambda path: Call(os.system, f'touch {path}'),
  'eval': lambda path: Call(eval, TOUCH.format(str(path))),
  'exec': lambda path: Call(exec, TOUCH.format(str(path))),
  'open': lambda path: Call(open, str(path), 'w'),
  'getattr': lambda path: Call(getattr, 'text', 'format'),
  'partial': lambda path: Call(
    __import__('functools').partial, os.system, f'touch {path}'
  ),
  'nested': lambda path: {'model': [Call(os.mkdir, str(path))]},
}


@pytest.mark.parametrize('protocol', [2, 4])
@pytest.mark.parametrize('name', CALLS)
def test_hostile_pickles_run_nothing(path, tmp_path, name, protocol):
  fired = tmp_path / 'fired'
  data = pickle.dumps(CALLS[name](fired), protocol)
  pth.write(path, data)
  with pytest.raises(tensors.WeightsError, match='not on the list of harmless'):
    torch_pickle.load(path)
  assert not fired.exists()


def test_the_hostile_pickles_of_these_tests_are_live(tmp_path):
  for name in ('os.system', 'eval', 'exec', 'open', 'nested'):
    fired = tmp_path / name
    held = pickle.loads(pickle.dumps(CALLS[name](fired)))
    assert fired.exists(), name
    if hasattr(held, 'close'):
      held.close()


def build(*instructions):
  return b'\x80\x02' + b''.join(instructions) + b'.'


FLOAT = b'ctorch\nFloatStorage\n'
REBUILD = b'ctorch._utils\n_rebuild_tensor_v2\n'
TENSOR = REBUILD + (
  b'((X\x07\x00\x00\x00storage' + FLOAT + b'X\x01\x00\x00\x000X\x03\x00\x00'
  b'\x00cpuK\x0ctQK\x00K\x0c\x85K\x01\x85\x89}tR'
)


def test_the_hand_written_tensor_is_one(path):
  pth.write(path, build(TENSOR), [X])
  np.testing.assert_array_equal(np.asarray(torch_pickle.load(path)), X.ravel())


@pytest.mark.parametrize(
  ('target', 'message'),
  [
    (REBUILD, 'change a function'),
    (FLOAT, 'change a type'),
    (TENSOR, 'change a tensor'),
  ],
)
def test_a_pickle_cannot_change_what_it_was_given(path, target, message):
  state = b'}X\x04\x00\x00\x00pathX\x0b\x00\x00\x00/etc/passwdsb'
  pth.write(path, build(target, state), [X])
  with pytest.raises(tensors.WeightsError, match=message):
    torch_pickle.load(path)


def test_names_with_dots_do_not_reach_through(path):
  # Protocol 4 may ask for module `torch`, name `FloatStorage.__init__...`.
  data = b'\x80\x04\x8c\x05torch\x8c\x17FloatStorage.__class__\x00'
  data = data.replace(b'\x00', b'') + b'\x93.'
  data = data.replace(b'\x8c\x17', b'\x8c\x16')
  pth.write(path, data)
  with pytest.raises(tensors.WeightsError, match=r'FloatStorage\.__class__'):
    torch_pickle.load(path)


def test_data_that_the_file_does_not_hold(path):
  pth.write(path, build(TENSOR), [X[:2]])
  with pytest.raises(tensors.WeightsError, match='does not hold'):
    torch_pickle.load(path)
  outside = TENSOR.replace(b'X\x01\x00\x00\x000', b'X\x05\x00\x00\x00../..')
  pth.write(path, build(outside), [X])
  with pytest.raises(tensors.WeightsError, match='does not hold'):
    torch_pickle.load(path)


def test_other_formats_and_archives(path):
  path.write_bytes(pickle.dumps({'a': 1}))
  with pytest.raises(tensors.WeightsError, match=r'before PyTorch 1\.6'):
    torch_pickle.load(path)
  pth.write(path, pickle.dumps({}), compression=zipfile.ZIP_DEFLATED)
  with pytest.raises(tensors.WeightsError, match='compressed'):
    torch_pickle.load(path)
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('readme', 'no pickle')
  with pytest.raises(tensors.WeightsError, match='0 pickles'):
    torch_pickle.load(path)
  pth.write(path, b'\x80\x02}X')
  with pytest.raises(tensors.WeightsError, match='damaged pickle'):
    torch_pickle.load(path)


def test_what_training_states_hold_beside_tensors(path):
  """Numbers of numpy, states of its generators, schedules, sets and paths."""
  x = np.arange(6, dtype=np.float32)
  defaults = collections.defaultdict(int, a=1)
  beside = {
    'loss': np.float64(0.5),
    'random': ('MT19937', np.arange(624, dtype=np.uint32), 3, 0, 0.0),
    'milestones': collections.Counter([3, 5]),
    'state': defaults,
    'rest': {'set': {1, 2}, 'bytes': b'abc'},
    'folder': pathlib.PosixPath('a/b'),
  }
  pth.save(path, {'x': pth.FakeTensor(x)} | beside)
  found = torch_pickle.load(path)
  np.testing.assert_array_equal(np.asarray(found['x']), x)
  assert isinstance(found['loss'], torch_pickle.Inert)
  assert isinstance(found['random'][1], torch_pickle.Inert)
  assert isinstance(found['state'], torch_pickle.Inert)
