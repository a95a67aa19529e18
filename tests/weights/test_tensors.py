"""Safetensors files, honest and hostile."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from vssl_jax.weights.readers import tensors as tensors_lib

X = np.arange(6, dtype=np.float32).reshape(2, 3)


def write(path, header, data=b'', length=None):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  length = len(text) if length is None else length
  path.write_bytes(struct.pack('<Q', length) + text + data)
  return path


def entry(begin, end, shape=(2, 3), dtype='F32'):
  return {'dtype': dtype, 'shape': list(shape), 'data_offsets': [begin, end]}


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'model.safetensors'


def test_reads_what_the_reference_library_writes(path):
  tensors = {
    'a': X,
    'half': X.astype(np.float16),
    'empty': np.zeros((0, 3), np.float32),
    'scalar': np.array(3, np.int64),
    'brain': X.astype(ml_dtypes.bfloat16),
  }
  safetensors.numpy.save_file(tensors, path, metadata={'format': 'pt'})
  found = tensors_lib.safetensors(path)
  assert found.keys() == tensors.keys()
  for key, x in tensors.items():
    assert found[key].dtype == x.dtype
    np.testing.assert_array_equal(found[key], x)
  with pytest.raises(ValueError, match='read-only'):
    found['a'][0, 0] = 1


def test_the_reference_library_reads_what_we_write(path):
  tensors = {
    'a': X.T,
    'b': X.astype(ml_dtypes.bfloat16),
    'c': np.ones((), 'i4'),
  }
  tensors_lib.write_safetensors(path, tensors)
  for reader in (safetensors.numpy.load_file, tensors_lib.safetensors):
    found = reader(path)
    assert found.keys() == tensors.keys()
    for key, x in tensors.items():
      np.testing.assert_array_equal(found[key], x)
  assert [p.name for p in path.parent.iterdir()] == [path.name]
  with pytest.raises(tensors_lib.WeightsError, match='complex64'):
    tensors_lib.write_safetensors(path, {'z': X.astype(np.complex64)})


def test_a_header_of_100_mb_is_refused_unread(path):
  with path.open('wb') as file:
    file.write(struct.pack('<Q', 100 * 10**6))
    file.truncate(101 * 10**6)  # a hole: takes no space, reads as zeros
  with pytest.raises(
    tensors_lib.WeightsError, match='header of 100000000 bytes'
  ):
    tensors_lib.safetensors(path)


HOSTILE = {
  'overlap': ({'a': entry(0, 24), 'b': entry(20, 44)}, 44, "'b'.*overlaps"),
  'same bytes': ({'a': entry(0, 24), 'b': entry(0, 24)}, 24, 'overlaps'),
  'gap': ({'a': entry(0, 24), 'b': entry(28, 52)}, 52, 'leaves a gap'),
  'outside': ({'a': entry(0, 24)}, 20, '24 bytes of tensors.*has 20'),
  'rest': ({'a': entry(0, 24)}, 30, '24 bytes of tensors.*has 30'),
  'size': ({'a': entry(0, 20)}, 20, 'needs 24 bytes and has 20'),
  'negative': ({'a': entry(-24, 0)}, 24, 'natural numbers'),
  'negative shape': ({'a': entry(0, 24, (-2, -3))}, 24, 'natural numbers'),
  'huge shape': ({'a': entry(0, 24, (2**62, 2**62))}, 24, 'and has 24'),
  'bool shape': ({'a': entry(0, 24, (True, 6))}, 24, 'natural numbers'),
  'float offset': ({'a': entry(0, 24.0)}, 24, 'natural numbers'),
  'type': ({'a': entry(0, 24, dtype='O')}, 24, 'dtype out of'),
  'no offsets': ({'a': {'dtype': 'F32', 'shape': [1]}}, 24, 'wanted shape'),
  'list': ([1, 2], 0, 'no JSON object'),
  'twice': (
    b'{"a": %b, "a": %b}' % ((json.dumps(entry(0, 24)).encode(),) * 2),
    24,
    'occurs twice',
  ),
  'deep': (b'[' * 100_000, 0, 'not valid JSON'),
  'text': (b'hello', 0, 'not valid JSON'),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_headers(path, name):
  header, size, message = HOSTILE[name]
  write(path, header, bytes(size))
  with pytest.raises(tensors_lib.WeightsError, match=message):
    tensors_lib.safetensors(path)


def test_truncated_files(path):
  path.write_bytes(b'1234')
  with pytest.raises(tensors_lib.WeightsError, match='4 bytes, too short'):
    tensors_lib.safetensors(path)
  write(path, {'a': entry(0, 24)}, length=5000)
  with pytest.raises(tensors_lib.WeightsError, match='header of 5000 bytes'):
    tensors_lib.safetensors(path)
