"""Foreign files are read in bounded time and memory, whatever they claim."""

import json
import pickle
import struct
import zipfile

import jax
import numpy as np
import pytest

import vssl_jax
from tests.weights import pth
from tests.weights import test_published as published
from vssl_jax import weights
from vssl_jax.models import vit
from vssl_jax.weights.readers import archives, npz, torch_pickle
from vssl_jax.weights.readers import tensors as tensors_lib

# Each took minutes, or all memory, before; now some milliseconds.
pytestmark = pytest.mark.timeout(60)
X = np.arange(12, dtype=np.float32).reshape(3, 4)


def refused(read_file, match):
  """Returns the message, which must fit on a screen."""
  with pytest.raises(tensors_lib.WeightsError, match=match) as caught:
    read_file()
  text = str(caught.value)
  assert len(text) < 1000
  return text


def text(x):
  data = x.encode()
  return b'X' + struct.pack('<I', len(data)) + data


def doubled(times=60, first=b')', pair=b'h%ch%c\x86'):
  """A pickle's instructions for a tuple, or a list, of itself and itself."""
  found = first + b'q\x00'
  for i in range(times):
    found += b'0' + pair % (i, i) + b'q%c' % (i + 1)
  return found


TUPLE, LIST = doubled(), doubled(60, b']', b'](h%ch%ce')
REBUILD = b'ctorch._utils\n_rebuild_tensor_v2\n'
STORAGE = (
  b'(' + text('storage') + b'ctorch\nFloatStorage\n' + text('0') + text('cpu')
  + b'K\x0ctQ'
)  # fmt: skip
HUGE = b'\x8b' + struct.pack('<I', 10**6) + b'\x7f' * 10**6  # 1 MB integer
ORDERED = b'ccollections\nOrderedDict\n'
COLLIDING = b''.join(
  b'\x8a\x0a' + (i * (2**61 - 1)).to_bytes(10, 'little') + b'N'
  for i in range(1, 30_001)
)  # integers of one hash
PICKLES = {
  'doubled tuple as a storage': (TUPLE + b'Q', 'not hold .storage None of'),
  'doubled list as a storage': (LIST + b'Q', 'does not hold'),
  'doubled tuple in a storage': (
    b'(' + text('storage') + b'ctorch\nFloatStorage\n' + TUPLE + text('cpu')
    + b'K\x0ctQ',
    'storage a tuple of 12 numbers',
  ),
  'doubled tuple as a shape': (
    REBUILD + b'(' + STORAGE + b'K\x00' + TUPLE + b'K\x01\x85\x89}tR',
    'a shape that is none',
  ),
  'shape of huge integers': (
    REBUILD + b'(' + STORAGE + b'K\x00(' + HUGE + b'2' * 19 + b't'
    + b'(' + b'K\x01' * 20 + b't\x89}tR',
    'a shape that is none',
  ),
  'huge offset': (
    REBUILD + b'(' + STORAGE + HUGE + b'K\x01\x85K\x01\x85\x89}tR',
    'malformed tensor',
  ),
  'huge length': (STORAGE.replace(b'K\x0ctQ', HUGE + b'tQ'), 'a huge integer'),
  'call of a doubled tuple': (TUPLE + b')R', 'calls what is no function'),
  'arguments that are doubled': (
    REBUILD + TUPLE + b'R', r'damaged pickle \(TypeError|malformed tensor',
  ),
  'change of a tensor by a doubled tuple': (
    REBUILD + b'(' + STORAGE + b'K\x00K\x0c\x85K\x01\x85\x89}tR' + TUPLE + b'b',
    'change a tensor',
  ),
  'OrderedDict of a doubled tuple': (
    ORDERED + TUPLE + b'\x85R', r'damaged pickle|no pairs|no dict of tensors|'
    'no tensors at its top',
  ),
  'name of 1 MB': (b'c' + b'a' * 10**6 + b'\nb\n', 'refers to aaaa'),
  'memo of 2^31': (
    b'}r' + struct.pack('<I', 2**31 - 1), 'no tensors at its top',
  ),
  'string of 2^62': (
    b'\x8d' + struct.pack('<Q', 2**62) + b'ab', 'damaged pickle',
  ),
  'copies of a long list': (
    b'](' + b'N' * 5_000 + b'eq\x00' + b'ctorch\nSize\nq\x01'
    + (b'h\x01h\x00\x85R0' * 500),
    'a shape that is none',
  ),
  'OrderedDicts of a long list': (
    b'](' + b'))\x86' * 1_000 + b'eq\x00' + ORDERED + b'q\x01'
    + (b'h\x01h\x00\x85R0' * 500),
    'more than .* steps',
  ),
  'many steps': (b'N0' * 30_000 + b'}', 'more than .* steps'),
  'deep': (b'](' * 9_000 + b'e' * 9_000, 'no dict of tensors'),
}  # fmt: skip
HARMLESS = {
  'doubled tuple as a key': b'}' + TUPLE + b'Ns',
  'doubled tuples in a set': b'}' + text('s') + b'\x8f(' + TUPLE + b'\x90s',
  'keys of one hash': b'}(' + COLLIDING + b'u',
  'options of a doubled tuple': (
    b'}' + text('args') + b'cargparse\nNamespace\n)\x81' + TUPLE + b'bs'
  ),
}


@pytest.mark.parametrize('name', PICKLES)
def test_pickles_that_take_for_ever(tmp_path, monkeypatch, name):
  monkeypatch.setattr(
    torch_pickle, 'MAX_STEPS', 40_000
  )  # the real one is larger
  body, message = PICKLES[name]
  file = tmp_path / 'model.pth'
  pth.write(file, b'\x80\x02' + body + b'.', [X])
  said = refused(lambda: weights.load_published(file), message)
  assert said.startswith(f'{file}: ')


@pytest.mark.parametrize('name', HARMLESS)
def test_pickles_with_strange_parts_are_read(tmp_path, name):
  """Beside the tensors, such things are nobody's business."""
  file = tmp_path / 'model.pth'
  tensor = REBUILD + b'(' + STORAGE + b'K\x00K\x0c\x85K\x01\x85\x89}tR'
  body = HARMLESS[name] + text('x') + tensor + b's'
  pth.write(file, b'\x80\x04' + body + b'.', [X])
  found = torch_pickle.load(file)
  np.testing.assert_array_equal(np.asarray(found['x']), X.ravel())


def test_tensors_that_share_their_numbers(tmp_path):
  """A few do; so many that memory would run out are refused."""
  file, x = tmp_path / 'model.pth', np.zeros(1000, np.float32)
  shared = pth.FakeTensor(x)
  pth.save(file, {'a': shared, 'b': shared})
  assert np.asarray(torch_pickle.load(file)['b']).shape == (1000,)
  windows = {
    f'{i}': pth.FakeTensor(x, offset=i, shape=(900,), strides=(1,))
    for i in range(60)
  }
  pth.save(file, windows)
  assert len(torch_pickle.load(file)) == 60  # one storage each
  storages = [np.zeros(1000, np.float32)]
  items = b''.join(
    text(f'{i}') + REBUILD + b'(' + STORAGE.replace(b'K\x0c', b'M\xe8\x03')
    + b'K' + bytes([i]) + b'M\x84\x03\x85K\x01\x85\x89}tR'
    for i in range(60)
  )  # fmt: skip
  pth.write(file, b'\x80\x02}(' + items + b'u.', storages)
  refused(
    lambda: torch_pickle.load(file), 'tensors of 216000 bytes in a file of'
  )


def test_one_large_storage_is_not_read_for_every_tensor(tmp_path, monkeypatch):
  """Flat storages are mapped; each is held against its checksum once."""
  file, flat = tmp_path / 'model.pth', np.arange(1000, dtype=np.float32)
  items = b''.join(
    text(f'{i}') + REBUILD + b'(' + STORAGE.replace(b'K\x0c', b'M\xe8\x03')
    + b'K' + bytes([i]) + b'K\x02\x85K\x01\x85\x89}tR'
    for i in range(100)
  )  # fmt: skip
  pth.write(file, b'\x80\x02}(' + items + b'u.', [flat])
  counted = []
  crc32 = archives.zlib.crc32
  monkeypatch.setattr(
    archives.zlib, 'crc32', lambda x: counted.append(len(x)) or crc32(x)
  )
  found = torch_pickle.load(file)
  for i in range(100):
    np.testing.assert_array_equal(np.asarray(found[f'{i}']), [i, i + 1])
  assert counted.count(4000) == 1
  data = bytearray(file.read_bytes())
  data[data.find(flat.tobytes()) + 13] ^= 1
  file.write_bytes(bytes(data))
  again = torch_pickle.load(file)
  with pytest.raises(tensors_lib.WeightsError, match='its checksum differs'):
    np.asarray(again['0'])


def encoder_file(folder, **more):
  """A small encoder of ours, and the config to spoil."""
  module = vit.make(
    {'width': 24, 'depth': 1, 'num_heads': 2}, patch=(2, 4, 4), mlp_width=32
  )
  shapes = jax.eval_shape(
    module.init, jax.random.key(0), np.zeros((1, 2, 4, 4, 3), np.uint8)
  )['params']
  params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
  weights.export(module, params, folder, layout='vssl_vit')
  config = json.loads((folder / 'config.json').read_text())
  config['vit'] |= more.pop('vit', {})
  (folder / 'config.json').write_text(json.dumps(config | more))
  return str(folder)


@pytest.mark.parametrize(
  ('vit_fields', 'message'),
  [
    ({'depth': 10**9}, 'depth is 1000000000, wanted a size'),
    ({'depth': 60_000}, 'depth is 60000 by config.json and 1 by the tensors'),
    ({'width': 60_000}, 'width is 60000 by config.json and 24 by the tensors'),
    ({'patch': [2, 4, 50_000]}, r'patch is 1200000 by config'),
    ({'depth': 'many'}, "depth is 'many' by config|describes no network"),
    ({'mlp_width': -5}, 'mlp_width is -5, wanted a size'),
    ({'dpeth': 3}, "describes no network: Vit has no field 'dpeth'"),
    ({'mean': [[[]]]}, 'mean is a list, wanted a size'),
  ],
)
def test_configs_of_ours_that_lie(tmp_path, vit_fields, message):
  source = encoder_file(tmp_path, vit=vit_fields)
  refused(lambda: vssl_jax.load(source), message)


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    ('[' * 100_000 + ']' * 100_000, 'not valid JSON|no JSON object'),
    ('{"a": ' + '[' * 500 + ']' * 500 + '}', 'nested more than 16 deep'),
    ('{"a": ' * 50_000 + '1' + '}' * 50_000, 'not valid JSON|nested more'),
    ('{"a": NaN}', 'NaN is no number'),
    ('{"layer_norm_eps": 1e999}', r'layer_norm_eps is inf'),
    ('{"a": ' + '1' * 100_000 + '}', 'not valid JSON'),
    ('{"a": "' + 'x' * 9 * 2**20 + '"}', 'bytes, wanted at most'),
    (
      '{"num_attention_heads": 1000000000}',
      'num_attention_heads is 1000000000',
    ),
    ('{"image_size": "abc"}', "image_size is 'abc', wanted a number from"),
    ('{"image_mean": 5}', 'image_mean is 5, wanted a list of numbers'),
    ('{"q_pool": 100000}', 'q_pool is 100000, wanted a number from 0 to 8'),
    ('{"video": [1, 2]}', r'video is \[1, 2\], wanted frames, height'),
  ],
  ids=range(12),
)
def test_configs_that_are_no_configs(tmp_path, config, message):
  encoder_file(tmp_path)
  (tmp_path / 'config.json').write_text(config)
  refused(lambda: vssl_jax.load(str(tmp_path)), message)


@pytest.mark.parametrize(
  ('tensors', 'message'),
  [
    ({'encoder.layer.999999999.norm1.weight': X}, "a block '999999999'"),
    ({f'encoder.layer.{"9" * 5000}.norm1.weight': X}, "a block '9999"),
    # An encoder of 512 blocks takes half a minute to build.
    ({'encoder.layer.511.norm1.weight': X}, r'layer\.511 and none .*layer\.1,'),
    (
      {'predictor.embeddings.mask_tokens': np.zeros((10**9, 0), np.float32)},
      r'mask_tokens. is empty, of shape \(1000000000, 0\)',
    ),
  ],
)
def test_names_and_shapes_that_cost_nothing(tmp_path, tensors, message):
  file = tmp_path / 'model.safetensors'
  marks = {'encoder.embeddings.patch_embeddings.proj.weight': X}
  fc1 = {'encoder.layer.0.mlp.fc1.weight': X}
  tensors_lib.write_safetensors(file, marks | fc1 | tensors)
  said = refused(lambda: weights.load_published(file, num_heads=2), message)
  assert said.startswith(f'{file}: ')


def test_many_names_beside_a_decoder_of_many_blocks(tmp_path):
  """Each of the names was held against a pattern for each of the rows."""
  published.published_files(tmp_path)
  file = tmp_path / 'model.safetensors'
  small = np.zeros(1, np.int8)
  tensors = dict(tensors_lib.safetensors(file))
  tensors |= {f'decoder.decoder_layers.{i}.x': small for i in range(300)}
  tensors |= {f'x{i}': small for i in range(2000)}
  tensors_lib.write_safetensors(file, tensors)
  refused(lambda: weights.load_published(tmp_path), 'no use for 2300 names')


def test_messages_on_headers_are_short(tmp_path):
  file = tmp_path / 'x.safetensors'
  deep = '[' * 900 + ']' * 900
  for entry in (deep, f'{{"dtype": {deep}}}', '{"dtype": "F32", "shape": '
                f'[{"9" * 4000}], "data_offsets": [0, 4]}}'):  # fmt: skip
    header = f'{{"{"k" * 10**6}": {entry}}}'.encode()
    file.write_bytes(struct.pack('<Q', len(header)) + header + bytes(4))
    refused(lambda: tensors_lib.safetensors(file), 'invalid JSON in header')


def test_archives_with_endless_lists_of_entries(tmp_path):
  size = archives.MAX_DIRECTORY + 46
  end = struct.pack('<4s4H2LH', b'PK\x05\x06', 0, 0, 1, 1, size, 0, 0)
  for file, load in ((tmp_path / 'x.npz', npz.load),
                     (tmp_path / 'x.pth', torch_pickle.load)):  # fmt: skip
    file.write_bytes(bytes(size) + end)
    refused(lambda file=file, load=load: load(file), 'a list of entries of')
  # The same in the records of large archives, as torch writes them.
  large = struct.pack(
    '<4sQ2H2L4Q', b'PK\x06\x06', 44, 45, 45, 0, 0, 1, 1, size, 0
  )
  locator = struct.pack('<4sLQL', b'PK\x06\x07', 0, size, 1)
  end = struct.pack(
    '<4s4H2LH', b'PK\x05\x06', 0, 0, 1, 1, 2**32 - 1, 2**32 - 1, 0
  )
  file.write_bytes(bytes(size) + large + locator + end)
  refused(lambda: torch_pickle.load(file), 'a list of entries of')


def test_npz_with_axes_without_end(tmp_path):
  file = tmp_path / 'x.npz'
  header = "{'descr': '<f4', 'fortran_order': False, 'shape': (" + '1, ' * 900
  header = (header + ')}\n').encode()
  data = b'\x93NUMPY\x01\x00' + struct.pack('<H', len(header)) + header
  with zipfile.ZipFile(file, 'w') as archive:
    archive.writestr('a.npy', data + bytes(4))
  refused(lambda: npz.load(file), 'wanted natural numbers, and at most 32 axes')


def test_large_archives_of_torch_are_still_read(tmp_path):
  """Its writer puts the records of large archives behind every file."""
  file = tmp_path / 'model.pth'
  pth.save(file, {'a': pth.FakeTensor(X)})
  data = file.read_bytes()
  end = data.rfind(b'PK\x05\x06')
  count, size, start = struct.unpack('<H2L', data[end + 10 : end + 20])
  large = struct.pack(
    '<4sQ2H2L4Q', b'PK\x06\x06', 44, 45, 45, 0, 0, count, count, size, start
  )
  locator = struct.pack('<4sLQL', b'PK\x06\x07', 0, end, 1)
  file.write_bytes(data[:end] + large + locator + data[end:])
  np.testing.assert_array_equal(np.asarray(torch_pickle.load(file)['a']), X)


def test_the_hostile_pickles_of_these_tests_are_pickles():
  """Python's own reader takes them, where it has the time."""
  assert pickle.loads(b'\x80\x02' + doubled(1) + b'.') == ((), ())
  keys = pickle.loads(b'\x80\x02}(' + COLLIDING[: 13 * 4] + b'u.')
  assert len({hash(k) for k in keys}) == 1 and len(keys) == 4
