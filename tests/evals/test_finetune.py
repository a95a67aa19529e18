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
from vssl_jax import config as config_lib
from vssl_jax import encoders, main, methods, sharding, trees, weights
from vssl_jax.data import options, pipeline, synthetic
from vssl_jax.evals import (
  finetune,
  finetune_start,
  finetune_videos,
  finetuned,
  validation,
)
from vssl_jax.models import classifier, vit
from vssl_jax.train import checkpoint, manifests, metrics, optimizer
from vssl_jax.train import run as run_lib

COLOURS = {'blue': (40, 40, 200), 'green': (40, 200, 40), 'red': (200, 40, 40)}
SHAPE = (4, 16, 16, 3)
TINY = dict(width=16, depth=2, num_heads=2, mlp_width=32)


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


def config_of(videos, workdir, **wanted):
  c = finetune.recipe()
  c.workdir = str(workdir)
  c.data.update(dict(frames=4, stride=1, size=(16, 16), workers=0))
  c.data.update(dict(isolate=False, decode_processes=1, max_bad_fraction=0.2))
  c.data.update(dict(crop_scale=(0.5, 1.0), auto_augment=''))
  c.method.encoder.update(TINY | {'size': 'Ti'})
  c.method.vit.update(dict(patch=(2, 8, 8), dtype='float32'))
  c.optim.lr = 0.3
  c.finetune.train = (str(videos / 'train'),)
  c.finetune.test = (str(videos / 'test'),)
  c.finetune.update(dict(epochs=4, warmup_epochs=0.5, holdout=0.25))
  c.finetune.update(dict(batch_size=8, test_batch_size=8, clips=2, views=3))
  c.finetune.update(wanted)
  c.checkpoint.update(dict(every=3, keep=100))
  c.log.update(dict(every=1, tensorboard=False))
  return c


def encoder_of(**fields):
  """A pre-trained encoder: a final norm, and learned positions."""
  module = vit.make(
    TINY, patch=(2, 8, 8), positions='learned', dtype='float32', **fields
  )
  key = jax.random.key(3)
  params = module.init(key, np.zeros((1, *SHAPE), np.uint8))['params']
  noisy = jax.tree.map(lambda x: x + 0.01, params)
  return encoders.Encoder(module, noisy, 'ours', SHAPE)


@pytest.fixture(scope='module')
def finished(videos, tmp_path_factory):
  """A whole run from a given encoder."""
  workdir = tmp_path_factory.mktemp('finetune') / 'run'
  config = config_of(videos, workdir)
  return config, finetune.evaluate(config, encoder_of())


def leaf_sums(workdir, folder='checkpoints'):
  """Leaf -> sum of bits, of the newest in a folder."""
  newest = max(manifests.listing(workdir, (folder,)), key=lambda s: s.step)
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
  model = finetuned.load(config.workdir)
  assert model.classes == ('blue', 'green', 'red')
  data = config.data.to_dict() | {'source': str(videos / 'train')}
  right = total = 0
  for batch in pipeline.evaluation(data, batch_size=8):
    said = np.asarray(model(batch['video'])).argmax(axis=1)
    right += int(((said == batch['label']) * batch['weight']).sum())
    total += int(batch['weight'].sum())
  assert total == 48
  assert right / total > 1 / 3 + 3 * np.sqrt(1 / 3 * 2 / 3 / total)


def test_the_best_checkpoint_is_kept_and_loaded(finished):
  config, found = finished
  history = found['history']
  assert [x['epoch'] for x in history] == [1, 2, 3, 4]
  first = max(history, key=lambda x: (x['accuracy'], -x['loss'], -x['epoch']))
  every = found['steps'] // 4
  assert found['results']['best']['step'] == first['epoch'] * every
  saved = finetuned.load(config.workdir).saved
  assert saved.path.name == checkpoint.BEST
  assert saved.step == found['results']['best']['step']
  np.testing.assert_allclose(saved.manifest['valid']['loss'], first['loss'])
  encoder = vssl_jax.load(config.workdir)
  assert not encoder.module.final_norm
  model = finetuned.load(config.workdir)
  clip = np.random.default_rng(0).integers(0, 256, (2, *SHAPE), np.uint8)
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
  good = finetuned.load(config.workdir, mesh)
  untrained = jax.tree.map(jnp.zeros_like, good.params)
  listed = finetune_videos.find(config_of(videos, tmp_path))
  c = finetune_start.fill(config_of(videos, tmp_path), listed)
  watcher = validation.Watcher(c, listed, 4)
  run = types.SimpleNamespace(
    mesh=mesh,
    checkpoints=checkpoint.Checkpoints(tmp_path),
    logger=metrics.Logger(tmp_path, tensorboard=False),
  )
  span = types.SimpleNamespace(phase=good.phase, start=0)
  assert [step for step in range(1, 13) if watcher.due(step, 0)] == [4, 8, 12]

  def look(step, params):
    state = types.SimpleNamespace(params=params)
    watcher.look(run, span, state, step)
    best = run.checkpoints.params_of(checkpoint.BEST).manifest
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
  watcher.close()
  run.logger.close()


def test_resumed_in_the_middle_it_ends_with_the_same_bits(
  finished, videos, tmp_path
):
  config, found = finished
  workdir = tmp_path / 'run'
  shutil.copytree(config.workdir, workdir)
  (workdir / 'report.json').unlink()
  # Killed in the second epoch: nothing later is there.
  for saved in manifests.listing(workdir):
    if saved.step > 6 or saved.path.name == checkpoint.BEST:
      shutil.rmtree(saved.path)
      saved.path.with_suffix('.json').unlink()
  again = config_of(videos, workdir)
  # The weights that it started from are in its folder; theirs may be gone.
  result = finetune.evaluate(again, encoder_of())
  assert leaf_sums(workdir) == leaf_sums(config.workdir)
  assert result['results'] == found['results']
  # A tested run is not tested again.
  (workdir / 'params' / 'best.json').unlink()
  assert finetune.evaluate(again, encoder_of())['results'] == found['results']


def test_the_run_starts_from_the_encoder_without_its_final_norm(tmp_path):
  c = finetune.recipe()
  c.workdir, c.data.frames, c.data.size = str(tmp_path), 4, (16, 16)
  given = encoder_of()
  finetune_start.write(c, given)
  module, params, _ = weights.load_published(c.method.source)
  wanted = dict(trees.named_leaves(given.params))
  found = dict(trees.named_leaves(params))
  assert wanted.keys() - found.keys() == {'norm/scale', 'norm/bias'}
  for name, value in found.items():
    np.testing.assert_array_equal(value, wanted[name])
  c.method.update(dict(steps=1, classes=3, drop_path=0.3))
  (phase,) = methods.build(c.method, SHAPE, encoders.module_of).phases()
  assert phase.encoder == module.clone(drop_path=0.3, remat='none')
  assert phase.encoder.block_spec.drop_path == 0.3


def test_blocks_that_decode_are_left_behind(tmp_path):
  c = finetune.recipe()
  c.workdir, c.data.frames, c.data.size = str(tmp_path), 4, (16, 16)
  finetune_start.write(c, encoder_of(decoder_blocks=1, final_norm=False))
  module, params, _ = weights.load_published(c.method.source)
  assert (module.depth, module.decoder_blocks) == (1, 0)
  assert 'block_00' in params and 'block_01' not in params


def test_the_head_starts_near_zero_and_is_what_it_says():
  head = classifier.Classifier(400, scale=0.001)
  rng = np.random.default_rng(0)
  tokens = rng.normal(2, 3, (2, 5, 64)).astype(np.float32)
  params = head.init(jax.random.key(0), jnp.asarray(tokens))['params']
  kernel = np.asarray(params['head']['kernel'])
  np.testing.assert_allclose(kernel.std(), 0.02 * 0.001, rtol=0.02)
  np.testing.assert_array_equal(params['head']['bias'], 0)
  np.testing.assert_array_equal(params['norm']['scale'], 1)
  params = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params
  )
  mean = tokens.mean(axis=1)
  normed = (mean - mean.mean(1, keepdims=True)) / np.sqrt(
    mean.var(1, keepdims=True) + 1e-6
  )
  given = jax.tree.map(np.asarray, params)
  normed = normed * given['norm']['scale'] + given['norm']['bias']
  logits = normed @ given['head']['kernel'] + given['head']['bias']
  np.testing.assert_allclose(
    head.apply({'params': params}, jnp.asarray(tokens)), logits, atol=1e-4
  )


def test_held_out_videos_are_validated_once_and_never_trained_on(
  videos, tmp_path
):
  c = config_of(videos, tmp_path)
  listed = finetune_videos.find(c)
  filled = finetune_start.fill(c, listed)
  clips = pipeline.make(filled.data.to_dict(), batch_size=16, seed=0)
  stream = clips.iterator()
  trained = [next(stream) for _ in range(3 * listed.count // 8)]
  clips.close()
  seen = {int(i) for batch in trained for i in batch['index']}
  passed = finetune_videos.one_view(filled, listed)
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
  model = finetuned.load(config.workdir)
  listed = finetune_videos.find(config_of(videos, config.workdir))
  found = []
  for devices, size in ((1, 4), (2, 8)):
    mesh = jax.make_mesh(
      (1, devices),
      ('data', 'fsdp'),
      devices=jax.devices()[:devices],
      axis_types=sharding.AUTO,
    )
    c = config_of(videos, config.workdir, test_batch_size=size)
    c.finetune.update(dict(sampling='interleaved', clips=2, views=3))
    place = jax.device_put(model.params, sharding.replicated(mesh))
    clips = finetune_videos.all_views(c, listed)
    # Every video by its number and view; a second time would be an error.
    counted = finetuned.count(
      model.phase, place, finetune.job_lib.voting(clips, 1, 2), 6, mesh
    )
    clips.close()
    found.append((counted.loss(), *counted.predictions()))
  assert len(found[0][1]) == 15
  for a, b in zip(*found, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


PAGES = {
  'finetune_k400.py': ['', 'S', 'B', 'L', 'H'],
  'finetune_ssv2.py': ['', 'S', 'B', 'L', 'H'],
  'finetune_ucf101.py': ['', 'own'],
  'finetune_hmdb51.py': ['', 'S', 'B'],
  'finetune_fast.py': [''],
}
# Learning rate, flip, sampling, epochs, clips along a test video.
ROWS = {
  'finetune_k400.py:S': (7.5e-4, True, 'window', 150, 5),
  'finetune_k400.py:B': (7.5e-4, True, 'window', 75, 5),
  'finetune_k400.py:L': (2e-3, True, 'window', 50, 5),
  'finetune_k400.py:H': (1e-3, True, 'window', 50, 5),
  'finetune_ssv2.py:S': (1.5e-3, False, 'scattered', 40, 2),
  'finetune_ssv2.py:B': (7.5e-4, False, 'scattered', 30, 2),
  'finetune_ssv2.py:L': (5e-4, False, 'scattered', 30, 2),
  'finetune_ssv2.py:H': (2.5e-4, False, 'scattered', 30, 2),
  'finetune_ucf101.py': (2.5e-4, True, 'window', 100, 5),
  'finetune_hmdb51.py:B': (5e-4, True, 'window', 50, 5),
  'finetune_hmdb51.py:S': (5e-4, True, 'window', 50, 10),
}


@pytest.mark.parametrize(
  'spec', [f'{p}:{v}' if v else p for p, vs in PAGES.items() for v in vs]
)
def test_pages_hold_the_published_values(spec):
  _, c = config_lib.load(f'configs/{spec}')
  assert c.job == 'finetune'
  c.method.classes = 7
  finetune_start.set_steps(c, 100)
  method = methods.build(
    c.method, options.spec(c.data).shape, encoders.module_of
  )
  (span,) = run_lib.spans(method)
  assert span.end == 100 * c.finetune.epochs
  if spec not in ROWS:
    return
  lr, flip, sampling, epochs, clips = ROWS[spec]
  rate = optimizer.learning_rate(
    c.optim, optimizer.horizon(span.phase, 0, (0, span.end)), c.batch_size
  )
  np.testing.assert_allclose(rate(0), 0, atol=1e-12)
  np.testing.assert_allclose(rate(500), lr, rtol=1e-5)
  end = c.optim.lr_end * lr / c.optim.lr
  np.testing.assert_allclose(rate(span.end), end, rtol=1e-2)
  found = c.data.flip, c.data.sampling, c.finetune.epochs, c.finetune.clips
  assert found == (flip, sampling, epochs, clips)
  assert c.data.repeats == 2 and c.data.repeat_frames == 'shared'
  assert c.finetune.views == 3 and c.optim.clip == 0
  assert f'= {lr:g};' in finetune_start.describe_lr(c)


@pytest.mark.parametrize('page', PAGES)
def test_pages_refuse_other_variants(page):
  with pytest.raises(ValueError, match=f'{page}: found :nonsense'):
    config_lib.load(f'configs/{page}:nonsense')


def test_wrong_knobs_and_lists_are_named(videos, tmp_path):
  train = (str(videos / 'train'),)
  for change, message in (
    ({'test': train}, 'train and test name the same videos'),
    ({'valid': train}, 'train and valid name the same videos'),
    ({'holdout': 0.0}, r'finetune\.holdout: found 0\.0'),
    ({'batch_size': 64}, r'at most the \d\d videos'),
    ({'train': (str(videos / 'train' / 'red'),)}, 'have no labels'),
  ):
    with pytest.raises(ValueError, match=message):
      finetune.evaluate(config_of(videos, tmp_path, **change))
  with pytest.raises(ValueError, match=r'config\.workdir is empty'):
    finetune.evaluate(config_of(videos, ''))
  with pytest.raises(ValueError, match=r'found no run\.json'):
    finetuned.load(str(tmp_path))


def test_plans_say_what_each_job_does(videos, tmp_path, capsys):
  given = encoder_of()
  weights.export(given.module, given.params, tmp_path, video=SHAPE)
  small = ['--config.data.frames=4', '--config.data.size=(16, 16)']

  def plan(page, *flags):
    status = main.main([f'--config=configs/{page}', *small, *flags, '--plan'])
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
