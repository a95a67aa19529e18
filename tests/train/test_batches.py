"""Targets on disk: the same run without asking the teachers twice."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train import locks, small_runs, toy
from vssl_jax import encoder, methods, trees, weights
from vssl_jax.checkpoint import integrity
from vssl_jax.data import options
from vssl_jax.methods import phase as phase_lib
from vssl_jax.planning import report
from vssl_jax.target_cache import policy
from vssl_jax.target_cache import store as store_lib
from vssl_jax.train import batches as batches_lib
from vssl_jax.train import loop, phase_setup, replay
from vssl_jax.train import run as run_lib
from vssl_jax.train.run import TrainingError

ASKED = []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listens(toy.ToyPhase):
  """Pulls the head to what a frozen teacher says; counts how often it does."""

  def targets(self, teachers, video):
    if not self.teachers:
      return {}
    jax.debug.callback(ASKED.append, video[:, 0, 0, 0, 0])
    said = self.teachers['wise'](teachers['wise'], video)
    return {'wise': said, 'wise/first': said[:, 0, 0]}

  def loss(self, params, teachers, batch, rng):
    bare = toy.phase(encoder=self.encoder)
    value, aux = bare.loss(params, {}, batch, rng)
    found = batch.targets
    if found:
      x = self.encoder.apply({'params': params['encoder']}, batch.video)
      per_clip = jnp.square(x - 3 * found['wise']).mean(axis=(1, 2))
      value += jnp.mean(per_clip * (2 + found['wise/first']))
    return value, aux


def _plan(steps=7, source='@first'):
  wise = base_teacher(source)
  return (
    toy.phase(Listens, name='first', steps=5),
    toy.phase(Listens, name='second', steps=steps, teachers={'wise': wise}),
    toy.phase(Listens, name='third', steps=2, teachers={'wise': wise}),
  )


def base_teacher(source):
  source = phase_lib.parse_source(source)
  return phase_lib.Teacher(toy.Mean(), source, dtype='float32')


@pytest.fixture
def config(clips, tmp_path):
  return _config(clips, tmp_path / 'run', tmp_path / 'kept')


def _config(clips, workdir, kept):
  """Five steps are an epoch of 40 clips."""
  config = small_runs.tiny_config(clips, workdir)
  config.data.update(options.FIXED)
  config.checkpoint.update(dict(every=4, keep=100, record_every=0))
  config.optim.warmup = 0
  config.cache_targets = str(kept)
  return config


def _train(config, phases=None):
  ASKED.clear()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(run_lib.methods, 'build', lambda *_: phases or _plan())
    assert loop.train(config) == 0
  jax.effects_barrier()
  return locks.logged(config.workdir, 'loss')


@pytest.fixture(scope='module')
def told(clips, tmp_path_factory):
  """A run with the cache, its losses, and how often it asked."""
  folder = tmp_path_factory.mktemp('told')
  config = _config(clips, folder / 'run', folder / 'kept')
  losses = _train(config)
  return config, losses, len(ASKED)


def _again(told, tmp_path):
  """A copy of the run's folder and of what it kept."""
  config = told[0].copy_and_resolve_references()
  for name in ('run', 'kept'):
    shutil.copytree(pathlib.Path(config.workdir).parent / name, tmp_path / name)
  config.workdir = str(tmp_path / 'run')
  config.cache_targets = str(tmp_path / 'kept')
  return config


def _only(config):
  """The one folder of targets."""
  (found,) = pathlib.Path(config.cache_targets).iterdir()
  return found


def test_a_run_is_the_same_and_asks_once_a_clip(told, config):
  config.cache_targets = ''
  losses = _train(config)
  assert losses == told[1] and len(losses) == 14
  # One epoch of five steps; the second phase goes on with what is there.
  assert (len(ASKED), told[2]) == (9, 5)
  assert store_lib.count_filled(_only(told[0])) == 40


def test_nobody_is_loaded_where_everything_is_there(told, config, monkeypatch):
  """Another run with the same first phase has the same teacher."""
  asked = []
  load = loop.phase_start.teachers

  def watched(run, phase):
    asked.append(sorted(phase.teachers))
    return load(run, phase)

  monkeypatch.setattr(loop.phase_start, 'teachers', watched)
  config.cache_targets = told[0].cache_targets
  assert _train(config) == told[1]
  assert not ASKED and asked == [[]] * 3


@pytest.mark.parametrize('lost', [pytest.param(0, marks=pytest.mark.slow), 7])
def test_a_run_that_goes_on_reads_what_is_there(told, tmp_path, lost):
  """Also where rows were written, and a kill came before they counted."""
  config = _again(told, tmp_path)
  locks.truncate(config.workdir, 8)
  filled = _only(config) / store_lib.FILLED
  there = np.fromfile(filled, np.uint8)
  there[np.flatnonzero(there)[:lost]] = 0
  there.tofile(filled)
  (pathlib.Path(config.workdir) / 'metrics.jsonl').unlink()
  losses = _train(config)
  assert losses == {n: x for n, x in told[1].items() if n > 8}
  assert bool(ASKED) == bool(lost)
  assert np.fromfile(filled, np.uint8).all()


def test_rows_are_what_the_teacher_says_of_that_clip(told):
  """Against the module itself, for every number of an example."""
  config = told[0]
  run = run_lib.open_run(config, read_only=True)
  saved = run.checkpoints.params_of('first')
  params = trees.nest(locks.read(saved, 'params/encoder'))
  batch = next(run.clips.iterator(1))
  run.clips.close()
  want = toy.Mean().apply(
    {'params': params['params']['encoder']}, batch['video']
  )
  rows = np.fromfile(_only(config) / 'wise.bin', np.float32)
  got = rows.reshape(40, 1, 4)[batch['index']]
  np.testing.assert_allclose(got, want, atol=1e-5)
  first = np.fromfile(_only(config) / 'wise.first.bin', np.float32)
  np.testing.assert_array_equal(first[batch['index']], got[:, 0, 0])


def _path_of(tree, path, value):
  *parents, last = path.split('/')
  for name in parents:
    tree = tree[name]
  tree[last] = value


@pytest.mark.parametrize(
  ('path', 'value'),
  [
    ('videos', 'others'),
    ('clip/stride', 2),
    ('teachers/wise/weights', 'others'),
    ('teachers/wise/dtype', 'bfloat16'),
    ('program', 'another'),
    ('examples', 41),
    ('targets/wise/shape', [1, 8]),
  ],
)
def test_what_was_kept_of_something_else_is_refused(
  told, tmp_path, path, value
):
  folder = _only(_again(told, tmp_path))
  key = store_lib.read_key(folder)
  assert store_lib.Store(folder, key, read_only=True).count == 40
  other = json.loads(json.dumps(key))
  _path_of(other, path, value)
  with pytest.raises(ValueError, match=rf'(?s){path}: was .*remove that fold'):
    store_lib.Store(folder, other)
  key[store_lib.NOTES] = {'jax': 'another'}  # says who made it, no more
  assert store_lib.Store(folder, key, read_only=True).count == 40


def test_other_clips_teachers_and_programs_have_other_keys(told, tmp_path):
  """The key is made of what there is, not of what the config says."""
  changes = {
    'clip/stride': dict(data=dict(stride=2)),
    'teachers/wise/weights': dict(seed=1),
  }
  for path, change in changes.items():
    config = told[0].copy_and_resolve_references()
    config.workdir = str(tmp_path / path)
    config.update(change)
    with pytest.raises(ValueError, match=path):
      _train(config)


def test_the_cache_may_be_moved_and_neither_begun_nor_left(
  told, config, tmp_path
):
  """With it targets are rounded: half a run of each is none."""
  moved = _again(told, tmp_path)
  with pytest.raises(TrainingError, match=r"(?s)='/.*, found ''.* Wanted a f"):
    moved.cache_targets = ''
    _train(moved)
  moved.cache_targets = str(tmp_path / 'another')
  assert _train(moved) == told[1]  # it has ended; nothing is taken again
  assert not ASKED
  without = _again(told, tmp_path / 'without')
  record = pathlib.Path(without.workdir) / 'run.json'
  before = integrity.load(record)
  before['config']['cache_targets'] = ''
  integrity.write_atomic(record, before)
  with pytest.raises(TrainingError, match=r"cache_targets='', found '/"):
    _train(without)


def test_no_row_is_read_that_is_not_there(told, tmp_path, monkeypatch):
  """Of a batch half of which is there, that half; of a new one, none."""
  config = _again(told, tmp_path)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(run_lib.methods, 'build', lambda *_: _plan())
    run = run_lib.open_run(config, read_only=True)
  run.clips.close()
  batch = {
    'index': np.array([3, 40, 5, 7, *range(8, 12)], np.int32),
    'video': np.zeros((8, *run.video), np.uint8),
  }
  filled = _only(config) / store_lib.FILLED
  want = np.fromfile(_only(config) / 'wise.bin', np.float32).reshape(40, 1, 4)
  read, reader = [], store_lib.Store.read
  monkeypatch.setattr(
    store_lib.Store,
    'read',
    lambda store, index: read.append(index.tolist()) or reader(store, index),
  )
  for gone in ([5], range(40)):
    there = np.fromfile(filled, np.uint8)
    there[list(gone)] = 0
    there.tofile(filled)
    span = run_lib.spans(run.phases)[1]
    shapes = phase_setup.build(config, span, run.video, 40)
    with jax.set_mesh(run.mesh):
      source = batches_lib.Source(run, shapes, read_only=True)
      got = np.asarray(source.batch(batch, 5).targets['wise'])
    # Black clips are asked about, and those that are there are read.
    new = np.isin(batch['index'], [40, *gone])
    assert (got[new] == got[1]).all()
    np.testing.assert_array_equal(got[~new], want[batch['index'][~new]])
  assert read == [[3, 7, 8, 9, 10, 11], []]


@pytest.mark.slow
def test_rows_in_half_the_bytes_are_rounded_at_the_first_visit_too(config):
  """So that a step is the same whoever answers."""
  config.cache_targets = ''
  exact = _train(config)
  config.cache_targets = str(pathlib.Path(config.workdir).parent / 'kept')
  shutil.rmtree(config.workdir)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(policy, '_stored_type', lambda _: jnp.dtype('bfloat16'))
    once = _train(config)
    size = (_only(config) / 'wise.bin').stat().st_size
    assert size == 40 * 4 * 2
    shutil.rmtree(config.workdir)
    again = _train(config)
  assert once == again and once != exact
  np.testing.assert_allclose([*once.values()], [*exact.values()], rtol=2e-2)


def test_every_bit_of_a_teacher_counts(told, tmp_path):
  file = tmp_path / 'model' / 'model.safetensors'
  file.parent.mkdir()
  file.write_bytes(bytes(100))
  (file.parent / 'README').write_text('one')
  before = weights.fingerprint(file.parent)
  (file.parent / 'README').write_text('another')
  assert weights.fingerprint(file.parent) == before
  file.write_bytes(bytes(99) + b'1')
  assert encoder.fingerprint(str(file.parent)) != before
  file.unlink()
  with pytest.raises(weights.WeightsError, match='found no file of'):
    weights.fingerprint(file.parent)
  # A phase of a run, asked for by the run itself and by another one.
  run = run_lib.open_run(told[0], read_only=True)
  run.clips.close()
  saved = run.checkpoints.params_of('first')
  leaf = dict(next(iter(saved.manifest['leaves'].values())))
  own = integrity.fingerprint(saved, 'params/encoder')
  leaves = {**saved.manifest['leaves'], 'params/encoder_2/kernel': leaf}
  other = dataclasses.replace(saved, manifest={'leaves': leaves})
  assert integrity.fingerprint(other, 'params/encoder') == own
  leaf['sum'] = [1, 2]
  leaves['params/encoder/layer_0/kernel'] = leaf
  assert integrity.fingerprint(other, 'params/encoder') != own


def test_substitutes_are_asked_about_and_never_kept(config):
  """The number of a substitute is that of no example."""
  path = pathlib.Path(config.cache_targets)
  key = {
    'examples': 4,
    'targets': {'a': {'shape': [2], 'dtype': 'bfloat16'}},
  }
  store = store_lib.Store(path, key)
  index = np.array([3, 4, 1])
  rows = {'a': np.arange(6, dtype=jnp.bfloat16).reshape(3, 2)}
  store.write(index, rows)
  assert store.has(index).tolist() == [True, False, True]
  assert store_lib.count_filled(path) == 0  # not before a flush
  store.write(index, {'a': rows['a'] + 1})  # those that are there stay
  store.close()
  again = store_lib.Store(path, key, read_only=True)
  assert again.has(np.arange(5)).tolist() == [False, True, False, True, False]
  got = again.read(np.array([1, 3]))['a']
  np.testing.assert_array_equal(got, rows['a'][[2, 0]])
  again.write(np.array([0]), {'a': rows['a'][:1]})
  assert again.count == 2


def test_rows_that_are_not_those_written_are_computed_again(tmp_path, caplog):
  key = {
    'examples': 4,
    'targets': {
      'a': {'shape': [2], 'dtype': 'bfloat16'},
      'b': {'shape': [], 'dtype': 'int32'},
    },
  }
  rows = {
    'a': np.arange(8, dtype=jnp.bfloat16).reshape(4, 2),
    'b': np.arange(4, dtype=np.int32),
  }
  path, index = tmp_path / 'kept', np.arange(4)
  for name in ('a.bin', 'b.bin', store_lib.SUMS, store_lib.FILLED):
    store = store_lib.Store(path, key)
    store.write(index[:3], {n: x[:3] for n, x in rows.items()})
    store.close()
    size = (path / name).stat().st_size
    data = bytearray((path / name).read_bytes())
    data[size // 4 if name != store_lib.FILLED else 3] ^= 1
    (path / name).write_bytes(data)
    wrong = 3 if name == store_lib.FILLED else 1
    store = store_lib.Store(path, key)
    assert store.has(index).tolist() == [i < 3 and i != wrong for i in range(4)]
    assert f'the stored targets of example {wrong} are corrupt' in caplog.text
    store.write(index[:3], {n: x[:3] for n, x in rows.items()})
    store.close()
    store = store_lib.Store(path, key, read_only=True)
    assert store.has(index[:3]).all()
    np.testing.assert_array_equal(store.read(index[:3])['a'], rows['a'][:3])
    caplog.clear()
  manifest = path / store_lib.MANIFEST
  manifest.write_text(manifest.read_text().replace('"examples"', '"exampled"'))
  with pytest.raises(ValueError, match=r'manifest\.json is corrupt'):
    store_lib.Store(path, key, read_only=True)
  store = store_lib.Store(path, key)
  assert 'manifest.json is corrupt' in caplog.text and store.count == 0
  store.close()


def test_files_of_another_size_are_refused(tmp_path):
  key = {'examples': 4, 'targets': {'a': {'shape': [2], 'dtype': 'float32'}}}
  store_lib.Store(tmp_path / 'kept', key).close()
  (tmp_path / 'kept' / 'a.bin').write_bytes(b'half')
  with pytest.raises(ValueError, match=r'a\.bin has 4 bytes, wanted 32; rem'):
    store_lib.Store(tmp_path / 'kept', key)


def test_what_does_not_fit_on_the_disk_is_refused_before_it_begins(tmp_path):
  size = shutil.disk_usage(tmp_path).free // 4
  key = {'examples': 2, 'targets': {'a': {'shape': [size], 'dtype': 'float32'}}}
  with pytest.raises(ValueError, match=r'would grow to .* GiB left'):
    store_lib.Store(tmp_path / 'kept', key)
  assert not (tmp_path / 'kept' / store_lib.MANIFEST).exists()


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      dict(data=dict(crop='multi_scale', flip=True)),
      r"(?s)data\.crop: found 'multi_scale', wanted 'centre'\n.*data\.flip: "
      r"found True, wanted False\nset --config\.data\.crop='centre' --config",
    ),
    (dict(data=dict(sampling='window')), r"data\.sampling: found 'window', w"),
    (dict(data=dict(repeats=2)), r'data\.repeats: found 2, wanted 1'),
  ],
)
def test_clips_that_differ_are_refused_before_anything_is_trained(
  config, change, message
):
  config.update(change)
  with pytest.raises(ValueError, match=message):
    _train(config)
  assert not (pathlib.Path(config.workdir) / 'checkpoints').exists() or not (
    list((pathlib.Path(config.workdir) / 'checkpoints').iterdir())
  )


def test_several_processes_and_teachers_that_move_are_refused(config):
  with pytest.raises(ValueError, match='found 2 processes, wanted one'):
    policy.check(config, [], 2)
  moving = toy.phase(
    Listens,
    teachers={'wise': base_teacher('@ema/mean')},
    ema={'mean': phase_lib.Ema('encoder', (0.9, 1.0))},
  )
  with pytest.raises(ValueError, match=r'no phase .* \(an average changes\)'):
    _train(config, (moving,))


def test_the_plan_says_how_large_and_how_full(told, monkeypatch):
  config = told[0].copy_and_resolve_references()
  monkeypatch.setattr(methods, 'build', lambda *_: _plan())
  (line,) = [x for x in report.describe(config).splitlines() if 'wise' in x
             and x.startswith('targets')]  # fmt: skip
  assert 'of wise on disk: 0.0 GiB' in line
  assert '(wise 1x4, wise/first ; float32)' in line
  assert '40 clips (100 %)' in line and str(_only(config)) in line


@pytest.mark.slow
def test_a_recorded_step_is_taken_again_with_what_is_kept(
  told, tmp_path, monkeypatch, capsys
):
  config = _again(told, tmp_path)
  shutil.rmtree(config.workdir)
  config.checkpoint.record_every = 4
  _train(config)
  monkeypatch.setattr(methods, 'build', lambda *_: _plan())
  assert replay.replay(config) == 0
  assert 'equal' in capsys.readouterr().out
  # What was kept is gone: the teachers are asked, and nothing is kept anew.
  shutil.rmtree(config.cache_targets)
  assert replay.replay(config) == 0
  assert 'equal' in capsys.readouterr().out
  assert not pathlib.Path(config.cache_targets).exists()
  config.cache_targets = ''
  with pytest.raises(TrainingError, match=r"cache_targets='/.*, found ''"):
    replay.replay(config)
