import json
import pathlib
import random
import shutil

import jax
import numpy as np
import pytest

from tests.train import small_runs
from vssl_jax import config as config_lib
from vssl_jax.checkpoint import integrity, manager
from vssl_jax.train import loop
from vssl_jax.train import run as run_lib
from vssl_jax.utils import metrics


def _sums(workdir):
  """Leaf name -> sum of bits, of the newest state."""
  found = [s for s in integrity.listing(workdir) if 'opt' in s.shapes()]
  newest = max(found, key=lambda s: s.step)
  leaves = newest.manifest['leaves']
  return newest.step, {name: leaf['sum'] for name, leaf in leaves.items()}


def _lines(workdir, **where):
  text = (pathlib.Path(workdir) / 'metrics.jsonl').read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  return [x for x in lines if all(x.get(k) == v for k, v in where.items())]


def _losses(workdir):
  return {x['step']: x['loss'] for x in _lines(workdir) if 'loss' in x}


@pytest.fixture(scope='module')
def finished(clips, tmp_path_factory):
  """A whole run with a checkpoint after every step."""
  workdir = tmp_path_factory.mktemp('finished') / 'run'
  config = small_runs.tiny_config(clips, workdir)
  config.checkpoint.update(dict(every=1, keep=100))
  assert loop.train(config) == 0
  return config, workdir


def test_a_run_leaves_what_it_promises(finished):
  _, workdir = finished
  assert sorted(p.name for p in (workdir / 'params').iterdir()) == [
    'latent_student',
    'latent_student.json',
    'pixel_teacher',
    'pixel_teacher.json',
  ]
  record = json.loads((workdir / 'run.json').read_text())
  assert record['config']['method']['name'] == 'salt'
  assert record['provenance']['versions']['jax'] == jax.__version__
  assert record['provenance']['config_hash'] and record['data_fingerprint']
  assert record['num_examples'] == 40
  losses = _losses(workdir)
  assert sorted(losses) == list(range(1, 13))
  assert all(np.isfinite(x) for x in losses.values())
  last = _lines(workdir)[-1]
  assert last['phase'] == 'latent_student'
  for key in ('lr', 'wd', 'grad_norm', 'clips_per_s', 'teacher_share'):
    assert last[key] >= 0, key
  buckets = sum(v for k, v in last.items() if k.startswith('time/'))
  np.testing.assert_allclose(buckets, 1, atol=0.01)


def test_the_teacher_is_the_boundary_checkpoint(finished):
  """And the student's phase has not moved it."""
  _, workdir = finished
  saver = manager.Checkpoints(workdir, keep=100)
  end = next(
    s
    for s in integrity.listing(workdir)
    if s.step == 6 and s.phase == 'pixel_teacher' and 'opt' in s.shapes()
  )
  kept = saver.params_of('pixel_teacher')
  encoder = {n for n in kept.manifest['leaves'] if n.startswith('params/')}
  assert encoder
  for name in encoder:
    assert kept.manifest['leaves'][name] == end.manifest['leaves'][name]


LATER = pytest.mark.slow


@pytest.mark.parametrize(
  'step',
  [
    pytest.param(3, marks=LATER),
    6,  # the boundary
    pytest.param(7, marks=LATER),
    pytest.param(random.Random(0).randrange(1, 12), marks=LATER),
    pytest.param(11, marks=LATER),
  ],
)
def test_resume_is_bit_exact(finished, tmp_path, step):
  """From inside either phase or from their boundary (R1)."""
  config, workdir = finished
  copy = tmp_path / 'run'
  shutil.copytree(workdir, copy)
  for saved in integrity.listing(copy):
    if saved.step > step:
      shutil.rmtree(saved.path)
      saved.path.with_suffix('.json').unlink()
  config = config.copy_and_resolve_references()
  config.workdir = str(copy)
  assert loop.train(config) == 0
  end, sums = _sums(workdir)
  again, resumed = _sums(copy)
  assert end == again == 12
  assert {n for n in sums if sums[n] != resumed[n]} == set()


def test_starting_a_finished_run_again_does_nothing(finished, tmp_path):
  config, workdir = finished
  copy = tmp_path / 'run'
  shutil.copytree(workdir, copy)
  config = config.copy_and_resolve_references()
  config.workdir = str(copy)
  before = (copy / 'metrics.jsonl').read_text()
  assert loop.train(config) == 0
  assert (copy / 'metrics.jsonl').read_text() == before


@pytest.mark.slow
def test_corrupt_values_give_way_to_the_state_before(finished, tmp_path):
  config, workdir = finished
  copy = tmp_path / 'run'
  shutil.copytree(workdir, copy)
  for saved in integrity.listing(copy):
    if saved.step > 4:
      shutil.rmtree(saved.path)
      saved.path.with_suffix('.json').unlink()
  path = copy / 'checkpoints' / '00000004.json'
  manifest = integrity.load(path)
  manifest['leaves']['params/encoder/embed/kernel']['sum'][1] ^= 1
  integrity.write_atomic(path, manifest)
  config = config.copy_and_resolve_references()
  config.workdir = str(copy)
  assert loop.train(config) == 0
  assert (copy / 'checkpoints' / '00000004.corrupt').exists()
  assert _sums(copy)[1] == _sums(workdir)[1]


def test_a_changed_config_is_refused_by_key(finished, tmp_path):
  config, workdir = finished
  copy = tmp_path / 'run'
  shutil.copytree(workdir, copy)
  config = config.copy_and_resolve_references()
  config.workdir = str(copy)
  config.optim.lr = 0.5
  with pytest.raises(
    run_lib.TrainingError, match=r'optim.lr: was 0.01, is 0.5'
  ):
    loop.train(config)
  config.optim.lr = 1e-2
  config.log.every = 3  # may change
  assert loop.train(config) == 0


def test_a_key_newer_than_the_run_may_have_its_default(
  finished, tmp_path, capsys
):
  config, workdir = finished
  copy = tmp_path / 'run'
  shutil.copytree(workdir, copy)
  record = integrity.load_record(copy)
  del record['config']['optim']['layer_decay']
  integrity.write_atomic(copy / 'run.json', record)
  config = config.copy_and_resolve_references()
  config.workdir = str(copy)
  defaults = config_lib.defaults(config)
  assert loop.train(config, defaults=defaults) == 0
  assert "at their defaults: ['optim.layer_decay']" in capsys.readouterr().out
  integrity.write_atomic(copy / 'run.json', record)
  config.optim.layer_decay = 0.5
  with pytest.raises(run_lib.TrainingError, match="layer_decay: was 'absent'"):
    loop.train(config, defaults=defaults)


def test_resume_off_refuses_a_folder_in_use(finished):
  config, _ = finished
  config = config.copy_and_resolve_references()
  config.checkpoint.resume = False
  with pytest.raises(run_lib.TrainingError, match='give a new'):
    loop.train(config)


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [(2, 4), (8, 1)])
def test_the_mesh_does_not_change_the_losses(finished, tmp_path, mesh):
  config, workdir = finished
  config = config.copy_and_resolve_references()
  config.workdir = str(tmp_path / 'run')
  config.mesh.update(dict(data=mesh[0], fsdp=mesh[1]))
  assert loop.train(config) == 0
  want, got = _losses(workdir), _losses(tmp_path / 'run')
  np.testing.assert_allclose(
    [got[s] for s in sorted(got)], [want[s] for s in sorted(want)], rtol=1e-5
  )


@pytest.mark.slow
def test_a_student_alone_from_a_finished_teacher(finished, tmp_path):
  """`phases=('latent_student',)` starts with the chained run's loss."""
  config, workdir = finished
  config = config.copy_and_resolve_references()
  config.workdir = str(tmp_path / 'run')
  config.method.phases = ('latent_student',)
  config.method.latent_student.teacher = f'{workdir}@pixel_teacher'
  assert loop.train(config) == 0
  # Other clips than the chained run's (the data goes by the run's step), so
  # only the scale agrees.
  first = _losses(tmp_path / 'run')[1]
  np.testing.assert_allclose(first, _losses(workdir)[7], rtol=0.1)


def test_a_batch_that_does_not_divide_is_refused(tiny):
  tiny.batch_size = 12
  with pytest.raises(ValueError, match=r'found 12, wanted a multiple of 8'):
    loop.train(tiny)


def test_a_mesh_that_does_not_fit_is_refused(tiny):
  tiny.mesh.update(dict(data=3, fsdp=2))
  with pytest.raises(ValueError, match='data=3 x fsdp=2 is not the 8 devices'):
    loop.train(tiny)


def test_the_clock_accounts_for_all_time():
  clock = metrics.Clock('start')
  with clock('data'), clock('step'):
    sum(range(100_000))
  shares = clock.goodput()
  assert set(shares) == {'time/start', 'time/data', 'time/step'}
  np.testing.assert_allclose(sum(shares.values()), 1, atol=1e-6)
  assert shares['time/step'] > shares['time/data']


def test_the_last_logged_step_survives_odd_lines(tmp_path):
  assert metrics.last_step(tmp_path, 9) == 0
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(
    b'{"step": 5}\n[]\n\0\0\n\xff\xfe\n{"step": "8"}\n{"step": true}\n'
    b'{"step": 7}\n{"step": 999999}\n{"step": -1}\n{"st'
  )
  assert metrics.last_step(tmp_path, 9) == 7
  logger = metrics.Logger(tmp_path, tensorboard=False)
  logger.write(8, {'loss': 1})
  logger.close()
  assert metrics.last_step(tmp_path, 9) == 8  # not the rest of half a line


@pytest.mark.parametrize('content', [b'', b'\0' * 900, b'flip', None])
def test_a_run_goes_on_with_bad_records_and_says_so(
  finished, tmp_path, content, capsys
):
  config, workdir = finished
  copy = tmp_path / 'run'
  shutil.copytree(workdir, copy)
  record = copy / 'run.json'
  before = integrity.load(record)
  if content == b'flip':
    content = record.read_bytes().replace(b'"lr": 0.01', b'"lr": 0.03')
  record.unlink() if content is None else record.write_bytes(content)
  for name in ('bad_files.jsonl', 'skipped_0.jsonl'):
    (copy / name).write_text('{"index": 3}\n{"index": "x"}\n{"ind')
  config = config.copy_and_resolve_references()
  config.workdir, lr = str(copy), config.optim.lr
  config.optim.lr = 0.03
  with pytest.raises(run_lib.TrainingError, match=r'optim.lr: was 0.01'):
    loop.train(config)
  config.optim.lr = lr
  assert loop.train(config) == 0
  said = capsys.readouterr().out
  assert ('run.json is corrupt' in said) == (content is not None)
  assert (copy / 'run.json.corrupt').exists() == (content is not None)
  after = integrity.load(record)
  for key in ('config', 'video', 'data_fingerprint', 'rewinds', 'outside'):
    if key != 'config':
      assert after[key] == before[key]
  assert after['config']['optim'] == before['config']['optim']


@pytest.mark.slow
@pytest.mark.parametrize(
  ('decay', 'message'),
  [
    (1e3, r"parameter '\w+/\S+' holds a value that is not finite"),
    # Parameters stay finite, and no loss is any more.
    (0.0, r'4 steps in a row had no update, up to step'),
  ],
)
def test_a_run_that_cannot_recover_stops_and_keeps_the_batches(
  tiny, decay, message
):
  tiny.optim.update(dict(lr=1e38, lr_start=1e38, clip=0.0, warmup=0))
  tiny.optim.weight_decay = decay
  tiny.compile_ahead = False
  tiny.health.max_skipped = 3
  with pytest.raises(run_lib.TrainingError, match=message):
    loop.train(tiny)
  skipped = pathlib.Path(tiny.workdir) / 'skipped_0.jsonl'
  record = json.loads(skipped.read_text().splitlines()[0])
  assert len(record['index']) == tiny.batch_size
