import json
import shutil

import jax
import numpy as np
import pytest

import vssl_jax
from tests.train import small_runs
from vssl_jax import config as config_lib
from vssl_jax import encoder as encoder_lib
from vssl_jax import main, methods, trees, weights
from vssl_jax.checkpoint import integrity, manager
from vssl_jax.data.tools import generated_rooms, synthetic
from vssl_jax.models import framewise, vit
from vssl_jax.train import loop
from vssl_jax.utils import config_io


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """The folder of a finished run of both phases, with an average."""
  folder = tmp_path_factory.mktemp('encoders')
  synthetic.write(
    folder / 'clips', clips={'train': 40, 'test': 20}, size=32, frames=8
  )
  workdir = folder / 'a [run]* of me@home\\'  # all of it legal in a name
  config = small_runs.tiny_config(folder / 'clips' / 'train', workdir)
  assert loop.train(config) == 0
  return workdir


def test_a_folder_with_an_at_is_told_from_a_phase(tmp_path):
  for name in ('run', 'me@home/run', 'run@phase'):
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / 'run.json').touch()
  for source, wanted in {
    'run': ('run', ''),
    'run@one': ('run', 'one'),
    'run@one/average': ('run', 'one/average'),
    'me@home/run': ('me@home/run', ''),
    'me@home/run@one/average': ('me@home/run', 'one/average'),
    'run@phase': ('run@phase', ''),
    'run@phase@one': ('run@phase', 'one'),
  }.items():
    folder, part = encoder_lib.split(f'{tmp_path}/{source}')
    assert (folder, part) == (tmp_path / wanted[0], wanted[1])
    assert encoder_lib.is_run(f'{tmp_path}/{source}')
  assert not encoder_lib.is_run(f'{tmp_path}/me@home')


def _video(*shape):
  rng = np.random.default_rng(0)
  return rng.integers(0, 255, (*shape, 3), dtype=np.uint8)


def test_three_lines(run):
  encoder = vssl_jax.load(str(run))
  features = encoder(_video(2, 4, 16, 16))
  assert features.shape == (2, 8, 16) and features.dtype == np.float32
  # The final norm is on: mean and variance are those of its parameters.
  norm = encoder.params['norm']
  plain = (features - norm['bias'][None, None]) / norm['scale'][None, None]
  np.testing.assert_allclose(np.mean(plain, -1), 0, atol=1e-5)
  assert (encoder.width, encoder.grid) == (16, (2, 2, 2))
  one = encoder(_video(2, 4, 16, 16)[0])
  np.testing.assert_allclose(one, features[:1], atol=1e-5)


def test_taken_elsewhere_and_back(run, tmp_path):
  encoder = vssl_jax.load(str(run))
  assert encoder.export(tmp_path / 'out') == 'vssl_vit'
  again = vssl_jax.load(str(tmp_path / 'out'))
  assert (again.module, again.video) == (encoder.module, encoder.video)
  video = _video(1, *encoder.video[:3])
  np.testing.assert_array_equal(again(video), encoder(video))
  with pytest.raises(weights.WeightsError, match='without stages'):
    encoder.export(tmp_path / 'out', layout='hiera')


@pytest.mark.parametrize('name', ['salt', 'pmd', 'kdhiera'])
def test_a_run_is_opened_without_its_outside_teachers(name):
  """What they were stands in `run.json`: the files may be gone."""
  image = framewise.Framewise(
    vit.make('Ti', patch=(1, 16, 16), positions='learned', class_token=True)
  )
  there = {'images': image, 'videos': vit.make('Ti', depth=3)}
  config = config_lib.default(name)
  m = config.method
  if name == 'salt':
    m.phases, m.latent_student.teacher = ('latent_student',), 'videos'
  else:
    m.image.teacher, m.video.teacher = 'images', 'videos'
    if name == 'kdhiera':
      m.image.layers = m.video.layers = (1, 3)
      m.stages = (2, 4)
  video = (16, 224, 224, 3)
  phases = methods.build(m, video, there.__getitem__)
  record = {
    'config': config_io.to_json(config),
    'video': video,
    'outside': encoder_lib.outside(phases),
  }
  assert set(record['outside']) == (
    {'videos'} if name == 'salt' else set(there)
  )
  assert encoder_lib.phases_of(json.loads(json.dumps(record))) == phases
  with pytest.raises(ValueError, match='no such file'):
    encoder_lib.phases_of(record | {'outside': {}})


def test_phases_and_averages_by_name(run):
  student = encoder_lib.load(str(run))
  teacher = encoder_lib.load(f'{run}@pixel_teacher')
  kernels = [e.params['embed']['kernel'] for e in (student, teacher)]
  assert not np.array_equal(*kernels)
  polyak = encoder_lib.load(f'{run}@latent_student/polyak')
  pairs = zip(
    trees.named_leaves(student.params),
    trees.named_leaves(polyak.params),
    strict=True,
  )
  assert any(not np.array_equal(a, b) for (_, a), (_, b) in pairs)
  wanted = ('pixel_teacher', 'latent_student', 'latent_student/polyak')
  assert encoder_lib.parts(run) == wanted


def test_the_type_that_an_encoder_computes_in(run):
  """float32 on CPUs, whatever the run was trained in."""
  trained = encoder_lib.find(str(run)).phase.encoder.dtype
  assert encoder_lib.load(str(run)).module.dtype == 'float32' == trained
  half = vssl_jax.load(str(run), dtype='bfloat16')
  assert half.module.dtype == 'bfloat16'


@pytest.mark.parametrize(
  ('value', 'message'),
  [
    (np.nan, 'NaN or Inf in 1 of 20 arrays.*: block_00/mlp/fc1/bias'),
    (np.inf, 'NaN or Inf in 1 of 20 arrays.*: block_00/mlp/fc1/bias'),
    (None, r'integers in 1 of 20 arrays.*block_00/mlp/fc1/bias \(int32\)'),
  ],
)
def test_a_run_with_weights_that_are_no_numbers_is_refused(
  run, tmp_path, value, message
):
  """By the name of the leaf; a checkpoint's own sums are right."""
  no_states = shutil.ignore_patterns('checkpoints')
  shutil.copytree(run, tmp_path / 'run', ignore=no_states)
  encoder = encoder_lib.load(str(run))

  def spoil(name, x):
    if name != 'block_00/mlp/fc1/bias':
      return x
    return x.at[1].set(value) if value else x.astype(np.int32)

  spoiled = trees.map_named(spoil, encoder.params)
  saver = manager.Checkpoints(tmp_path / 'run')
  saver.save_params({'params': {'encoder': spoiled}}, 12, 'latent_student')
  with pytest.raises(ValueError, match=message):
    encoder_lib.load(f'{tmp_path}/run')


@pytest.fixture
def kept(tmp_path):
  """Three states of two phases, and the best one."""
  (tmp_path / 'checkpoints').mkdir()
  (tmp_path / 'params').mkdir()
  for step, phase, name in (
    *((2, 'first', 'checkpoints/2'), (4, 'first', 'checkpoints/4')),
    *((6, 'second', 'checkpoints/6'), (3, 'second', 'params/best')),
  ):
    folder = tmp_path / name
    folder.mkdir()
    (folder / 'part').write_text(name)
    files = integrity.hash_files(folder)
    tree = {'step': step, 'phase': phase, 'files': files, 'leaves': {}}
    integrity.write_atomic(integrity.path_of(folder), tree)
  return tmp_path


@pytest.mark.parametrize(
  ('wanted', 'damaged', 'read'),
  [
    (None, [], ['best']),
    (None, ['best'], ['best', '6']),
    ('first', [], ['4']),
    ('first', ['4'], ['4', '2']),
    ('second', [], ['6']),
    # Whoever names a phase does not get its best.
    ('second', ['6'], ['6', None]),
  ],
)
def test_only_the_checkpoint_that_is_used_is_read(
  kept, monkeypatch, wanted, damaged, read
):
  for name in damaged:
    next(kept.glob(f'*/{name}/part')).write_text('x' * 11 + name)
  whole, looked = integrity.damage, []

  def look(saved):
    looked.append(saved.path.name)
    return whole(saved)

  monkeypatch.setattr(integrity, 'damage', look)
  found = encoder_lib._newest(kept, wanted, ['first', 'second'])
  assert looked == [name for name in read if name]
  assert (found.path.name if found else None) == read[-1]


def test_random_initialisation_is_the_same_network_untrained(run):
  student = encoder_lib.load(str(run))
  fresh = encoder_lib.random(student, 1)
  assert not np.allclose(
    fresh(_video(1, 4, 16, 16)), student(_video(1, 4, 16, 16))
  )
  assert 'random initialisation' in fresh.name


def test_other_clip_shapes_where_positions_allow(run):
  encoder = encoder_lib.load(str(run))
  assert encoder(_video(1, 8, 32, 16)).shape == (1, 4 * 4 * 2, 16)
  with pytest.raises(ValueError, match='15'):
    encoder(_video(1, 4, 15, 16))


@pytest.mark.parametrize(
  ('part', 'message'),
  [
    ('@pixel_techer', r"no finished checkpoint of phase 'pixel_techer'"),
    ('@latent_student/slow', r"no average 'slow'"),
  ],
)
def test_parts_that_do_not_exist_are_named(run, part, message):
  with pytest.raises(ValueError, match=message):
    encoder_lib.load(f'{run}{part}')


def test_a_source_that_is_nothing_is_an_error(tmp_path):
  with pytest.raises((ValueError, FileNotFoundError), match='nothing_here'):
    encoder_lib.load(str(tmp_path / 'nothing_here'))


@pytest.mark.slow
def test_a_student_may_start_from_a_run(run, tmp_path):
  """`init_from`: the first state holds the source's values."""
  config = small_runs.tiny_config(
    run.parent / 'clips' / 'train', tmp_path / 'r'
  )
  config.method.phases = ('pixel_teacher',)
  config.method.pixel_teacher.steps = 1
  config.method.pixel_teacher.init_from = f'{run}@pixel_teacher'
  config.optim.update(dict(lr=1e-9, lr_start=1e-9, lr_end=1e-9, warmup=0))
  assert loop.train(config) == 0
  a = encoder_lib.load(f'{run}@pixel_teacher').params
  b = encoder_lib.load(str(tmp_path / 'r')).params
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a, b)
  config.workdir = str(tmp_path / 's')
  config.method.pixel_teacher.encoder.width = 32
  with pytest.raises(ValueError, match='cannot start from'):
    loop.train(config)


def test_roles_of_a_run(run):
  """Training may continue from a predictor, too, by the name of its role."""
  module, params = encoder_lib.load_role(str(run), 'predictor')
  assert module == encoder_lib.find(str(run)).phase.predictor
  assert 'mask_token_0' in params
  module, params = encoder_lib.load_role(f'{run}@latent_student/polyak')
  polyak = encoder_lib.load(f'{run}@latent_student/polyak')
  assert module == polyak.module
  jax.tree.map(np.testing.assert_array_equal, params, polyak.params)
  with pytest.raises(ValueError, match=r"'decoder'; wanted one of .*predictor"):
    encoder_lib.load_role(str(run), 'decoder')


@pytest.mark.slow
def test_a_student_may_continue_with_its_predictor(run, tmp_path):
  config = small_runs.tiny_config(
    run.parent / 'clips' / 'train', tmp_path / 'r'
  )
  config.method.phases = ('latent_student',)
  student = config.method.latent_student
  student.teacher, student.init_from = '@ema/encoder', str(run)
  student.init_roles, student.steps = ('encoder', 'predictor'), 1
  config.optim.update(dict(lr=0.0, lr_start=0.0, lr_end=0.0, warmup=0))
  assert loop.train(config) == 0
  for role in student.init_roles:
    _, before = encoder_lib.load_role(str(run), role)
    _, after = encoder_lib.load_role(str(tmp_path / 'r'), role)
    jax.tree.map(np.testing.assert_array_equal, before, after)
  # The predictor of another student, refused before anything runs.
  config.workdir = str(tmp_path / 's')
  student.predictor.num_heads = 1
  with pytest.raises(
    ValueError,
    match=r'num_heads is 2 there and 1 here '
    r'\(--config.method.latent_student.predictor.num_heads=2\)',
  ):
    loop.train(config)


TRAINED = ('--config.probe.epochs=2', '--config.probe.batch_size=8')


@pytest.mark.parametrize('protocol', ['knn', 'linear'])
def test_the_probe_job_measures_a_run(run, tmp_path, monkeypatch, protocol):
  monkeypatch.chdir(tmp_path)
  clips = run.parent / 'clips'
  status = main.main(
    [
      f'--config=configs/probe_fast.py:{protocol}',
      f'--config.encoder={run}',
      f'--config.probe.train={clips}/train',
      f'--config.probe.test={clips}/test',
      '--config.workdir=out',
      '--config.data.isolate=False',
      '--config.probe.test_batch_size=8',
      *(TRAINED if protocol == 'linear' else ()),
    ]
  )
  assert status == 0
  report = json.loads((tmp_path / 'out' / 'report.json').read_text())
  assert report['test']['evaluated'] == 20
  assert report['protocol'] == protocol
  # The clips of the run, which no key names.
  assert report['clip'] == report['encoder_clip'] == [4, 16, 16, 3]
  assert report['timing'] == report['encoder_timing'] == 'stride 1'
  assert report['encoder'] == str(run)
  assert len(report['classes']) == len(synthetic.MOTIONS)


def test_the_depth_job_measures_a_run(run, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  look = generated_rooms.Look(height=16, width=16, frames=8)
  generated_rooms.write(tmp_path / 'rooms', scenes=8, look=look)
  status = main.main(
    [
      '--config=configs/depth_fast.py',
      f'--config.encoder={run}',
      '--config.probe.train=rooms',
      '--config.probe.train_where=frames=0-3',
      '--config.probe.test=rooms',
      '--config.probe.test_where=frames=4-7',
      '--config.workdir=out',
      '--config.data.frames=4',
      '--config.data.stride=1',
      '--config.data.size=(16, 16)',
      '--config.data.isolate=False',
      '--config.probe.epochs=1',
      '--config.probe.clips=1',
      '--config.probe.width=16',
      '--config.probe.pictures=1',
    ]
  )
  assert status == 0, capsys.readouterr().err
  report = json.loads((tmp_path / 'out' / 'report.json').read_text())
  assert report['encoder'] == str(run)
  assert report['train']['source'] == 'rooms where frames=0-3'
  assert report['results']['pixels'] > 0.9 * 8 * 4 * 16 * 16
  assert 'tapped after block' in capsys.readouterr().out
  assert (tmp_path / 'out' / 'depth_000000.png').exists()
