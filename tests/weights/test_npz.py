"""Npz files, honest and hostile: none runs anything or unpacks without end."""

import io
import pathlib
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from vssl_jax.weights.readers import npz, tensors

X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'model.npz'


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_reads_what_numpy_writes(path, save):
  arrays = {
    'a/b': X,
    'columns': np.asfortranarray(X),
    'half': X.astype(np.float16),
    'scalar': np.float64(3),
    'empty': np.zeros((0, 3), np.int8),
    'big endian': X.astype('>f4'),
  }
  save(path, **arrays)
  found = npz.load(path)
  assert found.keys() == arrays.keys()
  for key, x in arrays.items():
    assert found[key].shape == x.shape
    np.testing.assert_array_equal(np.asarray(found[key]), x)
  assert np.asarray(found['a/b'], np.float16).dtype == np.float16


def test_opening_reads_no_numbers(path):
  np.savez(path, big=np.zeros(2**24, np.uint8))
  tracemalloc.start()
  found = npz.load(path)
  assert tracemalloc.get_traced_memory()[1] < 2**20
  assert np.asarray(found['big']).nbytes == 2**24
  tracemalloc.stop()


class Bomb:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self.path,)


def test_objects_are_never_unpickled(path, tmp_path):
  fired = tmp_path / 'fired'
  np.savez(path, a=np.array([Bomb(fired)], object), allow_pickle=True)
  with pytest.raises(tensors.WeightsError, match='can run code'):
    npz.load(path)
  assert not fired.exists()
  with np.load(path, allow_pickle=True) as file:  # it was a real bomb
    file['a']
  assert fired.exists()


def entry(x, header=None):
  """An array as npz files hold it, with another header if one is given."""
  file = io.BytesIO()
  np.lib.format.write_array(file, x)
  data = file.getvalue()
  if header is None:
    return data
  found = io.BytesIO()
  np.lib.format.write_array_header_1_0(found, header)
  return found.getvalue() + x.tobytes()


def head(**changes):
  return {'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)} | changes


HOSTILE = {
  'more than there is': ({'a.npy': entry(X, head(shape=(2, 4)))}, 'needs 32'),
  'less': ({'a.npy': entry(X, head(shape=(2, 2)))}, 'needs 16 bytes and has'),
  'endless': ({'a.npy': entry(X, head(shape=(2**62, 2**62)))}, 'and has 24'),
  'negative': ({'a.npy': entry(X, head(shape=(-2, -3)))}, 'wanted natural'),
  'outside': ({'../../a.txt': b'hello'}, 'is no array'),
  'text': ({'a.npy': b'hello'}, 'a damaged one'),
  'version': ({'a.npy': b'\x93NUMPY\x09\x00' + bytes(40)}, 'version'),
  'records': ({'a.npy': entry(np.zeros(3, 'f4,i4'))}, 'wanted numbers'),
  'deep': (
    {'a.npy': b'\x93NUMPY\x01\x00\x10\x27' + b'[' * 10_000},
    'a damaged one',
  ),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_entries(path, name):
  entries, message = HOSTILE[name]
  with zipfile.ZipFile(path, 'w') as archive:
    for key, data in entries.items():
      archive.writestr(key, data)
  with pytest.raises(tensors.WeightsError, match=message):
    npz.load(path)
  assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_hostile_archives(path, tmp_path):
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('a.npy', entry(X))
    archive.writestr('a.npy', entry(X))
  with pytest.raises(tensors.WeightsError, match='a name occurs twice'):
    npz.load(path)
  np.savez_compressed(path, a=np.zeros(10**8, np.uint8))
  assert path.stat().st_size < 10**6
  with pytest.raises(tensors.WeightsError, match='unpack to 100000128'):
    npz.load(path)
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_LZMA) as archive:
    archive.writestr('a.npy', entry(X))
  with pytest.raises(tensors.WeightsError, match='numpy never does'):
    npz.load(path)
  for name in ('text.npz', 'x.tar'):
    (tmp_path / name).write_text('hello')
    with pytest.raises(tensors.WeightsError, match=name):
      npz.load(tmp_path / name)


def test_damage_is_found(path):
  np.savez(path, a=np.ones(1000, np.float32))
  data = bytearray(path.read_bytes())
  data[2000] ^= 1
  path.write_bytes(data)
  with pytest.raises(tensors.WeightsError, match=r"'a\.npy' is damaged"):
    np.asarray(npz.load(path)['a'])
  path.write_bytes(data[:3000])
  with pytest.raises(tensors.WeightsError, match='not a zip file'):
    npz.load(path)


def sizes(path, *, packed=None, unpacked=None):
  """Changes the sizes that the directory gives for its only entry."""
  data = bytearray(path.read_bytes())
  start = data.rfind(b'PK\1\2')
  for offset, size in ((20, packed), (24, unpacked)):
    if size is not None:
      struct.pack_into('<I', data, start + offset, size)
  path.write_bytes(data)


def refused(path):
  """Opens and reads a file; returns the message of one line."""
  with pytest.raises(tensors.WeightsError) as caught:
    for x in npz.load(path).values():
      np.asarray(x)
  text = str(caught.value)
  assert text.startswith(f'{path}: ')
  assert text.isprintable() and len(text) < 1000
  return text


@pytest.mark.parametrize('method', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize('columns', [2, 3, 4])
@pytest.mark.parametrize('more', [-8, 8])
@pytest.mark.parametrize('packed', [False, True])
def test_sizes_that_differ_from_the_data(path, method, columns, more, packed):
  """Whatever the header of the array says: it fits, is less, or is more."""
  data = entry(X, head(shape=(2, columns)))
  with zipfile.ZipFile(path, 'w', method) as archive:
    archive.writestr('a.npy', data)
    size = archive.getinfo('a.npy').compress_size
  sizes(path, packed=size + more if packed else None, unpacked=len(data) + more)
  refused(path)


def test_bombs_that_lie_about_their_size(path):
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('a.npy', entry(X) + bytes(10**8))
  sizes(path, unpacked=len(entry(X)))
  tracemalloc.start()
  refused(path)
  assert tracemalloc.get_traced_memory()[1] < 2**20
  tracemalloc.stop()


def test_names_that_could_be_mistaken(path):
  """Numpy's file['a.npy'] is another array for its key a.npy."""
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('a.npy.npy', entry(X))
    archive.writestr('a.npy', entry(X + 1))
  found = npz.load(path)
  np.testing.assert_array_equal(found['a.npy'], X)
  np.testing.assert_array_equal(found['a'], X + 1)


def test_messages_hold_nothing_but_text(path):
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('a\n\x1b[2J.npy', entry(X))
  data = path.read_bytes()
  path.write_bytes(data.replace(X.tobytes(), bytes(24)))
  refused(path)


def test_no_message_advises_to_run_code(path):
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('a.npy', entry(X))
  path.write_bytes(b'hello' + path.read_bytes())  # still an archive
  assert 'allow_pickle' not in refused(path)
  long = b'\x93NUMPY\x01\x00' + struct.pack('<H', 20_000) + b' ' * 20_000
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('a.npy', long)
  assert 'allow_pickle' not in refused(path)


def test_what_is_no_archive(path):
  refused(path)
  path.write_bytes(b'')
  refused(path)
  with path.open('wb') as file:
    np.save(file, X)
  refused(path)
  path.unlink()
  path.mkdir()
  assert 'directory' in refused(path)


def test_empty_arrays_too_large_for_numpy(path):
  data = entry(X[:0], head(shape=(0, 2**62, 2**62)))
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('a.npy', data)
  assert 'array is too big' in refused(path)
