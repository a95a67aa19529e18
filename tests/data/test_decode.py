"""Which frames come out of a file, and what is said about files without."""

import struct
import time
import zlib

import numpy as np
import pytest

from vssl_jax.data.clips import decode


def numbers_in(path, wanted, numbered, fps=None):
  with decode.Video(path) as video:
    return [
      (number, int(numbered(frame.to_ndarray(format='rgb24'))))
      for number, frame in video.frames(wanted, fps)
    ]


def flicker(number, height, width):
  return np.full((height, width, 3), number, np.uint8)


def reason_of(media, wanted=(0, 20, 40)):
  with pytest.raises(decode.VideoError) as caught, decode.Video(media) as video:
    list(video.frames(wanted))
  return caught.value.reason


CASES = {
  'short_gop.mp4': {},
  'b_frames.mp4': {'gop': 48, 'b_frames': 3},
  'one_key_frame.mp4': {'gop': 250},
  'mpeg4.avi': {'codec': 'mpeg4'},
  'matroska.mkv': {'b_frames': 2},
  'mpeg2.ts': {'codec': 'mpeg2video'},
  'ffv1.mkv': {'codec': 'ffv1'},
  'fragmented.mp4': {'options': {'movflags': 'frag_keyframe+empty_moov'}},
  'raw.h264': {},
  'fast.mp4': {'rate': 240},
}


@pytest.mark.parametrize('name', CASES)
def test_frames_come_by_number(name, tmp_path, film, numbered):
  path = film(tmp_path / name, **CASES[name])
  with decode.Video(path) as video:
    assert video.count == 48
    assert video.rate == pytest.approx(CASES[name].get('rate', 25))
  for wanted in (range(48), [0], [47], [3, 40], range(21, 48, 4), [30, 31]):
    found = numbers_in(path, wanted, numbered)
    assert found == [(number, number) for number in wanted]


def test_frames_come_by_time(tmp_path, film, numbered):
  path = film(tmp_path / 'x.mp4', rate=24)
  found = numbers_in(path, [0, 3, 8, 15], numbered, fps=8)
  assert found == [(0, 0), (3, 9), (8, 24), (15, 45)]
  found = numbers_in(path, range(4, 12), numbered, fps=48)  # twice each
  assert [b for _, b in found] == [2, 2, 3, 3, 4, 4, 5, 5]


def test_variable_rate_is_read_by_time_stamps(tmp_path, film, numbered):
  times = np.cumsum([0.0] + [0.02] * 20 + [0.2] * 10)
  path = film(tmp_path / 'x.mkv', frames=31, times=times)
  wanted = range(0, 24)
  expected = [(np.searchsorted(times, k / 10 + 1e-6) - 1) for k in wanted]
  found = numbers_in(path, wanted, numbered, fps=10)
  assert [b for _, b in found] == expected
  found = numbers_in(path, range(12, 20), numbered, fps=10)
  assert [b for _, b in found] == expected[12:20]
  strided = [b for _, b in numbers_in(path, range(10, 20, 3), numbered)]
  assert np.diff(strided).tolist() == [3, 3, 3]


def test_the_clock_starts_at_the_first_picture(tmp_path, film, numbered):
  times = 10 + np.arange(48) / 25
  path = film(tmp_path / 'late.mkv', times=times)
  assert numbers_in(path, [0, 30], numbered) == [(0, 0), (30, 30)]
  assert numbers_in(path, [10], numbered, fps=10) == [(10, 25)]


def test_only_the_frames_needed_are_decoded(tmp_path, film, monkeypatch):
  path = film(tmp_path / 'x.mp4', frames=200, gop=10, rate=10, picture=flicker)
  decoded = []
  original = decode.Video._decode

  def counted(self, key):
    for item in original(self, key):
      decoded.append(item[1])
      yield item

  monkeypatch.setattr(decode.Video, '_decode', counted)
  with decode.Video(path) as video:
    assert len(list(video.frames([153, 154, 157]))) == 3
  assert len(decoded) <= 10 and min(decoded) >= 14.9


def test_the_last_picture_stays_when_time_runs_past_it(
  tmp_path, film, numbered
):
  path = film(tmp_path / 'x.mp4', frames=10, rate=10)
  found = numbers_in(path, [8, 9, 10, 11], numbered)
  assert found == [(8, 8), (9, 9), (10, 9), (11, 9)]


def test_images_are_videos_of_one_frame(tmp_path, numbered):
  pillow = pytest.importorskip('PIL.Image')
  picture = np.full((32, 48, 3), 20 + 4 * 7, np.uint8)
  for ending in ('png', 'jpg', 'webp', 'bmp'):
    path = str(tmp_path / f'x.{ending}')
    pillow.fromarray(picture).save(path)
    with decode.Video(path) as video:
      assert video.still and video.count == 1
    assert numbers_in(path, [0], numbered) == [(0, 7)]
  with open(path, 'rb') as file:
    assert numbers_in(file.read(), [0], numbered) == [(0, 7)]


def test_a_jpeg_of_any_size_is_read(tmp_path):
  pillow = pytest.importorskip('PIL.Image')
  noise = np.random.default_rng(0).integers(0, 255, (240, 320, 3), np.uint8)
  path = str(tmp_path / '000000.jpg')
  pillow.fromarray(noise).save(path)
  with decode.Video(path) as video:
    assert video.still and video.count == 1
    ((_, frame),) = video.frames([0])
  assert (frame.height, frame.width) == (240, 320)


def test_reasons(tmp_path, film):
  good = tmp_path / 'good.mp4'
  film(good, options={'movflags': 'faststart'})
  content = good.read_bytes()

  def broken(name, data):
    path = tmp_path / name
    path.write_bytes(data)
    return str(path)

  rng = np.random.default_rng(0)
  flipped = bytearray(content)
  start = content.index(b'mdat') + 200
  for place in rng.integers(start, len(content), 60):
    flipped[place] ^= 1 << rng.integers(8)
  assert reason_of(str(tmp_path / 'none.mp4')) == 'missing'
  assert reason_of(broken('zero.mp4', b'')) == 'empty'
  assert reason_of(broken('one.mp4', b'x')) == 'unreadable'
  assert reason_of(broken('text.mp4', b'hello world\n' * 99)) == 'unreadable'
  assert reason_of(broken('noise.mp4', rng.bytes(4096))) == 'unreadable'
  assert reason_of(broken('half.mp4', content[: len(content) * 2 // 3])) in (
    'undecodable', 'truncated',
  )  # fmt: skip
  assert reason_of(broken('flips.mp4', bytes(flipped))) == 'undecodable'
  end = content.index(b'moov')
  assert reason_of(broken('no_moov.mp4', content[:end])) == 'unreadable'
  assert reason_of(str(tmp_path)) == 'io'
  assert reason_of(b'') == 'empty'


def test_a_cut_webm_is_truncated(tmp_path, film):
  path = tmp_path / 'x.mkv'
  film(path, gop=4)
  content = path.read_bytes()
  path.write_bytes(content[: len(content) // 2])
  with pytest.raises(decode.VideoError, match=r'of 1\.92 s') as caught:
    decode.Video(str(path))
  assert caught.value.reason == 'truncated'


def test_sound_alone_is_no_video(tmp_path, film):
  path = tmp_path / 'x.m4a'
  import av

  with av.open(str(path), 'w') as container:
    sound = container.add_stream('aac', rate=16000)
    silence = av.AudioFrame.from_ndarray(
      np.zeros((1, 16000), np.float32), 'fltp', 'mono'
    )
    silence.sample_rate, silence.pts = 16000, 0
    container.mux(sound.encode(silence))
    container.mux(sound.encode())
  assert reason_of(str(path)) == 'no_video'


def test_sound_beside_pictures_is_passed_over(tmp_path, film, numbered):
  path = film(tmp_path / 'x.mkv', audio=True)
  assert numbers_in(path, [7, 40], numbered) == [(7, 7), (40, 40)]


def test_a_picture_with_the_ending_of_a_video_is_refused(tmp_path):
  pillow = pytest.importorskip('PIL.Image')
  path = tmp_path / 'x.mp4'
  pillow.new('RGB', (32, 32)).save(path, 'jpeg')
  assert reason_of(str(path)) == 'wrong_extension'


def test_files_that_point_at_others_are_refused(tmp_path, film):
  target = film(tmp_path / 'secret.ts', codec='mpeg2video')
  lists = {
    'a.m3u8': '#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n'
    f'{target}\n#EXT-X-ENDLIST\n',
    'b.mp4': f"ffconcat version 1.0\nfile '{target}'\n",
    'c.sdp': 'v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\n'
    't=0 0\nm=video 5004 RTP/AVP 96\n',
  }
  for name, text in lists.items():
    path = tmp_path / name
    path.write_text(text)
    start = time.perf_counter()
    assert reason_of(str(path)) == 'unreadable'
    assert reason_of(text.encode()) == 'unreadable'
    assert time.perf_counter() - start < 10
  for address in ('http://127.0.0.1:9/x.mp4', f'concat:{target}'):
    assert reason_of(address) == 'missing'


def test_headers_that_lie_are_found_out_at_once(tmp_path, film):
  start = time.process_time()
  for side in (16_000, 100_000):
    path = tmp_path / f'{side}.png'
    path.write_bytes(png_header(side))
    assert reason_of(str(path), [0]) in ('unreadable', 'too_large')
  path = tmp_path / 'endless.mp4'
  film(path, options={'movflags': 'faststart'})
  path.write_bytes(endless(path.read_bytes()))
  assert reason_of(str(path), [10**9 - 1]) == 'unreadable'
  assert time.process_time() - start < 3


def png_header(side):
  """A picture that says it has side x side pixels."""

  def chunk(name, data):
    check = struct.pack('>I', zlib.crc32(name + data))
    return struct.pack('>I', len(data)) + name + data + check

  header = struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)
  return (
    b'\x89PNG\r\n\x1a\n'
    + chunk(b'IHDR', header)
    + chunk(b'IDAT', zlib.compress(bytes(1000)))
    + chunk(b'IEND', b'')
  )


def endless(content):
  """An mp4 whose header promises a thousand million frames."""
  content = bytearray(content)
  times = content.index(b'stts')
  content[times + 12 : times + 16] = struct.pack('>I', 10**9)
  for name in (b'mvhd', b'mdhd'):
    place = content.index(name) + 20
    content[place : place + 4] = struct.pack('>I', 2**31)
  return bytes(content)
