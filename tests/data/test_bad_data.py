"""Bad media neither stop nor silently shrink a run (promises R8 and R14)."""

import json
import os
import time

import av
import numpy as np
import pytest
from PIL import Image

from tests.data import test_decode
from vssl_jax.data import batching, pipeline, read_stats
from vssl_jax.data.clips import clip_spec, decode, read_clip

DAMAGES = {
  'missing': lambda path, data: path.unlink(),
  'empty': lambda path, data: path.write_bytes(b''),
  'unreadable': lambda path, data: path.write_bytes(b'no video\n' * 99),
  'undecodable': lambda path, data: path.write_bytes(data[: len(data) // 3]),
  'no_video': lambda path, data: _sound(path),
  'wrong_extension': lambda path, data: _picture(path),
  'too_large': lambda path, data: data,  # written by the fixture
}


def _sound(path):
  with av.open(str(path), 'w') as container:
    stream = container.add_stream('aac', rate=16000)
    silence = av.AudioFrame.from_ndarray(
      np.zeros((1, 16000), np.float32), 'fltp', 'mono'
    )
    silence.sample_rate, silence.pts = 16000, 0
    container.mux(stream.encode(silence))
    container.mux(stream.encode())


def _picture(path):
  Image.new('RGB', (32, 32), (9, 99, 200)).save(str(path), 'jpeg')


@pytest.fixture(scope='module')
def damaged(tmp_path_factory, film):
  """140 videos, 7 of them (5 %) bad in 7 ways; and the list of those."""
  import pathlib

  root = tmp_path_factory.mktemp('damaged')
  good = film(
    root / 'x.mp4', frames=12, gop=3, height=16, width=16,
    options={'movflags': 'faststart'},
  )  # fmt: skip
  content = pathlib.Path(good).read_bytes()
  os.unlink(good)
  bad = {}
  for number in range(140):
    (root / f'{number:03}.mp4').write_bytes(content)
  manifest = root / 'all.txt'
  manifest.write_text(''.join(f'{n:03}.mp4 {n}\n' for n in range(140)))
  for place, (reason, damage) in enumerate(DAMAGES.items()):
    number = 3 + 19 * place
    damage(root / f'{number:03}.mp4', content)
    if reason == 'too_large':
      film(root / f'{number:03}.mp4', frames=2, height=640, width=640)
    bad[number] = reason
  return str(manifest), bad


@pytest.fixture
def damaged_config(damaged, data_config):
  data_config.source = damaged[0]
  data_config.frames, data_config.stride = 12, 1
  data_config.size = (8, 8)
  data_config.max_pixels = 600 * 600
  return data_config


def epoch(config, folder, batch_size=20, **options):
  clips = pipeline.make(
    config, batch_size=batch_size, seed=2, folder=str(folder), **options
  )
  stream = clips.iterator()
  batches = [next(stream) for _ in range(clips.num_examples // batch_size)]
  report = clips.report()
  clips.close()
  return batches, report


def test_every_bad_video_is_listed_and_replaced(
  damaged, damaged_config, tmp_path
):
  _, bad = damaged
  batches, report = epoch(damaged_config, tmp_path)
  with open(tmp_path / 'bad_files.jsonl', encoding='utf-8') as file:
    entries = [json.loads(line) for line in file]
  reasons = {entry['index']: entry['reason'] for entry in entries}
  expected = {
    k: {'too_large': 'wrong_extension'}.get(v, v) for k, v in bad.items()
  }
  expected[max(bad)] = 'too_large'
  assert reasons == expected
  assert all(entry['file'] == f'{entry["index"]:03}.mp4' for entry in entries)
  assert all(entry['detail'] for entry in entries)
  assert report['data/bad_files'] == report['data/substituted'] == 7
  index = np.concatenate([b['index'] for b in batches])
  gone = np.concatenate([b['substituted'] for b in batches])
  labels = np.concatenate([b['label'] for b in batches])
  video = np.concatenate([b['video'] for b in batches])
  assert (index[gone] == 140).all() and gone.sum() == 7
  assert sorted(index[~gone].tolist()) == sorted(set(range(140)) - set(bad))
  assert (labels[~gone] == index[~gone]).all()
  # The substitute is a real clip with its own label.
  assert not set(labels[gone].tolist()) & {*bad, -1}
  assert (video[gone].max(axis=(1, 2, 3, 4)) > 50).all()


def test_the_substitute_is_the_same_every_time(damaged_config, tmp_path):
  one, _ = epoch(damaged_config, tmp_path / '1')
  damaged_config.workers = 2
  two, _ = epoch(damaged_config, tmp_path / '2')
  for a, b in zip(one, two, strict=True):
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


def test_a_restart_lists_no_video_twice(damaged_config, tmp_path):
  for _ in range(2):
    epoch(damaged_config, tmp_path)
  with open(tmp_path / 'bad_files.jsonl', encoding='utf-8') as file:
    assert len(file.readlines()) == 7


def test_too_many_bad_videos_stop_the_run(damaged_config, tmp_path):
  damaged_config.max_bad_fraction = 0.049
  with pytest.raises(read_stats.TooManyBadFiles) as caught:
    epoch(damaged_config, tmp_path)
  assert '7 of all 140 videos cannot be read' in str(caught.value)
  assert 'allows 0.049' in str(caught.value)
  assert str(tmp_path / 'bad_files.jsonl') in str(caught.value)


def test_many_bad_draws_stop_the_run_before_all_are_seen():
  books = read_stats.ReadStats(
    examples=10**6, max_bad_fraction=0.05, path=None, readers=1
  )
  take = lambda first, bad: books.take(
    {
      'index': np.zeros(32, np.int32),
      'substituted': np.arange(32) < bad,
      batching.NOTES: _notes(range(first, first + bad)),
    },
    0.0,
  )
  take(0, 6)  # 6 of 32 are too few to judge by
  take(100, 4)  # 10 of 64: 3.2 + 4 * 1.74 = 10.2 are allowed
  with pytest.raises(read_stats.TooManyBadFiles, match='18 of 96 videos drawn'):
    take(200, 8)


def _notes(bad):
  failures = [
    {'index': i, 'wanted': i, 'file': f'{i}', 'reason': 'io', 'detail': 'x'}
    for i in bad
  ]
  notes = {'failures': failures, 'lost': [], 'short': 0, 'seconds': 1.0}
  return np.frombuffer(json.dumps({**notes, 'videos': 32}).encode(), np.uint8)


def test_a_run_of_bad_substitutes_ends(tmp_path, data_config):
  for number in range(30):
    (tmp_path / f'{number}.mp4').write_bytes(b'nothing')
  data_config.source = str(tmp_path)
  data_config.max_bad_fraction = 1.0
  with pytest.raises(read_stats.TooManyBadFiles, match='no substitute'):
    epoch(data_config, tmp_path)


class Moody:
  """A disk that fails at first."""

  classes, fingerprint = None, 'moody'

  def __init__(self, path, failures):
    self.path, self.failures = path, failures

  def __len__(self):
    return 1

  def item(self, index):
    from vssl_jax.data.sources import example as example_lib

    if self.failures:
      self.failures -= 1
      raise decode.VideoError('io', 'stale file handle')
    return example_lib.Item('x', self.path)


def test_errors_of_the_disk_are_tried_again(tmp_path, film):
  path = film(tmp_path / 'x.mp4', frames=8)
  spec = clip_spec.Spec(frames=2, height=8, width=8)
  policy = batching.Policy(isolate=False, retries=2, max_substitutes=0)
  for failures, lost in ((2, False), (3, True)):
    loader = batching.Loader(Moody(path, failures), spec, policy)
    batch = loader(np.asarray([[0, 1]]))
    assert bool(batch['substituted'][0]) == lost
    loader.close()


# A reader that hangs, aborts, eats memory or has a bug on files of that name.
WORKER_PROGRAM = """
import os, time
from vssl_jax.data.clips import clip_spec, read_clip
read = clip_spec.read
def bad_read(media, *rest):
  name = os.path.basename(media)
  if 'hang' in name: time.sleep(3600)
  if 'abort' in name: os.abort()
  if 'greedy' in name: bytearray(2 ** 31)
  if 'bug' in name: raise KeyError('a bug')
  return read(media, *rest)
clip_spec.read = bad_read
read_clip.main()
"""


@pytest.fixture
def readers(monkeypatch):
  monkeypatch.setattr(read_clip, 'WORKER_PROGRAM', WORKER_PROGRAM)
  spec = clip_spec.Spec(frames=2, stride=1, height=8, width=8)
  found = read_clip.Readers(
    spec, isolate=True, deadline_s=60, memory_limit_mb=256
  )
  yield found
  found.close()


def test_readers_that_hang_or_die_are_replaced(readers, film, tmp_path):
  good = film(tmp_path / 'good.mp4', frames=4)
  out = np.zeros((1, 2, 8, 8, 3), np.uint8)
  expected = clip_spec.read(good, readers._spec, [1])
  for name, reason in (
    ('hang.mp4', 'timeout'),
    ('abort.mp4', 'died'),
    ('greedy.mp4', 'memory'),
    ('none.mp4', 'missing'),
  ):
    # Only what hangs waits for the deadline, however busy the machine is.
    readers.pool.deadline_s = 2 if reason == 'timeout' else 60
    start = time.perf_counter()
    with pytest.raises(decode.VideoError) as caught:
      readers.read(name, [1], out)
    assert caught.value.reason == reason
    assert time.perf_counter() - start < 30
    found = readers.read(good, [1], out)  # another reader is at work
    np.testing.assert_array_equal(out, expected.video)
    np.testing.assert_array_equal(found.crop, expected.crop)
  with pytest.raises(RuntimeError, match='a bug'):
    readers.read('bug.mp4', [1], out)


def test_a_batch_survives_readers_that_hang_and_abort(
  monkeypatch, film, tmp_path, data_config
):
  monkeypatch.setattr(read_clip, 'WORKER_PROGRAM', WORKER_PROGRAM)
  for number in range(10):
    name = {3: 'hang', 7: 'abort'}.get(number, number)
    film(tmp_path / 'v' / f'{name}.mp4', frames=8)
  data_config.source = str(tmp_path / 'v')
  data_config.isolate, data_config.deadline_s = True, 4.0
  data_config.max_bad_fraction = 0.2
  start = time.perf_counter()
  _, report = epoch(data_config, tmp_path, batch_size=5)
  assert time.perf_counter() - start < 60
  assert report['data/bad_files'] == 2
  with open(tmp_path / 'bad_files.jsonl', encoding='utf-8') as file:
    reasons = {json.loads(line)['reason'] for line in file}
  assert reasons == {'timeout', 'died'}


def test_a_reader_that_cannot_start_is_an_error(monkeypatch):
  monkeypatch.setattr(read_clip, 'WORKER_PROGRAM', 'raise SystemExit(3)')
  spec = clip_spec.Spec(frames=1, stride=1, height=8, width=8)
  found = read_clip.Readers(
    spec, isolate=True, deadline_s=1, memory_limit_mb=64
  )
  with pytest.raises(RuntimeError, match='ended with 3'):
    found.read('x.mp4', [1], np.zeros((1, 1, 8, 8, 3), np.uint8))
  found.close()


def test_closing_ends_readers_at_work(readers):
  import threading

  caught = []

  def hang():
    try:
      readers.read('hang.mp4', [1], np.zeros((1, 2, 8, 8, 3), np.uint8))
    except decode.VideoError as error:
      caught.append(error.reason)

  thread = threading.Thread(target=hang)
  readers.pool.deadline_s = 600
  start = time.perf_counter()
  thread.start()
  while not readers.pool.alive:
    time.sleep(0.01)
  readers.stop()
  thread.join(60)
  assert caught == ['died'] and time.perf_counter() - start < 60


def test_hostile_files_cost_little(film, tmp_path):
  """100k x 100k and 10^9 frames: refused long before the deadline, in 1 GiB."""
  spec = clip_spec.Spec(frames=4, stride=2, height=16, width=16)
  readers = read_clip.Readers(
    spec, isolate=True, deadline_s=60, memory_limit_mb=1024
  )
  out = np.zeros((1, *spec.shape), np.uint8)
  good = film(tmp_path / 'good.mp4', options={'movflags': 'faststart'})
  readers.read(good, [0], out)
  with open(good, 'rb') as file:
    content = test_decode.endless(file.read())
  hostile = {
    'large.png': test_decode.png_header(100_000),
    'larger.png': test_decode.png_header(16_000),
    'endless.mp4': content,
    'list.m3u8': b'#EXTM3U\n#EXTINF:1,\n/etc/hostname\n',
    'list.mp4': f"ffconcat version 1.0\nfile '{good}'\n".encode(),
  }
  for name, data in hostile.items():
    path = tmp_path / name
    path.write_bytes(data)
    start = time.perf_counter()
    with pytest.raises(decode.VideoError):
      readers.read(str(path), [0], out)
    assert time.perf_counter() - start < 10, name
  (child,) = readers.pool.alive
  with open(f'/proc/{child.process.pid}/status', encoding='ascii') as file:
    peak = [line.split()[1] for line in file if line.startswith('VmHWM')]
  assert int(peak[0]) < 2**20  # KiB
  readers.close()
