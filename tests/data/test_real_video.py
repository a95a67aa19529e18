"""What people's files hold, when a folder of such files is at hand.

`$VSSL_TEST_DATA` names a folder with `odd_corrupt/` in it: 48 files, and for
each what a decoder that goes on after errors sees (`expected_pyav*.json`).
"""

import json

import numpy as np
import pytest

from vssl_jax.data import pipeline
from vssl_jax.data.clips import clip_spec, decode


@pytest.fixture(scope='module')
def odd(video_data):
  folder = video_data / 'odd_corrupt'
  (found,) = folder.glob('expected_pyav*.json')
  return folder, json.loads(found.read_text())


def test_every_file_gives_its_frames_or_a_reason(odd):
  folder, expected = odd
  assert len(expected) == 48
  for name, facts in expected.items():
    path = str(folder / name)
    damaged = facts.get('bad_packets') or facts.get('corrupt_flagged')
    try:
      with decode.Video(path) as video:
        count = video.count
        frames = [f for _, f in video.frames(range(count))]
    except decode.VideoError as error:
      reason = error.reason
      if 'open_error' in facts:
        assert reason == ('unreadable' if facts['bytes'] else 'empty'), name
      elif not facts['video_streams']:
        assert reason == 'no_video', name
      elif damaged:
        assert reason == 'undecodable', name
      else:
        assert (name, reason) in (
          ('generated/jpeg_renamed.mp4', 'wrong_extension'),
          ('generated/truncated_half.webm', 'truncated'),
        )
      continue
    assert not damaged, name
    assert count == len(frames) == facts['decoded_frames'], name
    sizes = {(f.width, f.height) for f in frames}
    assert sizes == {tuple(size) for size in facts['sizes']}, name
    assert {f.rotation for f in frames} == {facts['rotation']}, name


def test_any_start_gives_the_same_frames_as_reading_on(odd):
  folder, expected = odd
  for name, facts in expected.items():
    if facts.get('bad_packets') or facts.get('corrupt_flagged'):
      continue
    if facts.get('decoded_frames', 0) < 10 or 'truncated' in name:
      continue
    if name == 'generated/vfr.mp4':  # numbers after a seek are approximate
      continue
    with decode.Video(str(folder / name)) as video:
      for fps in (None, 7.0):
        count = video.count if fps is None else int(video.seconds * fps)
        whole = dict(_stamps(video, range(count), fps))
        start = count * 2 // 3
        assert dict(_stamps(video, range(start, count), fps)) == {
          number: whole[number] for number in range(start, count)
        }, (name, fps)


def _stamps(video, wanted, fps):
  for number, frame in video.frames(wanted, fps):
    yield number, float(frame.to_ndarray(format='gray').mean())


def test_every_readable_file_gives_every_kind_of_clip(odd):
  folder, expected = odd
  spec = clip_spec.Spec(frames=4, stride=2, height=32, width=48, repeats=2)
  seen = 0
  for name, facts in expected.items():
    if facts.get('bad_packets', 1) or facts['corrupt_flagged']:
      continue
    if name.endswith(('jpeg_renamed.mp4', 'truncated_half.webm')):
      continue
    found = clip_spec.read(str(folder / name), spec, [7])
    assert found.video.mean() > 5, name
    # One file changes its size half-way: boxes are fractions, it still reads.
    assert ((found.crop >= 0) & (found.crop <= 1)).all(), name
    seen += 1
  assert seen > 30


def test_a_folder_of_odd_files_trains_and_is_listed(odd, data_config, tmp_path):
  folder, _ = odd
  data_config.source = str(folder)
  data_config.isolate = True
  data_config.max_bad_fraction = 0.3
  clips = pipeline.make(
    data_config, batch_size=24, seed=0, folder=str(tmp_path)
  )
  stream = clips.iterator()
  for _ in range(2):
    batch = next(stream)
    real = batch['video'].reshape(24, -1).max(axis=1)
    assert (real > 20).all()
  assert np.isin(batch['index'], [*range(48), 48]).all()
  with open(tmp_path / 'bad_files.jsonl', encoding='utf-8') as file:
    listed = {json.loads(line)['file'] for line in file}
  certain = (
    'audio_only',
    'empty_0_bytes',
    'one_byte',
    'random_4k',
    'text_renamed',
    'truncated_half_no_moov',
    'jpeg_renamed',
  )
  assert {f'generated/{name}.mp4' for name in certain} <= listed
  clips.close()
