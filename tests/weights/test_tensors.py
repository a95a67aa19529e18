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


def refused(read_file, match):
  """Checks that the message is one line of bounded length."""
  with pytest.raises(tensors_lib.WeightsError, match=match) as caught:
    read_file()
  assert str(caught.value).isprintable()
  assert len(str(caught.value)) < 1000


def test_reads_what_the_library_writes(path):
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
    assert isinstance(found[key], tensors_lib.Tensor)
    assert (found[key].shape, found[key].dtype) == (x.shape, x.dtype)
    assert np.asarray(found[key]).dtype == x.dtype
    np.testing.assert_array_equal(found[key], x)
  assert np.asarray(found['brain'], np.float64).dtype == np.float64
  np.asarray(found['a'])[0, 0] = 7  # a copy, which nothing else sees
  np.testing.assert_array_equal(found['a'], X)


def test_the_library_reads_what_we_write(path):
  tensors = {
    'a': X.T,  # save_file alone would write the numbers in another order
    'b': X.astype(ml_dtypes.bfloat16),
    'c': np.ones((), 'i4'),
    'd': np.zeros((0, 3), np.float16),
    'e': X[:, ::2],
  }
  tensors_lib.write_safetensors(path, tensors)
  for reader in (safetensors.numpy.load_file, tensors_lib.safetensors):
    found = reader(path)
    assert found.keys() == tensors.keys()
    for key, x in tensors.items():
      assert found[key].shape == x.shape
      np.testing.assert_array_equal(found[key], x)
  with safetensors.safe_open(path, framework='numpy') as file:
    assert file.metadata() == {'format': 'pt'}
  assert [p.name for p in path.parent.iterdir()] == [path.name]
  other = path.with_name('other')
  other.touch()
  assert path.stat().st_mode == other.stat().st_mode


@pytest.mark.parametrize(
  'dtype', ['complex64', 'complex128', 'uint64', 'object', 'float8_e4m3fn']
)
def test_types_that_are_not_written(path, dtype):
  refused(
    lambda: tensors_lib.write_safetensors(path, {'z': X.astype(dtype)}), dtype
  )
  assert not list(path.parent.iterdir())


def test_files_are_replaced_while_they_are_open(path):
  tensors_lib.write_safetensors(path, {'a': X})
  found = tensors_lib.safetensors(path)
  tensors_lib.write_safetensors(path, {**found, 'b': X + 1})
  tensors_lib.write_safetensors(path, {'a': X + 2})
  np.testing.assert_array_equal(found['a'], X)


def test_opening_reads_no_numbers(path):
  with path.open('wb') as file:  # a hole of 100 GB: takes no space
    header = {'a': entry(0, 24), 'big': entry(24, 24 + 10**11, (10**11,), 'U8')}
    text = json.dumps(header).encode()
    file.write(struct.pack('<Q', len(text)) + text + X.tobytes())
    file.truncate(8 + len(text) + 24 + 10**11)
  found = tensors_lib.safetensors(path)
  assert found['big'].shape == (10**11,)
  np.testing.assert_array_equal(found['a'], X)


def test_a_header_of_100_mb_is_refused_unread(path):
  with path.open('wb') as file:
    file.write(struct.pack('<Q', 100 * 10**6))
    file.truncate(101 * 10**6)  # a hole: takes no space, reads as zeros
  refused(lambda: tensors_lib.safetensors(path), 'header of 100000000 bytes')


ENTRY = json.dumps(entry(0, 24)).encode()
# What the library says on a tensor that is not where the last one ended.
OFFSET = 'invalid offset for tensor'
REST = 'file not fully covered'
OVERFLOW = 'overflow computing buffer size'
HOSTILE = {
  'overlap': ({'a': entry(0, 24), 'b': entry(20, 44)}, 44, f'{OFFSET} `b`'),
  'same bytes': ({'a': entry(0, 24), 'b': entry(0, 24)}, 24, OFFSET),
  'gap': ({'a': entry(0, 24), 'b': entry(28, 52)}, 52, f'{OFFSET} `b`'),
  'gap before': ({'a': entry(4, 28)}, 28, OFFSET),
  'outside': ({'a': entry(0, 24)}, 20, REST),
  'rest': ({'a': entry(0, 24)}, 30, REST),
  'size': ({'a': entry(0, 20)}, 20, 'invalid shape, data type, or offset'),
  'backwards': ({'a': entry(24, 0)}, 24, OFFSET),
  'negative': ({'a': entry(-24, 0)}, 24, 'integer `-24`, expected usize'),
  'negative shape': (
    {'a': entry(0, 24, (-2, -3))},
    24,
    'integer `-2`, expected usize',
  ),
  'huge shape': ({'a': entry(0, 24, (2**62, 2**62))}, 24, OVERFLOW),
  # 64 bits would wrap round to 0 and to 24 bytes.
  'wraps to nothing': ({'a': entry(0, 0, (2**62, 4))}, 0, OVERFLOW),
  'wraps to its size': ({'a': entry(0, 24, (2**62 + 6,))}, 24, OVERFLOW),
  'bool shape': ({'a': entry(0, 24, (True, 6))}, 24, 'boolean `true`'),
  'float offset': ({'a': entry(0, 24.0)}, 24, 'floating point `24.0`'),
  'type': ({'a': entry(0, 24, dtype='O')}, 24, 'unknown variant `O`'),
  'float8': ({'a': entry(0, 6, dtype='F8_E4M3')}, 6, 'type F8_E4M3.*wanted'),
  'axes': ({'a': entry(0, 4, (1,) * 65)}, 4, '65 axes, wanted .* at most 32'),
  'no offsets': (
    {'a': {'dtype': 'F32', 'shape': [1]}},
    24,
    'missing field `data_offsets`',
  ),
  'list': ([1, 2], 0, 'invalid type: sequence'),
  # The library alone takes the last of the two.
  'twice': (b'{"a": %b, "a": %b}' % (ENTRY, ENTRY), 24, 'occurs twice'),
  'twice, spelt otherwise': (
    b'{"a": %b, "\\u0061": %b}' % (ENTRY, ENTRY),
    24,
    'occurs twice',
  ),
  'twice, of two types': (
    b'{"a": %b, "a": %b}' % (ENTRY, ENTRY.replace(b'F32', b'I32')),
    24,
    'occurs twice',
  ),
  'twice, elsewhere': (
    b'{"a": %b, "a": %b}' % (ENTRY, json.dumps(entry(24, 48)).encode()),
    48,
    OFFSET,
  ),
  'a field twice': (
    b'{"a": {"dtype": "I32", %b}' % ENTRY[1:],
    24,
    'duplicate field `dtype`',
  ),
  'metadata': ({'__metadata__': {'a': 1}}, 0, 'integer `1`, expected a string'),
  'tensor as metadata': ({'__metadata__': entry(0, 24)}, 24, 'expected a str'),
  'deep': (b'[' * 100_000, 0, 'invalid JSON'),
  'deep where ignored': (
    b'{"a": {"x": %b, %b}' % (b'[' * 10**5 + b']' * 10**5, ENTRY[1:]),
    24,
    'recursion limit',
  ),
  'text': (b'hello', 0, 'invalid JSON'),
  'behind the header': (b'{"a": %b} {}' % ENTRY, 24, 'trailing characters'),
  'not unicode': (b'{"\xff": %b}' % ENTRY, 24, 'invalid UTF-8'),
  'half a character': (b'{"\\ud800": %b}' % ENTRY, 24, 'invalid JSON'),
  'terminal codes': ({'a\n\x1b[2J': entry(3, 27)}, 27, OFFSET),
  'long name of a type': (
    {'a': entry(0, 24, dtype='z' * 10**6)},
    24,
    'unknown variant `zz',
  ),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_headers(path, name):
  header, size, message = HOSTILE[name]
  write(path, header, bytes(size))
  refused(lambda: tensors_lib.safetensors(path), f'{path}: .*{message}')


def test_empty_tensors_too_large_for_numpy(path):
  write(path, {'a': entry(0, 0, (0, 2**40, 2**40))})
  found = tensors_lib.safetensors(path)['a']
  assert found.shape == (0, 2**40, 2**40)
  refused(lambda: np.asarray(found), "'a' is damaged .*array is too big")


def test_truncated_files(path):
  remedy = 'no safetensors file, was cut short, .*download it again'
  for data, message in ((b'', 'too small'), (b'1234', 'too small')):
    path.write_bytes(data)
    refused(lambda: tensors_lib.safetensors(path), f'{message}.*{remedy}')
  write(path, {'a': entry(0, 24)}, length=5000)
  refused(
    lambda: tensors_lib.safetensors(path), f'invalid header length.*{remedy}'
  )
  write(path, {'a': entry(0, 24)}, length=2**64 - 1)
  refused(
    lambda: tensors_lib.safetensors(path), f'header of {2**64 - 1} .*{remedy}'
  )


def test_a_file_that_is_cut_short_while_it_is_open(path):
  tensors_lib.write_safetensors(path, {'a': X, 'b': X})
  found = tensors_lib.safetensors(path)
  with path.open('rb+') as file:
    file.truncate(path.stat().st_size - 4)
  np.testing.assert_array_equal(found['a'], X)
  refused(lambda: np.asarray(found['b']), "tensor 'b' is damaged .*download")


def test_what_is_no_file(path):
  refused(lambda: tensors_lib.safetensors(path), 'cannot be read .*No such')
  path.mkdir()
  refused(lambda: tensors_lib.safetensors(path), 'cannot be read .*directory')
