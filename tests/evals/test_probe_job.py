"""The job `probe` from video files to the report, with a tiny encoder."""

import json

import jax
import numpy as np
import pytest

from vssl_jax import config as config_lib
from vssl_jax import encoder as encoder_lib
from vssl_jax.data.tools import synthetic
from vssl_jax.evals import features
from vssl_jax.evals.probe import job, train_heads
from vssl_jax.models import vit

COLOURS = {'blue': (40, 40, 200), 'green': (40, 200, 40), 'red': (200, 40, 40)}


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
  """Folders `train` and `test` of three classes that differ in colour."""
  folder = tmp_path_factory.mktemp('colours')
  rng = np.random.default_rng(0)
  for split, count in (('train', 10), ('test', 6)):
    for name, colour in COLOURS.items():
      (folder / split / name).mkdir(parents=True)
      for i in range(count):
        noise = rng.normal(0, 25, (6, 16, 24, 3))
        video = np.clip(np.asarray(colour) + noise, 0, 255).astype(np.uint8)
        synthetic.encode(folder / split / name / f'{i}.mp4', video, fps=8)
  (folder / 'test' / 'red' / '9.mp4').write_bytes(b'this is no video')
  return folder


@pytest.fixture(autouse=True)
def encoder(monkeypatch):
  module = vit.Vit(
    width=12,
    depth=1,
    num_heads=2,
    mlp_width=24,
    patch=(2, 8, 8),
    positions='none',
    dtype='float32',
  )
  shape = (4, 16, 16, 3)
  params = module.init(jax.random.key(0), np.zeros((1, *shape), np.uint8))
  found = encoder_lib.Encoder(module, params['params'], 'tiny', shape)
  monkeypatch.setattr(encoder_lib, 'load', lambda source: found)
  return found


def config_of(videos, workdir, **probe):
  c = config_lib.default()
  c.workdir, c.encoder = str(workdir), 'tiny'
  c.data.frames, c.data.stride, c.data.size = 4, 1, (16, 16)
  c.data.isolate, c.data.flip = False, False
  c.data.max_bad_fraction = 0.2
  c.probe.train = (str(videos / 'train'),)
  c.probe.test = (str(videos / 'test'),)
  c.probe.batch_size = c.probe.test_batch_size = 8
  c.probe.num_heads, c.probe.dtype, c.probe.epochs = 2, 'float32', 6
  c.probe.lrs, c.probe.wds, c.probe.ks = (3e-2, 3e-3), (0.01,), (1, 5)
  for name, value in probe.items():
    c.probe[name] = value
  return c


CASES = {
  'knn': {'protocol': 'knn'},
  'linear, features kept': {'protocol': 'linear', 'augment': False},
  'linear, several views': {'protocol': 'linear', 'segments': 2, 'views': 3},
  'attentive, several views': {'segments': 2, 'views': 3, 'augment': False},
  'readout, several clips': {
    'protocol': 'readout',
    'width': 16,
    'clips': 2,
    'views': 2,
    'warmup': 2,
    'decay': 'matrices',
    'dropout': 0.1,
  },
}


SLOW = ('attentive, several views', 'readout, several clips')


@pytest.mark.parametrize(
  'name',
  [pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW)) for x in CASES],
)
def test_colours_are_told_apart(name, videos, tmp_path, capsys, encoder):
  before = jax.tree.map(np.asarray, encoder.params)
  assert job.run(config_of(videos, tmp_path, **CASES[name])) == 0
  found = json.loads((tmp_path / 'report.json').read_text())
  assert found['test']['evaluated'] == 18
  assert found['test']['missing'] == 1
  assert found['train']['videos'] == 30
  assert found['classes'] == ['blue', 'green', 'red']
  first = 'k=5' if name == 'knn' else 'selected'
  assert found['results'][first]['accuracy'] > 0.9
  assert ('max' in found['results']) == (name != 'knn')
  assert 0 < found['held_out'] < 10 or name == 'knn'
  text = capsys.readouterr().out
  assert first in text
  assert '18 videos' in text
  assert '1 missing' in text
  jax.tree.map(np.testing.assert_array_equal, before, encoder.params)


def test_labels_mean_the_same_when_the_test_lacks_a_class(videos, tmp_path):
  part = tmp_path / 'part'
  for name in ('green', 'red'):
    (part / name).mkdir(parents=True)
    for path in (videos / 'test' / name).glob('[0-5].mp4'):
      (part / name / path.name).write_bytes(path.read_bytes())
  c = config_of(videos, tmp_path, protocol='knn', test=(str(part),))
  found = job.evaluate(c)
  assert found['test']['evaluated'] == 12
  assert found['results']['k=5']['accuracy'] > 0.9
  # Two of the three classes occur.
  assert (found['test_classes'], found['chance']) == (2, 0.5)


def test_a_run_repeats_itself(videos, tmp_path):
  c = config_of(videos, tmp_path, protocol='linear', epochs=2)
  first, second = job.evaluate(c), job.evaluate(c)
  assert first['history'] == second['history']
  assert first['results'] == second['results']


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'batch_size': 9}, 'multiple of the 8 devices'),
    ({'protocol': 'nearest'}, "found 'nearest'"),
    ({'protocol': 'readout', 'segments': 2}, r'set probe\.clips'),
    ({'protocol': 'readout', 'width': 15}, '15 channels and 2 heads'),
    ({'warmup': 18}, r'probe\.warmup: found 18'),
    ({'decay': 'some'}, "found 'some', wanted one of"),
    ({'lrs': (1e-3,) * 3, 'groups': 2}, 'divisor of the 3 heads'),
  ],
)
def test_wrong_knobs_are_named(change, message, videos, tmp_path):
  with pytest.raises(ValueError, match=message):
    job.evaluate(config_of(videos, tmp_path, **change))


def test_wrong_sources_are_named(videos, tmp_path):
  c = config_of(videos, tmp_path)
  c.encoder = ''
  with pytest.raises(ValueError, match=r'config\.encoder is empty'):
    job.evaluate(c)
  c = config_of(videos, tmp_path, test=(str(videos / 'train'),))
  with pytest.raises(ValueError, match='name the same videos'):
    job.evaluate(c)
  c = config_of(videos, tmp_path, train=(str(videos / 'train' / 'red'),))
  with pytest.raises(ValueError, match='have no labels'):
    job.evaluate(c)


def test_numbers_of_neighbours_fit_the_videos_or_are_refused():
  c = config_lib.default().probe
  assert job._neighbours(c, 200) == (10, 20, 100, 200)
  assert job._neighbours(c, 60) == (10, 20)  # the others: in the report
  with pytest.raises(ValueError, match=r'probe\.ks: .* 1 to the 4 .*=\(4,\)$'):
    job._neighbours(c, 4)
  c.ks = (5, 100)
  with pytest.raises(ValueError, match=r'probe\.ks: found \(5, 100\)'):
    job._neighbours(c, 60)


def test_test_videos_without_labels_are_named_before_anything_runs(
  videos, tmp_path
):
  rows = sorted((videos / 'test' / 'red').glob('[0-5].mp4'))
  (tmp_path / 'list.txt').write_text(''.join(f'{row}\n' for row in rows))
  c = config_of(videos, tmp_path, test=(str(tmp_path / 'list.txt'),))
  with pytest.raises(ValueError, match=r'probe\.test: none of the videos of'):
    job.evaluate(c)


def test_videos_without_labels_are_not_trained_on(
  videos, tmp_path, monkeypatch
):
  rows = sorted((videos / 'train').rglob('*.mp4'))
  text = [f'{x},{x.parent.name if i % 2 else ""}' for i, x in enumerate(rows)]
  (tmp_path / 'list.csv').write_text('\n'.join(['path,label', *text]))
  c = config_of(videos, tmp_path, train=(str(tmp_path / 'list.csv'),))
  found = job._job(c)
  out = train_heads.held_out(np.arange(30), 0.1)
  assert found.trained_on(30) == sum(i % 2 and not x for i, x in enumerate(out))
  # Refused before anything is encoded.
  monkeypatch.setattr(features, 'encode_batches', None)
  for augment in (True, False):
    c.probe.augment, c.probe.holdout = augment, 0.999
    with pytest.raises(ValueError, match=r'probe\.holdout: found 0\.999'):
      job.evaluate(c)


def test_features_too_large_to_keep_are_refused(videos, tmp_path, monkeypatch):
  monkeypatch.setattr(features, 'MAX_TABLE_BYTES', 1000)
  c = config_of(videos, tmp_path, augment=False)
  with pytest.raises(ValueError, match=r'probe\.augment=True'):
    job.evaluate(c)
