"""The batch of a step is a function of seed and step alone."""

import collections
import hashlib
import os

import grain
import jax
import numpy as np
import pytest

from vssl_jax.data import batching, pipeline
from vssl_jax.data.clips import clip_spec, decode
from vssl_jax.data.sources import example as example_lib
from vssl_jax.data.sources import holdout, source


def fingerprints(batches):
  return [_hash(batch) for batch in batches]


def _hash(batch):
  state = hashlib.sha256()
  for name in sorted(batch):
    state.update(f'{name}{batch[name].dtype}{batch[name].shape}'.encode())
    state.update(np.ascontiguousarray(batch[name]).tobytes())
  return state.hexdigest()


def take(config, steps, *, start=0, size=8, seed=5, processes=1, **options):
  """Global batches of some steps, put together from those of processes."""
  parts = []
  for process in range(processes):
    clips = pipeline.make(
      config, batch_size=size, seed=seed, process_index=process,
      process_count=processes, **options,
    )  # fmt: skip
    stream = clips.iterator(start)
    parts.append([_copied(next(stream)) for _ in range(steps)])
    stream.close()
    clips.close()
  return [
    {name: np.concatenate([b[name] for b in row]) for name in row[0]}
    for row in zip(*parts, strict=True)
  ]


def _copied(batch):
  return {name: np.array(value) for name, value in batch.items()}


@pytest.fixture
def reference(data_config):
  return fingerprints(take(data_config, 6))


def test_hosts_do_not_matter(data_config, reference):
  for processes in (2, 4):
    found = take(data_config, 6, processes=processes)
    assert fingerprints(found) == reference


def test_workers_do_not_matter(data_config, reference):
  for workers in (1, 3):
    data_config.workers = workers
    assert fingerprints(take(data_config, 6)) == reference


def test_isolated_readers_do_not_matter(data_config, reference):
  data_config.isolate = True
  data_config.decode_processes = 3
  assert fingerprints(take(data_config, 6)) == reference


def test_restarts_do_not_matter(data_config, reference):
  for start in (1, 4):
    found = take(data_config, 6 - start, start=start)
    assert fingerprints(found) == reference[start:]


def test_seeds_do_matter(data_config, reference):
  assert not set(fingerprints(take(data_config, 6, seed=6))) & set(reference)


@pytest.mark.slow
def test_ids_of_a_thousand_batches(clips_folder, data_config):
  """The numbers alone, over hosts, workers and restarts (R6)."""
  data_config.frames, data_config.size = 1, (2, 2)
  data_config.stride = 1
  numbers = lambda **k: [
    b['index'].tolist() for b in take(data_config, size=4, **k)
  ]
  expected = numbers(steps=1000)
  assert numbers(steps=1000, processes=2) == expected
  assert numbers(steps=400, start=600, processes=4) == expected[600:]
  data_config.workers = 3
  assert numbers(steps=1000) == expected


def test_batches_look_as_promised(data_config):
  (batch,) = take(data_config, 1)
  clips = pipeline.make(data_config, batch_size=8, seed=0)
  kinds = {name: (v.shape, v.dtype.name) for name, v in batch.items()}
  assert kinds == {
    'video': ((8, 4, 16, 16, 3), 'uint8'),
    'index': ((8,), 'int32'),
    'repeat': ((8,), 'int32'),
    'substituted': ((8,), 'bool'),
    'label': ((8,), 'int32'),
    'crop': ((8, 4), 'float32'),
    'flip': ((8,), 'bool'),
  }
  assert {k: v.shape[1:] for k, v in batch.items()} == clips.shapes
  assert clips.classes == ['left', 'right'] and clips.num_examples == 10
  # Files are sorted: left/0 left/2 ... right/1 right/3 ..., and the pictures
  # of file n start at grey 9 n.
  number = batch['index'] % 5 * 2 + batch['label']
  grey = batch['video'].mean(axis=(2, 3, 4))
  start = grey[:, 0] - 9 * number
  assert (batch['label'] == batch['index'] // 5).all()
  assert start.min() > -2 and (start < 20 + number).all()
  np.testing.assert_allclose(np.diff(grey, axis=1), 2, atol=1.5)


def test_every_epoch_is_a_new_order_of_other_videos(data_config):
  batches = take(data_config, 40, size=4)
  epochs = [
    np.concatenate([b['index'] for b in batches[i : i + 2]])
    for i in range(0, 40, 2)
  ]
  for epoch in epochs:  # 10 videos, 2 whole batches of 4
    assert len(set(epoch.tolist())) == 8
  assert len({tuple(epoch) for epoch in epochs}) > 15
  counts = np.bincount(np.concatenate(epochs), minlength=10)
  assert counts.min() > 8  # of 20; no video is left out for good
  assert pipeline.make(data_config, batch_size=4, seed=0).distinct
  assert not pipeline.make(data_config, batch_size=12, seed=0).distinct


@pytest.mark.slow
def test_no_batch_holds_a_video_twice(tmp_path, data_config):
  """As rows need it: 50 videos, 1,000 batches of 16, which is 333 epochs."""
  for number in range(50):
    (tmp_path / f'{number}.mp4').touch()
  data_config.source = str(tmp_path)
  order, distinct = pipeline._order(
    pipeline.find(data_config), np.arange(50), (), 0, 16
  )
  batches = order.batch(16)
  seen = np.zeros(50, int)
  for step in range(1000):
    index = batches[step]
    assert len(index) == 16 and len(set(index.tolist())) == 16
    seen[index] += 1
  assert distinct and seen.min() > 280  # of 320


def test_box_and_flip_say_where_pixels_come_from(tmp_path, film, data_config):
  for number in range(16):
    film(
      tmp_path / f'{number}.mkv', frames=4, codec='ffv1', pix_fmt='bgr0',
      picture=_columns,
    )  # fmt: skip
  data_config.source, data_config.flip = str(tmp_path), True
  (batch,) = take(data_config, 1, size=16)
  assert 0 < batch['flip'].sum() < 16
  x = (np.arange(16) + 0.5) / 16
  for video, box, flip in zip(
    batch['video'], batch['crop'], batch['flip'], strict=True
  ):
    columns = box[1] + (box[3] - box[1]) * (1 - x if flip else x)
    found = (video[0, :, :, 0].mean(axis=0) / 3 + 0.5) / 64
    np.testing.assert_allclose(found[1:-1], columns[1:-1], atol=0.02)


def _columns(number, height, width):
  row = 3 * np.arange(width, dtype=np.uint8)
  return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def test_repeats_stay_together(data_config):
  data_config.repeats = 2
  (batch,) = take(data_config, 1)
  assert batch['repeat'].tolist() == [0, 1] * 4
  assert (batch['index'][::2] == batch['index'][1::2]).all()
  assert len(set(batch['index'].tolist())) == 4
  assert (batch['crop'][::2] != batch['crop'][1::2]).any(axis=1).all()
  halves = take(data_config, 1, processes=2)
  assert fingerprints(halves) == fingerprints([batch])
  with pytest.raises(ValueError, match='multiple of 1 processes times 2'):
    pipeline.make(data_config, batch_size=7, seed=0)


def test_mixes_keep_their_shares(tmp_path, film, clips_folder, data_config):
  for number in range(3):
    film(tmp_path / f'{number}.mp4', frames=12)
  data_config.source = f'{clips_folder},{tmp_path}'
  data_config.weights = (1.0, 3.0)
  batches = take(data_config, 20)
  second = [(b['index'] >= 10).sum() for b in batches]
  assert sum(second) == 120 and min(second) >= 5  # of 8, 6 on average
  assert fingerprints(batches[4:6]) == fingerprints(
    take(data_config, 2, start=4, processes=2)
  )
  data_config.weights = (1.0,)
  with pytest.raises(ValueError, match='one positive number for each of the 2'):
    take(data_config, 1)


def test_a_source_that_is_held_out_whole_is_named(
  tmp_path, film, clips_folder, data_config
):
  film(tmp_path / 'only.mp4', frames=12)
  data_config.source = f'{clips_folder},{tmp_path}'
  data_config.weights, data_config.holdout = (1.0, 3.0), 0.5
  assert holdout.held_out(np.asarray([10]), 0.5)
  with pytest.raises(ValueError, match='none of the 1 videos of source 2'):
    take(data_config, 1)
  data_config.weights = ()
  assert take(data_config, 1)


def test_two_streams_of_one_object_are_the_same(data_config):
  clips = pipeline.make(data_config, batch_size=4, seed=1)
  one, two = clips.iterator(), clips.iterator()
  for _ in range(3):
    assert fingerprints([next(one)]) == fingerprints([next(two)])
  clips.close()
  assert next(one, None) is None and next(two, None) is None
  with pytest.raises(RuntimeError, match='closed'):
    next(clips.iterator())


class Spy:
  """A source that tells, in its labels, what it finds in its process."""

  classes = None
  fingerprint = 'spy'

  def __len__(self):
    return 8

  def item(self, index):
    from jax._src import xla_bridge

    started = xla_bridge.backends_are_initialized()
    return example_lib.Item(str(os.getpid()), b'', 1 + int(started))


class Blind(batching.Loader):
  """Loads no pixels."""

  def _read(self, index, entropy, out):
    item = self.source.item(index)
    found = clip_spec.Clips(
      out, np.zeros((1, 4), np.float32), np.zeros(1, bool)
    )
    return item, found


def test_no_device_is_touched_in_a_worker():
  jax.devices()  # initialised here, at least
  pipeline.parse_flags()
  spec = clip_spec.Spec(frames=1, stride=1, height=2, width=2)
  loader = Blind(Spy(), spec, batching.Policy(isolate=False))
  requests = grain.MapDataset.range(4).map(_ticket).batch(2)
  stream = batching.stream(requests, loader, 1, 1)
  assert next(stream)['label'].tolist() == [1, 1]
  stream.close()
  loader.close()


def _ticket(index):
  return np.asarray([index, 0])


def test_readers_import_no_jax():
  import subprocess
  import sys

  code = (
    'import sys; from vssl_jax.data.clips import read_clip; '
    'print("jax" in sys.modules)'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], check=True, capture_output=True, text=True
  )
  assert done.stdout.strip() == 'False'


def test_the_report_counts(data_config):
  clips = pipeline.make(data_config, batch_size=4, seed=1)
  stream = clips.iterator()
  assert clips.describe() == 'no clips were read yet' and not clips.advice()
  for _ in range(4):
    next(stream)
  report = clips.report()
  assert report['data/readers'] == 2 and report['data/bad_files'] == 0
  assert report['data/decode_clips_per_s'] > 0
  assert 0 < report['data/wait_fraction'] <= 1
  # All time went by waiting, as nothing else was done here.
  assert report['data/wait_fraction'] > 0.5
  assert clips.advice().startswith('data bound') and 'prepare' in clips.advice()
  assert collections.Counter(clips.describe())['%'] == 1
  clips.close()


def test_a_wrong_list_of_videos_stops_at_once(tmp_path, data_config):
  data_config.source = str(tmp_path / 'nothing')
  with pytest.raises(FileNotFoundError, match='nothing at'):
    pipeline.make(data_config, batch_size=4, seed=1)
  data_config.source = ''
  with pytest.raises(FileNotFoundError, match='empty'):
    pipeline.make(data_config, batch_size=4, seed=1)


def test_sources_and_errors_travel_between_processes(clips_folder):
  import pickle

  found = pickle.loads(pickle.dumps(source.find(clips_folder)))
  assert found.item(0).name == 'left/0.mp4'
  error = pickle.loads(pickle.dumps(decode.VideoError('io', 'x')))
  assert (error.reason, error.detail) == ('io', 'x')
