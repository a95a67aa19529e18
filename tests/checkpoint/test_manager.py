import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssl_jax import sharding, trees
from vssl_jax.checkpoint import integrity, manager


def _tree(seed=0):
  rng = np.random.default_rng(seed)
  return {
    'params': {
      'encoder': {
        'kernel': jnp.asarray(rng.normal(size=(256, 128)), jnp.float32),
        'bias': jnp.asarray(rng.normal(size=(7,)), jnp.bfloat16),
      }
    },
    'opt': ({'count': jnp.int32(seed)}, {'mask': jnp.array([True, False])}),
    'step': jnp.int32(seed),
  }


def _target(tree, mesh=None):
  mesh = mesh or sharding.make_mesh(1, -1)
  at = sharding.shardings(tree, mesh)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, at
  )


def _same(a, b):
  for name, x in trees.named_leaves(a):
    y = dict(trees.named_leaves(b))[name]
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=name)


def _mesh(data, fsdp):
  return jax.make_mesh(
    (data, fsdp),
    ('data', 'fsdp'),
    devices=jax.devices()[: data * fsdp],
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
  )


def test_round_trip_keeps_bits_names_and_node_types(tmp_path):
  saver = manager.Checkpoints(tmp_path)
  saver.save(_tree(3), 3, 'one', extra={'note': 'x'})
  saver.finish()
  saved = saver.newest()
  assert (saved.step, saved.phase) == (3, 'one')
  assert saved.manifest['note'] == 'x'
  back = manager.restore(saved, _target(_tree()))
  _same(_tree(3), back)
  assert isinstance(back['opt'], tuple)
  part = manager.restore(
    saved, _target(_tree()['params']['encoder']), 'params/encoder'
  )
  _same(_tree(3)['params']['encoder'], part)


@pytest.mark.parametrize('shape', [(1, 1), (2, 2), (4, 1), (1, 2)])
def test_another_mesh_restores_the_same_values(tmp_path, shape):
  tree = jax.device_put(_tree(1), sharding.shardings(_tree(), _mesh(1, 4)))
  saver = manager.Checkpoints(tmp_path)
  saver.save(tree, 1, 'one')
  saver.finish()
  back = manager.restore(saver.newest(), _target(tree, _mesh(*shape)))
  _same(tree, back)
  spec = back['params']['encoder']['kernel'].sharding.spec
  assert ('fsdp' in spec) == (shape[1] > 1)


def test_the_state_may_be_donated_while_it_is_written(tmp_path):
  advance = jax.jit(
    lambda t: jax.tree.map(lambda x: x + x.dtype.type(1), t), donate_argnums=0
  )
  saver = manager.Checkpoints(tmp_path)
  for i in range(5):
    state = {'w': jnp.full((512, 512), i, jnp.float32)}
    saver.save(state, i, 'one')
    for _ in range(20):
      state = advance(state)
    saver.finish()
    back = manager.restore(saver.newest(), _target(state))
    np.testing.assert_array_equal(back['w'], i)


def test_old_states_are_removed_and_phase_parameters_kept(tmp_path):
  saver = manager.Checkpoints(tmp_path, keep=2)
  saver.save_params({'params': _tree()['params']}, 1, 'first')
  for i in range(1, 5):
    saver.save(_tree(i), i, 'one')
  saver.finish()
  left = sorted(p.name for p in (tmp_path / 'checkpoints').iterdir())
  assert left == ['00000003', '00000003.json', '00000004', '00000004.json']
  assert saver.params_of('first').step == 1
  assert saver.params_of('second') is None


def test_some_states_are_kept_for_good_and_can_be_asked_for(tmp_path):
  saver = manager.Checkpoints(tmp_path, keep=1, keep_every=3)
  for i in range(1, 9):
    saver.save(_tree(i), i, 'one')
  saver.finish()
  assert [s.step for s in saver.whole()] == [8, 6, 3]
  limits = {None: 8, 8: 8, 7: 6, 3: 3}
  assert {x: saver.newest(x).step for x in limits} == limits
  assert saver.newest(2) is None
  _files(tmp_path / 'checkpoints' / '00000006')[0].unlink()
  assert saver.newest(7).step == 3


def test_what_was_saved_later_is_moved_whole(tmp_path):
  saver = manager.Checkpoints(tmp_path, keep=9)
  for i in range(1, 5):
    saver.save(_tree(i), i, 'one')
  for phase, i in (('first', 2), ('second', 4)):
    saver.save_params({'params': _tree(i)['params']}, i, phase)
  place = tmp_path / 'aside' / 'here'
  assert saver.move_later(2, place) == [
    'checkpoints/00000004',
    'checkpoints/00000003',
    'params/second',
  ]
  assert [s.step for s in saver.whole()] == [2, 1]
  assert saver.params_of('first') and not saver.params_of('second')
  moved = integrity.listing(place)
  assert sorted(s.step for s in moved) == [3, 4, 4]
  assert not any(integrity.damage(s) for s in moved)
  assert manager.Checkpoints(tmp_path).newest().step == 2


def test_leftovers_are_removed_at_start(tmp_path):
  saver = manager.Checkpoints(tmp_path)
  saver.save(_tree(), 1, 'one')
  saver.finish()
  folder = tmp_path / 'checkpoints'
  (folder / '00000002' / 'ocdbt.process_0' / 'd').mkdir(parents=True)
  (folder / '00000002' / 'ocdbt.process_0' / 'd' / 'x').write_text('half')
  (folder / '00000002' / '_METADATA').write_text('{')
  (folder / '00000003.orbax-checkpoint-tmp').mkdir()
  lock = 'manifest.ocdbt.__lock'  # of a file that was being written
  (folder / '00000003.orbax-checkpoint-tmp' / lock).write_text('')
  (folder / '00000001.partial').write_text('{')
  assert manager.Checkpoints(tmp_path).newest().step == 1
  left = sorted(p.name for p in folder.iterdir())
  assert left == ['00000001', '00000001.json']


def _files(path):
  return [p for p in path.rglob('*') if p.is_file()]


def _flip(path, rng):
  data = bytearray(path.read_bytes())
  data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  path.write_bytes(data)


DAMAGE = {
  'flip': _flip,
  'truncate': lambda p, rng: p.write_bytes(p.read_bytes()[:-1]),
  'remove': lambda p, rng: p.unlink(),
  'empty': lambda p, rng: p.write_bytes(b''),
  'add': lambda p, rng: (p.parent / 'extra').write_bytes(b'1'),
}


@pytest.mark.parametrize('kind', DAMAGE)
def test_rot_is_found_in_every_file(tmp_path, kind):
  """Each file in turn; the good step before is taken each time."""
  rng = random.Random(0)
  saver = manager.Checkpoints(tmp_path, keep=2)
  saver.save(_tree(1), 1, 'one')
  saver.finish()
  count = 1
  while count:
    saver.save(_tree(2), 2, 'one')
    saver.finish()
    files = sorted(_files(tmp_path / 'checkpoints' / '00000002'))
    count = count + 1 if count < len(files) else 0
    DAMAGE[kind](files[count - 1], rng)
    assert saver.newest().step == 1, files[count - 1]
    assert (tmp_path / 'checkpoints' / '00000002.corrupt').exists()


def test_swapped_files_are_found(tmp_path):
  saver = manager.Checkpoints(tmp_path, keep=2)
  for i in (1, 2):
    saver.save(_tree(i), i, 'one')
  saver.finish()
  files = sorted(
    _files(tmp_path / 'checkpoints' / '00000002'), key=os.path.getsize
  )
  a, b = files[-1].read_bytes(), files[-2].read_bytes()
  files[-1].write_bytes(b)
  files[-2].write_bytes(a)
  assert saver.newest().step == 1


def test_a_damaged_manifest_is_found(tmp_path):
  saver = manager.Checkpoints(tmp_path, keep=2)
  for i in (1, 2):
    saver.save(_tree(i), i, 'one')
  saver.finish()
  (tmp_path / 'checkpoints' / '00000002.json').write_text('{"step": 2')
  assert saver.newest().step == 1


def test_every_flip_in_a_manifest_is_found_or_harmless(tmp_path):
  saver = manager.Checkpoints(tmp_path, keep=2)
  for i in (1, 2):
    saver.save(_tree(i), i, 'one', extra={'left_out': [(1, 2)]})
  saver.finish()
  path = tmp_path / 'checkpoints' / '00000002.json'
  written, whole = path.read_bytes(), integrity.load(path)
  own, rng = json.loads(written)['sum'], random.Random(0)
  harmless = found = 0
  for place in range(len(written)):
    data = bytearray(written)
    data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    try:
      loaded = integrity.load(path)
      # Without its name, the sum is a key that nobody reads.
      assert {k: v for k, v in loaded.items() if v != own} == whole
      harmless += 1
    except integrity.CorruptError:
      found += 1
  assert found > 500 and harmless < 30
  for data in (b'', written[:-1], b'\0' * len(written), b'[' * 100_000):
    path.write_bytes(data)
    with pytest.raises(integrity.CorruptError, match=r'00000002\.json is corr'):
      integrity.load(path)


def test_a_manifest_that_is_corrupt_or_of_another_step_is_set_aside(tmp_path):
  rng, folder = random.Random(0), tmp_path / 'checkpoints'
  saver = manager.Checkpoints(tmp_path, keep=2)
  saver.save(_tree(1), 1, 'one')
  saver.finish()
  for kind in ('flip', 'leaf', 'empty', 'copy', 'no leaves'):
    saver.save(_tree(2), 2, 'one')
    saver.finish()
    path = folder / '00000002.json'
    text = path.read_text()
    if kind == 'flip':
      place = rng.randrange(text.index('"leaves"'), len(text) - 40)
      data = bytearray(text.encode())
      data[place] ^= 2
      path.write_bytes(data)
    elif kind == 'leaf':
      path.write_text(text.replace('"dtype"', '"dtypd"', 1))
    elif kind == 'empty':
      path.write_text('')
    elif kind == 'copy':
      shutil.copy(folder / '00000001.json', path)
      shutil.rmtree(folder / '00000002')
      shutil.copytree(folder / '00000001', folder / '00000002')
    else:
      integrity.write_atomic(path, {'step': 2, 'phase': 'one'})
    assert saver.newest().step == 1, kind
    assert (folder / '00000002.json.corrupt').exists()


def test_what_others_put_into_the_folders_harms_nothing_and_stays(tmp_path):
  saver = manager.Checkpoints(tmp_path)
  for i in (1, 2):
    saver.save(_tree(i), i, 'one')
  saver.save_params({'params': _tree()['params']}, 2, 'first')
  foreign = [
    'checkpoints/notes.json',
    'checkpoints/x.partial/file',
    'checkpoints/backup/file',
    'checkpoints/00000002.old/file',
    'checkpoints/.nfs0000000000000001',
    'checkpoints/00000002/.nfs0000000000000002',
    'checkpoints/00000002/.DS_Store',
    'checkpoints/y.partial',
    'checkpoints/20261129/file',  # a date
    'checkpoints/²²²²²²²².json',  # digits, and no number
    'checkpoints/٣.json',
    'checkpoints/3.json',
    'params/notes.json',
    'params/mine/file',
    'params/list.json',
  ]
  for name in foreign:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('[]' if 'list' in name else '{"step": 1}')
  saver = manager.Checkpoints(tmp_path)
  assert saver.newest().step == 2
  assert saver.params_of('first').step == 2
  assert [s.step for s in integrity.listing(tmp_path)] == [1, 2, 2]
  assert all((tmp_path / name).exists() for name in foreign)
  saver.save(_tree(3), 3, 'one')
  saver.finish()
  assert saver.newest().step == 3


def test_what_was_set_aside_before_stays(tmp_path):
  saver, folder = manager.Checkpoints(tmp_path), tmp_path / 'checkpoints'
  (folder / '00000002.json.corrupt').mkdir()
  for i in (1, 2):
    saver.save(_tree(i), i, 'one')
    saver.finish()
  for _ in range(2):
    (folder / '00000002.json').write_text('')
    assert saver.newest().step == 1
    saver.save(_tree(3), 2, 'one')
    saver.finish()
  assert saver.newest().step == 2
  for name in ('corrupt1', 'corrupt2'):
    assert (folder / f'00000002.{name}').is_dir()
    assert (folder / f'00000002.json.{name}').exists()


def test_the_newest_is_the_one_of_most_steps(tmp_path):
  saver = manager.Checkpoints(tmp_path, keep=1)
  for step in (10**8 - 1, 10**8):  # names of 8 and of 9 digits
    saver.save(_tree(), step, 'one')
    saver.finish()
  assert [s.step for s in saver.whole()] == [10**8]


def test_a_manifest_that_leads_nowhere_costs_no_checkpoint(tmp_path):
  saver = manager.Checkpoints(tmp_path)
  saver.save(_tree(), 1, 'one')
  saver.finish()
  manifest = tmp_path / 'checkpoints' / '00000001.json'
  away = manifest.rename(tmp_path / 'away')  # to a disk that is not mounted
  manifest.symlink_to(tmp_path / 'mount')
  saver = manager.Checkpoints(tmp_path)
  assert (tmp_path / 'checkpoints' / '00000001').is_dir()
  away.rename(tmp_path / 'mount')
  assert saver.newest().step == 1


def test_only_damaged_checkpoints_are_an_error(tmp_path):
  saver = manager.Checkpoints(tmp_path)
  saver.save(_tree(1), 1, 'one')
  saver.finish()
  _files(tmp_path / 'checkpoints' / '00000001')[0].unlink()
  with pytest.raises(manager.CheckpointError, match='every checkpoint'):
    saver.newest()


def test_values_that_rot_past_the_file_hashes_are_found(tmp_path):
  """The per-leaf sum, when the files' own hashes agree."""
  saver = manager.Checkpoints(tmp_path)
  saver.save(_tree(1), 1, 'one')
  saver.finish()
  path = tmp_path / 'checkpoints' / '00000001.json'
  manifest = integrity.load(path)
  manifest['leaves']['params/encoder/kernel']['sum'][0] ^= 1
  integrity.write_atomic(path, manifest)
  with pytest.raises(
    manager.CorruptCheckpointError, match='params/encoder/kernel'
  ):
    manager.restore(saver.newest(), _target(_tree()))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int32', 'uint8'])
def test_bit_sum_changes_with_every_bit_and_place(dtype):
  rng = np.random.default_rng(0)
  x = np.asarray(jnp.asarray(rng.integers(0, 100, (5, 7)), dtype))
  base = np.asarray(integrity.bit_sum(jnp.asarray(x)))
  for _ in range(50):
    raw = bytearray(x.tobytes())
    raw[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
    y = np.frombuffer(bytes(raw), x.dtype).reshape(x.shape)
    assert (np.asarray(integrity.bit_sum(jnp.asarray(y))) != base).all()
  swapped = x.copy()
  swapped[0, 0], swapped[4, 6] = x[4, 6], x[0, 0] + x.dtype.type(1)
  assert (np.asarray(integrity.bit_sum(jnp.asarray(swapped))) != base).any()


def test_bit_sum_against_numpy():
  x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
  bits = x.view(np.uint32).ravel().astype(np.uint64)
  place = np.arange(12, dtype=np.uint64)
  want = int(np.sum(bits * (2 * place + 1)) % 2**32)
  assert int(integrity.bit_sum(jnp.asarray(x))[0]) == want


def _reads_back(folder):
  for value in (1, 2):
    saver = manager.Checkpoints(folder, keep=1)
    tree = {'w': jnp.full(3, value)}
    saver.save(tree, value, 'one')
    saver.save_params(tree, value, 'one')
    saver.finish()
    for saved in (saver.newest(), saver.params_of('one')):
      assert not integrity.damage(saved)
      back = manager.restore(saved, _target(tree))
      np.testing.assert_array_equal(back['w'], value)


def test_paths_with_odd_letters_read_back(tmp_path):
  # What is a pattern to a library would match the neighbour, too.
  for name in (
    'run1',
    'run*',
    'run[12]',
    'a\\b',
    'gs:/x',
    'ü\n\udcff',
    '@?#%41',
  ):
    _reads_back(tmp_path / name)
  long = tmp_path
  while len(str(long)) < 3600:
    long /= 'l' * 200
  _reads_back(long)


@pytest.mark.slow
def test_every_printable_letter_of_a_path_reads_back(tmp_path):
  for letter in map(chr, range(1, 127)):
    if letter != '/':
      _reads_back(tmp_path / f'a{letter}b')


def test_a_config_that_does_not_fit_names_the_keys(tmp_path):
  saver = manager.Checkpoints(tmp_path)
  saver.save(_tree(1), 1, 'one')
  saver.finish()
  other = _tree()
  other['params']['encoder']['scale'] = other['params']['encoder'].pop('bias')
  other['params']['encoder']['kernel'] = jnp.zeros((2, 2))
  with pytest.raises(manager.CheckpointError) as error:
    manager.restore(saver.newest(), _target(other))
  text = str(error.value)
  assert 'only in the file: params/encoder/bias bfloat16[7]' in text
  assert 'only wanted: params/encoder/scale' in text
  assert 'kernel: found float32[256, 128], wanted float32[2, 2]' in text


def test_a_save_that_fails_is_an_error(tmp_path):
  saver = manager.Checkpoints(tmp_path)
  (tmp_path / 'checkpoints').rmdir()
  (tmp_path / 'checkpoints').write_text('a file where the folder was')
  with pytest.raises(manager.CheckpointError, match='free disk space'):
    saver.save(_tree(1), 1, 'one')
    saver.finish()


def test_a_folder_that_was_removed_is_named_and_not_made_again(tmp_path):
  saver = manager.Checkpoints(tmp_path / 'run')
  saver.save(_tree(1), 1, 'one')
  saver.finish()
  (tmp_path / 'run').rename(tmp_path / 'moved')
  with pytest.raises(manager.CheckpointError, match='run/checkpoints was r'):
    saver.save(_tree(2), 2, 'one')
  assert not (tmp_path / 'run').exists()


SAVER = """
import sys, jax, jax.numpy as jnp
from vssl_jax.checkpoint import manager
saver = manager.Checkpoints(sys.argv[1], keep=1)
start = saver.newest()
step = start.step if start else 0
print('ready', step, flush=True)
while True:
  step += 1
  tree = {f'w{i}': jnp.full((64, 256), step, jnp.float32) for i in range(8)}
  saver.save(tree, step, 'one')
  saver.finish()
  print(step, flush=True)
"""


def _kills(tmp_path, count, seed):
  """Kills a process that saves without a pause, at random moments."""
  rng = random.Random(seed)
  env = dict(os.environ, PYTHONPATH=str(pathlib.Path(__file__).parents[2]))
  for _ in range(count):
    process = subprocess.Popen(
      [sys.executable, '-c', SAVER, str(tmp_path)],
      stdout=subprocess.PIPE,
      text=True,
      env=env,
    )
    assert process.stdout.readline().startswith('ready')
    finished = 0
    for _ in range(rng.randrange(1, 4)):
      finished = int(process.stdout.readline())
    time.sleep(rng.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    process.wait()
    rest = process.stdout.read().split()
    finished = int(rest[-1]) if rest else finished
    process.stdout.close()
    saver = manager.Checkpoints(tmp_path, keep=1)
    saved = saver.newest()
    assert saved.step >= finished
    left = {p.name for p in (tmp_path / 'checkpoints').iterdir()}
    assert all(name.removesuffix('.json') + '.json' in left for name in left), (
      left
    )
    tree = manager.restore(saved, _target(saved.shapes()))
    np.testing.assert_array_equal(tree['w7'], saved.step)


def test_a_kill_never_loses_the_last_finished_one(tmp_path):
  _kills(tmp_path, 3, seed=0)


@pytest.mark.slow
def test_thirty_kills_lose_nothing(tmp_path):
  _kills(tmp_path, 30, seed=1)
