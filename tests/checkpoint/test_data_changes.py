"""A run is resumed on the videos that it was started with, or says so."""

import json
import shutil

import pytest

from tests.train import small_runs
from vssl_jax.checkpoint import data_changes, integrity
from vssl_jax.data import pipeline
from vssl_jax.data.sources import source
from vssl_jax.train import loop
from vssl_jax.train import run as run_lib


@pytest.fixture(scope='module')
def finished(clips, tmp_path_factory):
  """A run of one phase and two steps."""
  workdir = tmp_path_factory.mktemp('finished') / 'run'
  config = small_runs.tiny_config(clips, workdir)
  config.method.phases = ('pixel_teacher',)
  config.method.pixel_teacher.steps = 2
  assert loop.train(config) == 0
  return workdir


@pytest.fixture
def resumed(clips, finished, tmp_path):
  """The run's config and folder, and its videos, all copied."""
  videos = shutil.copytree(clips, tmp_path / 'videos')
  workdir = shutil.copytree(finished, tmp_path / 'run')
  config = small_runs.tiny_config(videos, workdir)
  config.method.phases = ('pixel_teacher',)
  config.method.pixel_teacher.steps = 2
  config.checkpoint.may_change = (*config.checkpoint.may_change, 'data.source')
  return config, videos, workdir


def record(workdir):
  return json.loads((workdir / 'run.json').read_text())


def change(videos):
  """Removes two videos, replaces one and adds three."""
  files = sorted(videos.rglob('*.mp4'))
  files[0].unlink()
  files[1].unlink()
  files[2].write_bytes(files[3].read_bytes() + b'x')
  for number in range(3):
    shutil.copy(files[4], files[4].parent / f'new {number}.mp4')


@pytest.mark.slow
def test_a_copy_of_the_videos_is_the_same(resumed):
  config, _, workdir = resumed
  assert loop.train(config) == 0
  assert record(workdir)['data_changes'] == []


@pytest.mark.slow
def test_changed_videos_are_refused_or_recorded(resumed):
  config, videos, workdir = resumed
  before = (workdir / 'run.json').read_bytes()
  change(videos)
  with pytest.raises(run_lib.TrainingError) as caught:
    loop.train(config)
  text = str(caught.value)
  assert (
    '40 videos then, 41 videos now' in text and 'data.allow_change=True' in text
  )
  for part in ('3 added (', 'new 0.mp4', '2 missing (', '1 changed ('):
    assert part in text, part
  assert (workdir / 'run.json').read_bytes() == before
  config.data.allow_change = True
  assert loop.train(config) == 0
  (entry,) = record(workdir)['data_changes']
  assert entry['step'] == 2 and '3 added' in entry['change']
  assert record(workdir)['num_examples'] == 41
  # What was allowed and recorded is what the run goes on with.
  config.data.allow_change = False
  assert loop.train(config) == 0
  assert len(record(workdir)['data_changes']) == 1


@pytest.mark.slow
def test_a_lost_list_of_videos_costs_only_the_names(resumed):
  config, videos, workdir = resumed
  path = workdir / data_changes.FILE
  path.write_bytes(path.read_bytes()[:100])
  assert loop.train(config) == 0  # and writes it anew
  assert len(data_changes._load(workdir, record(workdir)['data_fingerprint']))
  change(videos)
  path.unlink()
  with pytest.raises(run_lib.TrainingError, match='which ones is unknown'):
    loop.train(config)
  # An older version hashed something else, in the record and the manifests.
  for file in (workdir / 'run.json', *(workdir / 'checkpoints').glob('*.json')):
    old = integrity.load(file) | {'data_fingerprint': '0123456789abcdef'}
    integrity.write_atomic(file, old)
  assert loop.train(config) == 0


def test_added_missing_and_changed_videos_are_named(clips, tmp_path):
  videos = shutil.copytree(clips, tmp_path / 'videos')
  config = small_runs.tiny_config(videos, tmp_path).data
  opened = lambda: pipeline.make(config, batch_size=8, seed=0)
  before = opened()
  record = {'data_fingerprint': before.fingerprint, 'num_examples': 40}
  data_changes.store(tmp_path, before)
  assert not data_changes.compare(tmp_path, record, opened())
  change(videos)
  text = data_changes.compare(tmp_path, record, opened())
  assert text.startswith('40 videos then, 41 videos now: 3 added (')
  assert 'new 0.mp4' in text and '; 2 missing (' in text
  assert '; 1 changed (' in text and 'bytes, now label' in text
  (tmp_path / data_changes.FILE).write_bytes(b'no gzip')
  text = data_changes.compare(tmp_path, record, opened())
  assert 'which ones is unknown' in text
  old = {'data_fingerprint': '0123456789abcdef'}
  assert not data_changes.compare(tmp_path, old, opened())


def test_every_kind_of_change_has_another_hash(tmp_path):
  (tmp_path / 'a').mkdir()
  (tmp_path / 'b').mkdir()
  for name in ('a/1.mp4', 'b/2.mp4', 'b/3.mp4'):
    (tmp_path / name).write_bytes(b'12')
  folder = lambda **kw: source.find(str(tmp_path), **kw).fingerprint
  hashes = [folder(), folder(classes=('b', 'a')), folder(classes='abc')]
  (tmp_path / 'b/2.mp4').write_bytes(b'123')
  hashes.append(folder())
  (tmp_path / 'b/2.mp4').rename(tmp_path / 'a/2.mp4')
  hashes.append(folder())
  (tmp_path / 'x.csv').write_text('a/1.mp4 x\nb/3.mp4 y\n')
  (tmp_path / 'y.csv').write_text('b/3.mp4 y\na/1.mp4 x\n')
  hashes += [
    source.find(str(tmp_path / n)).fingerprint for n in ('x.csv', 'y.csv')
  ]
  assert len(set(hashes)) == len(hashes)
