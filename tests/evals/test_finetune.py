"""The job `finetune` from video files to the report, with a tiny encoder."""

import json
import pathlib
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vssl_jax
from tests.evals import finetune_small as small
from vssl_jax import main, sharding, weights
from vssl_jax.checkpoint import integrity, manager
from vssl_jax.data import pipeline
from vssl_jax.data.tools import synthetic
from vssl_jax.evals.finetune import job, setup, validation
from vssl_jax.evals.finetune import model as model_lib
from vssl_jax.evals.finetune import videos as videos_lib
from vssl_jax.models import classifier
from vssl_jax.utils import metrics

pytestmark = pytest.mark.slow  # test_finetune_setup.py is not
COLOURS = {'blue': (40, 40, 200), 'green': (40, 200, 40), 'red': (200, 40, 40)}


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
  """Folders `train` and `test` of three classes that differ in colour."""
  folder = tmp_path_factory.mktemp('colours')
  rng = np.random.default_rng(0)
  for split, count in (('train', 16), ('test', 5)):
    for name, colour in COLOURS.items():
      (folder / split / name).mkdir(parents=True)
      for i in range(count):
        noise = rng.normal(0, 25, (6, 16, 24, 3))
        video = np.clip(np.asarray(colour) + noise, 0, 255).astype(np.uint8)
        synthetic.encode(folder / split / name / f'{i:02}.mp4', video, fps=8)
  (folder / 'test' / 'red' / '99.mp4').write_bytes(b'this is no video')
  return folder


@pytest.fixture(scope='module')
def finished(videos, tmp_path_factory):
  """A whole run from a given encoder."""
  workdir = tmp_path_factory.mktemp('finetune') / 'run'
  config = small.config_of(videos, workdir)
  return config, job.evaluate(config, small.encoder_of())


def leaf_sums(workdir, folder='checkpoints'):
  """Leaf -> sum of bits, of the newest in a folder."""
  newest = max(integrity.listing(workdir, (folder,)), key=lambda s: s.step)
  leaves = newest.manifest['leaves']
  return newest.step, {name: leaf['sum'] for name, leaf in leaves.items()}


def test_the_report_says_how_and_how_well(finished):
  config, found = finished
  assert found['test']['evaluated'] == 15 and found['test']['missing'] == 1
  held = found['valid']['total']
  assert found['valid']['held_out'] and 4 < held < 20
  assert found['train']['videos'] == 48 - held
  assert found['classes'] == ['blue', 'green', 'red']
  assert found['encoder'] == 'ours'
  best = found['results']['best']
  assert best['interval'][0] < best['accuracy'] < best['interval'][1] or (
    best['accuracy'] == 1
  )
  on_disk = json.loads(
    (pathlib.Path(config.workdir) / 'report.json').read_text()
  )
  assert on_disk['results'] == found['results']
  assert 'base * batch / 256 = 0.3 * 8 / 256 = 0.009375' in found['lr']
  assert 'does not count' in found['lr']


def test_it_learns(finished, videos):
  """Training clips, without augmentation: more than chance + 3 errors."""
  config, _ = finished
  model = model_lib.load(config.workdir)
  assert model.classes == ('blue', 'green', 'red')
  data = config.data.to_dict() | {'source': str(videos / 'train')}
  right = total = 0
  for batch in pipeline.evaluation(data, batch_size=8):
    said = np.asarray(model(batch['video'])).argmax(axis=1)
    right += int(((said == batch['label']) * batch['weight']).sum())
    total += int(batch['weight'].sum())
  assert total == 48
  assert right / total > 1 / 3 + 3 * np.sqrt(1 / 3 * 2 / 3 / total)


def test_an_export_keeps_the_whole_model(finished, videos, tmp_path):
  config, _ = finished
  model = model_lib.load(config.workdir)
  rng = np.random.default_rng(0)
  video = rng.integers(0, 256, (3, *small.SHAPE), np.uint8)
  for name, export in (
    ('model', model.export),
    ('encoder', vssl_jax.load(config.workdir).export),
  ):
    export(tmp_path / name)
    again = model_lib.load(str(tmp_path / name))
    assert again.classes == ('blue', 'green', 'red')
    assert again.encoder.mean == model.encoder.mean
    assert again.clip == model.clip
    np.testing.assert_allclose(again(video), model(video), atol=1e-6)


def test_the_best_checkpoint_is_kept_and_loaded(finished):
  config, found = finished
  history = found['history']
  assert [x['epoch'] for x in history] == [1, 2, 3, 4]
  first = max(history, key=lambda x: (x['accuracy'], -x['loss'], -x['epoch']))
  every = found['steps'] // 4
  assert found['results']['best']['step'] == first['epoch'] * every
  saved = model_lib.load(config.workdir).saved
  assert saved.path.name == manager.BEST
  assert saved.step == found['results']['best']['step']
  np.testing.assert_allclose(saved.manifest['valid']['loss'], first['loss'])
  encoder = vssl_jax.load(config.workdir)
  assert not encoder.module.final_norm
  model = model_lib.load(config.workdir)
  clip = np.random.default_rng(0).integers(0, 256, (2, *small.SHAPE), np.uint8)
  tokens = encoder(clip)
  head = classifier.Classifier(3).apply(
    {'params': model.params['head']}, tokens
  )
  np.testing.assert_allclose(model(clip), head, atol=1e-5)
  assert model(clip[0]).shape == (1, 3)


def test_a_later_epoch_has_to_be_better(finished, videos, tmp_path):
  """Looks at states of known worth, forwards and again after a kill."""
  config, _ = finished
  mesh = sharding.make_mesh()
  good = model_lib.load(config.workdir, mesh)
  untrained = jax.tree.map(jnp.zeros_like, good.params)
  listed = videos_lib.find(small.config_of(videos, tmp_path))
  c = setup.fill(small.config_of(videos, tmp_path), listed)
  hook = validation.Hook(c, listed, 4)
  run = types.SimpleNamespace(
    mesh=mesh,
    checkpoints=manager.Checkpoints(tmp_path),
    logger=metrics.Logger(tmp_path, tensorboard=False),
  )
  phase = types.SimpleNamespace(
    name='labels', encoder=good.encoder, head=good.head
  )
  span = types.SimpleNamespace(phase=phase, start=0)
  assert [step for step in range(1, 13) if hook.due(step, 0)] == [4, 8, 12]

  def look(step, params):
    state = types.SimpleNamespace(params=params)
    hook.look(run, span, state, step)
    best = run.checkpoints.params_of(manager.BEST).manifest
    return best['step'], best['valid']['loss']

  # An untrained one gives every class the same probability.
  assert look(4, untrained) == (4, pytest.approx(np.log(3), rel=1e-5))
  assert look(8, good.params) == (
    8,
    validation.history(str(tmp_path), 4)[1]['loss'],
  )
  assert look(12, untrained)[0] == 8
  # A start from before the best was found does not know of it.
  assert look(8, untrained) == (8, pytest.approx(np.log(3), rel=1e-5))
  hook.close()
  run.logger.close()


def test_resumed_in_the_middle_it_ends_with_the_same_bits(
  finished, videos, tmp_path
):
  config, found = finished
  workdir = tmp_path / 'run'
  shutil.copytree(config.workdir, workdir)
  (workdir / 'report.json').unlink()
  # Killed in the second epoch: nothing later is there.
  for saved in integrity.listing(workdir):
    if saved.step > 6 or saved.path.name == manager.BEST:
      shutil.rmtree(saved.path)
      saved.path.with_suffix('.json').unlink()
  again = small.config_of(videos, workdir)
  # The weights that it started from are in its folder; theirs may be gone.
  result = job.evaluate(again, small.encoder_of())
  assert leaf_sums(workdir) == leaf_sums(config.workdir)
  assert result['results'] == found['results']
  # A tested run is not tested again.
  (workdir / 'params' / 'best.json').unlink()
  assert job.evaluate(again, small.encoder_of())['results'] == found['results']
  # Nothing is tested in place of the best.
  (workdir / 'report.json').unlink()
  with pytest.raises(ValueError, match=r'params/best: .* is damaged or'):
    job.evaluate(again, small.encoder_of())


def test_held_out_videos_are_validated_once_and_never_trained_on(
  videos, tmp_path
):
  c = small.config_of(videos, tmp_path)
  listed = videos_lib.find(c)
  filled = setup.fill(c, listed)
  clips = pipeline.make(filled.data.to_dict(), batch_size=16, seed=0)
  stream = clips.iterator()
  trained = [next(stream) for _ in range(3 * listed.count // 8)]
  clips.close()
  seen = {int(i) for batch in trained for i in batch['index']}
  passed = videos_lib.one_view(filled, listed)
  held = [
    int(i)
    for batch in passed
    for i, weight in zip(batch['index'], batch['weight'], strict=True)
    if weight
  ]
  passed.close()
  assert len(held) == len(set(held)) == 48 - listed.count
  assert not seen & set(held)
  assert seen | set(held) == set(range(48))
  # Two crops of the same frames, next to each other.
  first = trained[0]
  np.testing.assert_array_equal(first['index'][::2], first['index'][1::2])
  assert (first['crop'][::2] != first['crop'][1::2]).any()


def test_every_view_comes_once_whatever_the_batch_and_the_devices(
  finished, videos
):
  config, _ = finished
  model = model_lib.load(config.workdir)
  listed = videos_lib.find(small.config_of(videos, config.workdir))
  found = []
  for devices, size in ((1, 4), (2, 8)):
    mesh = jax.make_mesh(
      (1, devices),
      ('data', 'fsdp'),
      devices=jax.devices()[:devices],
      axis_types=sharding.AUTO,
    )
    c = small.config_of(videos, config.workdir, test_batch_size=size)
    c.finetune.update(dict(sampling='interleaved', clips=2, views=3))
    place = jax.device_put(model.params, sharding.replicated(mesh))
    clips = videos_lib.all_views(c, listed)
    # Every video by its number and view; a second time would be an error.
    counted = model_lib.count(
      model, place, job.setup_lib.number_views(clips, 1, 2), 6, mesh
    )
    clips.close()
    found.append((counted.loss(), *counted.predictions()))
  assert len(found[0][1]) == 15
  for a, b in zip(*found, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_wrong_knobs_and_lists_are_named(videos, tmp_path):
  train = (str(videos / 'train'),)
  for change, message in (
    ({'test': train}, 'train and finetune.test name the same videos'),
    ({'valid': train}, 'train and finetune.valid name the same videos'),
    ({'holdout': 0.0}, r'finetune\.holdout: found 0\.0'),
    ({'batch_size': 64}, r'at most the \d\d videos'),
    ({'train': (str(videos / 'train' / 'red'),)}, 'have no labels'),
  ):
    with pytest.raises(ValueError, match=message):
      job.evaluate(small.config_of(videos, tmp_path, **change))
  with pytest.raises(ValueError, match=r'config\.workdir is empty'):
    job.evaluate(small.config_of(videos, ''))
  with pytest.raises(ValueError, match=r'no model\.safetensors'):
    model_lib.load(str(tmp_path))


def test_plans_say_what_each_job_does(videos, tmp_path, capsys):
  given = small.encoder_of()
  weights.export(given.module, given.params, tmp_path, video=small.SHAPE)
  clip = ['--config.data.frames=4', '--config.data.size=(16, 16)']
  clip += ['--config.data.stride=1']

  def plan(page, *flags):
    status = main.main([f'--config=configs/{page}', *clip, *flags, '--plan'])
    out = capsys.readouterr()
    return status, out.out + out.err

  encoder = f'--config.encoder={tmp_path}'
  status, text = plan('finetune_k400.py:L', encoder)
  assert status == 0
  assert 'an epoch is shown as 100 steps' in text and 'steps 0 to 5000' in text
  assert 'lr = base * batch / 256 = 0.001 * 512 / 256 = 0.002' in text
  status, text = plan(
    'finetune_ucf101.py',
    f'--config.finetune.train={videos / "train"}',
    f'--config.finetune.test={videos / "test"}',
    '--config.finetune.batch_size=8',
  )
  assert status == 0 and '3 classes' in text and 'held out' in text
  status, text = plan('probe_k400.py', encoder)
  assert status == 0
  assert 'heads: 20 (5 learning rates x 4 weight decays)' in text
  assert '8 tokens of 16' in text and 'phase' not in text
  status, text = plan('probe_k400.py')
  assert status == 2 and 'give --config.encoder' in text
  status, text = plan('depth_fast.py', encoder)
  assert status == 0 and 'heads: 1 (' in text
