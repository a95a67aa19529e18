"""A recorded step is taken again, and every planted difference is found."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from tests.train import small_runs, toy
from vssl_jax import main, sharding, trees
from vssl_jax.checkpoint import integrity, manager
from vssl_jax.data.tools import synthetic
from vssl_jax.methods import phase as phase_lib
from vssl_jax.train import loop, replay, rewind, step_records
from vssl_jax.train import run as run_lib


def _phases():
  average = {'mean': phase_lib.Ema('encoder', (0.9, 1.0))}
  source = phase_lib.FromPhase('one')
  teacher = {'one': phase_lib.Teacher(toy.Mean(), source)}
  two = dict(frozen=('encoder/layer_0',), ema=average, teachers=teacher)
  seen = {'seen': phase_lib.MemorySpec((), window=3)}
  kept = dict(steps=6, memory_specs=seen)
  return phase_lib.check(
    (toy.phase(**kept), toy.phase(name='two', **kept, **two))
  )


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
  folder = tmp_path_factory.mktemp('videos')
  synthetic.write(folder, clips=24, size=32, frames=8)
  return folder / 'train'


def _config(videos, workdir):
  """Every second state is kept and every second step recorded."""
  config = small_runs.tiny_config(videos, workdir)
  config.checkpoint.update(dict(every=2, record_every=2, keep=100))
  config.optim.warmup = 0
  return config


@pytest.fixture(scope='module')
def recorded(videos, tmp_path_factory):
  """A run of two phases."""
  config = _config(videos, tmp_path_factory.mktemp('recorded') / 'run')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(run_lib.methods, 'build', lambda *_: _phases())
    assert loop.train(config) == 0
    yield config


@pytest.fixture
def run(recorded, tmp_path):
  """A copy of it to do things to."""
  config = recorded.copy_and_resolve_references()
  config.workdir = str(tmp_path / 'run')
  shutil.copytree(recorded.workdir, config.workdir)
  return config


def _path(config, *names):
  return pathlib.Path(config.workdir, *names)


def _files(config):
  root = _path(config)
  files = (p for p in root.rglob('*') if p.is_file())
  return {str(p.relative_to(root)): p.read_bytes() for p in files}


def test_what_is_recorded(recorded):
  """Not the first step of a phase: no state of that phase is kept then."""
  records = step_records.listing(_path(recorded))
  assert [(r['step'], r['phase']) for r in records] == [
    (3, 'one'),
    (5, 'one'),
    (9, 'two'),
    (11, 'two'),
  ]
  for record in records:
    assert len(record['index']) == recorded.batch_size
    assert 'video' in record['batch']
    assert record['before'].keys() == record['after'].keys()
    saved = _path(recorded, 'checkpoints', f'{record["step"] - 1:08d}.json')
    leaves = json.loads(saved.read_text())['leaves']
    assert record['before'] == {k: x['sum'] for k, x in leaves.items()}
    assert record['after'] != record['before']


@pytest.mark.parametrize(
  ('step', 'gone', 'origin'),
  [(0, (), 10), (3, (), 2), (11, (10,), 8)],
)
def test_the_same_bits_come_again_and_nothing_is_written(
  run, capsys, step, gone, origin
):
  for n in gone:
    shutil.rmtree(_path(run, 'checkpoints', f'{n:08d}'))
    _path(run, 'checkpoints', f'{n:08d}.json').unlink()
  # Another process may be saving.
  _path(run, 'checkpoints', '00000099').mkdir()
  _path(run, 'checkpoints', '00000099', 'part').write_text('half')
  before = _files(run)
  run.optim.lr = 0.5  # of no account: run.json has what the run was made with
  assert replay.replay(run, step) == 0
  said = capsys.readouterr().out
  assert f'step {step or 11} of phase' in said
  assert f'from checkpoint {origin:08d}:' in said
  assert said.count('arrays equal') == 3
  assert said.endswith('equal\n')
  assert _files(run) == before


def test_a_flipped_bit_of_a_record_is_found(run, capsys):
  path = _path(run, 'step_records', '00000003.json')
  record = integrity.load(path)
  record['after']['opt/inner_states/train/inner_state/0/count'] = [0, 1]
  name = next(n for n in record['after'] if n.endswith('layer_1/kernel'))
  record['after'][name][1] ^= 1 << 7
  record['machine']['jaxlib'] = '0.0.1'
  integrity.write_atomic(path, record)
  assert replay.replay(run, 3) == 1
  said = capsys.readouterr().out
  assert said.count('arrays equal') == 2
  assert f'{name}' in said
  assert 'DIFFERS: the same input gave another result' in said
  assert 'jaxlib was 0.0.1 and is' in said


def test_a_flipped_bit_of_a_parameter_is_found(run, capsys):
  """In a state that was saved whole, hashes and all."""
  saver = manager.Checkpoints(run.workdir, keep=100)
  saved = next(s for s in saver.whole() if s.step == 4)
  mesh = sharding.make_mesh(1, -1)
  at = sharding.replicated(mesh)
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
    saved.shapes(),
  )
  leaves = dict(trees.named_leaves(manager.restore(saved, target)))
  name = 'params/encoder/layer_0/kernel'
  value = np.array(leaves[name])
  value.view(np.uint32).flat[5] ^= 1 << 20
  leaves[name] = jax.device_put(value, at)
  extra = {'left_out': saved.manifest['left_out']}
  saver.save(trees.nest(leaves), 4, saved.phase, extra)
  saver.finish()
  assert replay.replay(run, 5) == 1
  said = capsys.readouterr().out
  assert f'  before: 1 of {len(leaves)} arrays differ: {name}\n' in said
  assert said.count('arrays equal') == 1  # the batch
  assert 'DIFFERS: the saved state is not the one' in said


def test_other_pixels_are_found(run, videos, capsys):
  kept = {path: path.read_bytes() for path in sorted(videos.rglob('*.mp4'))}
  changed = run.copy_and_resolve_references()
  changed.data.allow_change = True
  try:
    for path in kept:
      path.write_bytes(min(kept.values()))
    assert replay.replay(changed, 9) == 1
  finally:
    for path, data in kept.items():
      path.write_bytes(data)
  said = capsys.readouterr().out
  assert 'arrays differ: video\n' in said
  assert 'DIFFERS: other clips or other pixels' in said


def test_a_rewind_takes_the_records_along(run):
  """Later steps take other batches then."""
  assert loop.train(run, rewind.Rewind(10, 1)) == 0
  aside = _path(run, 'rewound', '1-from-00000012', 'step_records')
  assert [p.name for p in aside.iterdir()] == ['00000009.json', '00000011.json']
  assert [r['step'] for r in step_records.listing(_path(run))] == [3, 5, 9, 11]
  assert replay.replay(run, 9) == replay.replay(run, 11) == 0


def test_records_that_no_state_is_left_for_are_removed(recorded, tmp_path):
  config = recorded.copy_and_resolve_references()
  config.workdir = str(tmp_path / 'run')
  config.checkpoint.keep = 2
  assert loop.train(config) == 0
  kept = integrity.listing(config.workdir, ('checkpoints',))
  assert sorted(s.step for s in kept) == [10, 12]
  # The step after 10 was recorded while the state after 8 was there.
  assert [r['step'] for r in step_records.listing(_path(config))] == [9, 11]


@pytest.mark.parametrize(
  ('step', 'kept', 'message'),
  [
    (4, (2, 4), r'--replay=4: of the steps recorded .*\[3, 5, 9, 11\], these'),
    (3, (4, 8), r'from a stored state: \[5, 9, 11\]'),
    (9, (6,), r'from a stored state: \[\]'),
  ],
)
def test_what_cannot_be_taken_again_is_said(run, step, kept, message):
  for saved in integrity.listing(run.workdir, ('checkpoints',)):
    if saved.step not in kept:
      integrity.path_of(saved.path).unlink()
  with pytest.raises(run_lib.TrainingError, match=message):
    replay.replay(run, step)


def test_no_run_and_damage_are_said(run, tmp_path):
  next(_path(run, 'checkpoints', '00000010').rglob('d/*')).unlink()
  with pytest.raises(run_lib.TrainingError, match='00000010 is damaged'):
    replay.replay(run)
  run.workdir = str(tmp_path / 'nowhere')
  with pytest.raises(run_lib.TrainingError, match='nowhere holds no run'):
    replay.replay(run)
  assert not _path(run).exists()


@pytest.mark.parametrize(
  ('flags', 'status', 'text'),
  [
    (['--replay=3'], 0, 'step 3 of phase one'),
    (['--replay=4'], 1, 'error: --replay=4'),
    (['--replay', '--rewind=5'], 2, 'wanted one of them'),
  ],
)
def test_the_flag_reaches_it(run, monkeypatch, capsys, flags, status, text):
  monkeypatch.setattr(main, 'resolve', lambda *_: run)
  assert main.main(flags) == status
  printed = capsys.readouterr()
  assert text in printed.out + printed.err


@pytest.mark.slow
def test_a_real_step_comes_again(videos, tmp_path, capsys):
  """SALT's, in both phases, from data to update."""
  config = _config(videos, tmp_path / 'run')
  assert loop.train(config) == 0
  for step in (5, 11):
    assert replay.replay(config, step) == 0
  assert capsys.readouterr().out.count('arrays equal') == 6
