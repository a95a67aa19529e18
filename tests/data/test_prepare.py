"""Videos become shards that hold the same, smaller and quicker to read."""

import io
import json
import os
import re
import subprocess
import sys

import av
import numpy as np
import pytest

from vssl_jax.data import pipeline
from vssl_jax.data.clips import decode
from vssl_jax.data.sources import source
from vssl_jax.data.tools import prepare, transcode

TARGET = transcode.Target(short_side=32, gop=4, quality=1, preset='ultrafast')


def numbers_in(media, numbered):
  with decode.Video(media) as video:
    return [
      (round(time, 3), int(numbered(frame.to_ndarray(format='rgb24'))))
      for time, frame in video.all_frames()
    ]


def test_every_frame_and_its_time_are_kept(tmp_path, film, numbered):
  times = np.cumsum([0.0] + [0.02] * 20 + [0.2] * 10)
  path = film(tmp_path / 'x.mkv', frames=31, times=times, height=48, width=80)
  content = transcode.transcode(path, TARGET)
  found = numbers_in(content, numbered)
  assert [number for _, number in found] == list(range(31))
  np.testing.assert_allclose([t for t, _ in found], times, atol=2e-3)
  with av.open(io.BytesIO(content)) as container:
    stream = container.streams.video[0]
    assert (stream.height, stream.width) == (32, 54)
    keys = [p.is_keyframe for p in container.demux(stream) if p.size]
  assert keys == [number % 4 == 0 for number in range(31)]
  assert not container.streams.audio


def test_a_frame_rate_can_be_set(tmp_path, film, numbered):
  path = film(tmp_path / 'x.mp4', frames=40, rate=20)
  target = transcode.Target(short_side=32, fps=5, quality=1)
  found = numbers_in(transcode.transcode(path, target), numbered)
  assert found == [(k / 5, 4 * k) for k in range(10)]


def test_small_videos_are_not_blown_up(tmp_path, film):
  path = film(tmp_path / 'x.mp4', frames=4, height=20, width=30)
  with decode.Video(transcode.transcode(path, TARGET)) as video:
    (_, frame), *_ = video.all_frames()
  assert (frame.height, frame.width) == (20, 30)


def test_a_source_that_is_not_there_is_one_line(tmp_path, capsys):
  argv = [f'--source={tmp_path}/nope', f'--out={tmp_path}/out']
  assert prepare.main(argv) == 2
  assert 'nothing at' in capsys.readouterr().err
  assert not (tmp_path / 'out').exists()


@pytest.fixture
def raw(tmp_path, film):
  """Seven videos, two of them bad, in two class folders."""
  for number in range(7):
    film(
      tmp_path / 'raw' / 'ab'[number % 2] / f'{number}.mp4', frames=8 + number
    )
  (tmp_path / 'raw' / 'a' / '2.mp4').write_bytes(b'nothing')
  (tmp_path / 'raw' / 'b' / '5.mp4').write_bytes(b'')
  return source.find(str(tmp_path / 'raw'))


def test_shards_train_like_the_folder(raw, tmp_path, data_config):
  out = str(tmp_path / 'out')
  seen = []
  summary = prepare.prepare(
    raw, out, TARGET, shard_videos=3, workers=2,
    progress=lambda result: seen.append(result.name),
  )  # fmt: skip
  names = [raw.item(i).name for i in range(7)]
  assert seen == names  # a/0 a/2 a/4 a/6 b/1 b/3 b/5
  assert summary['written'] == 5 and summary['shards'] == 2  # 3 and 2 videos
  with open(os.path.join(out, prepare.FAILED), encoding='utf-8') as file:
    failed = [json.loads(line) for line in file]
  assert failed == summary['failed']
  assert [(f['file'], f['reason']) for f in failed] == [
    ('a/2.mp4', 'unreadable'),
    ('b/5.mp4', 'empty'),
  ]
  shards = source.find(out)
  items = [shards.item(i) for i in range(len(shards))]
  assert [item.name for item in items] == [
    n for n in names if n not in ('a/2.mp4', 'b/5.mp4')
  ]
  assert [item.label for item in items] == [0, 0, 0, 1, 1]
  data_config.source = out
  clips = pipeline.make(data_config, batch_size=5, seed=0)
  batch = next(clips.iterator())
  assert sorted(batch['index'].tolist()) == [0, 1, 2, 3, 4]
  assert not batch['substituted'].any() and clips.classes == ['a', 'b']
  clips.close()


def test_a_killed_start_goes_on(raw, tmp_path):
  out = str(tmp_path / 'out')

  class Killed(Exception):
    pass

  def kill(result):
    if result.index == 4:
      raise Killed

  options = {'shard_videos': 3, 'workers': 2}
  with pytest.raises(Killed):
    prepare.prepare(raw, out, TARGET, progress=kill, **options)
  seen = []
  summary = prepare.prepare(
    raw, out, TARGET, progress=lambda r: seen.append(r.index), **options
  )
  assert seen == [3, 4, 5, 6]  # the first shard was whole
  assert summary['written'] == 5 and len(summary['failed']) == 2
  assert not [n for n in os.listdir(out) if 'partial' in n]
  assert len(source.find(out)) == 5
  other = transcode.Target(short_side=16)
  with pytest.raises(ValueError, match='short_side was 32, is 16'):
    prepare.prepare(raw, out, other, **options)
  # A report that was cut: its shard is made again.
  (report,) = [n for n in os.listdir(out) if n.startswith('report-00001')]
  with open(os.path.join(out, report), 'r+', encoding='utf-8') as file:
    file.truncate(9)
  del seen[:]
  again = prepare.prepare(
    raw, out, TARGET, progress=lambda r: seen.append(r.index), **options
  )
  assert seen == [3, 4, 5] and again['failed'] == summary['failed']
  with open(os.path.join(out, prepare.SETTINGS), 'w', encoding='utf-8') as file:
    file.write('{"videos": ')
  with pytest.raises(ValueError, match=r'settings\.json: .* are unknown'):
    prepare.prepare(raw, out, TARGET, **options)


def test_the_command(raw, tmp_path):
  del raw
  command = [
    sys.executable, '-m', 'vssl_jax.data.tools.prepare',
    f'--source={tmp_path / "raw"}', f'--out={tmp_path / "out"}',
    '--short_side=24', '--workers=2',
  ]  # fmt: skip
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert re.search(r'5 of 7 videos in 1 shards', done.stdout)
  assert '2 left out (1 unreadable, 1 empty)' in done.stdout
  assert f'--config.data.source={tmp_path / "out"}' in done.stdout
  assert 'a/2.mp4: unreadable' in done.stderr + done.stdout
  assert '7/7' in done.stderr
  shown = prepare._parser().format_help()
  assert '--gop' in shown and 'failed.jsonl' in shown
