"""Frames of every container, codec and cut, against a sequential decode.

Each video carries the number of its frame in the picture. What `decode.Video`
returns for numbers, windows and times is compared with what PyAV decodes from
the start of the file to its end.
"""

import dataclasses
import fractions
import itertools

import av
import numpy as np
import pytest

from vssl_jax.data.clips import decode, timeline
from vssl_jax.data.tools import transcode

FRAMES = 40
BLOCK = 16  # pixels; 2 x 4 blocks hold the bits of a number
H264 = {'preset': 'ultrafast', 'crf': '18'}
X264 = 'scenecut=0:b-adapt=0:b-pyramid=normal:weightp=0'


@dataclasses.dataclass(frozen=True)
class Case:
  """How a video is made.

  Attributes:
    name: file name, whose ending chooses the container.
    codec: encoder.
    gop: frames from one key frame to the next.
    b: B-frames in a row.
    open_gop: whether frames may be shown before the key frame that they follow.
    rate: frames per second.
    gaps: whether the time between frames varies.
    offset: seconds at which the first frame is shown.
    cut: number of frames cut off the start without encoding anew.
    sound: seconds of silence beside the pictures.
    format: name of the container where the ending does not choose it.
    options: of the container.
  """

  name: str
  codec: str = 'libx264'
  gop: int = 8
  b: int = 0
  open_gop: bool = False
  rate: str = '25'
  gaps: bool = False
  offset: float = 0.0
  cut: int = 0
  sound: float = 0.0
  format: str | None = None
  options: tuple[tuple[str, str], ...] = ()

  def __str__(self) -> str:
    default = Case(self.name)
    changed = [
      f'{field.name}={getattr(self, field.name)}'
      for field in dataclasses.fields(self)
      if getattr(self, field.name) != getattr(default, field.name)
    ]
    return ','.join([self.name, *changed])


def picture(number):
  """uint8 [32, 64, 3] that shows the bits of a number."""
  bits = np.array([number >> k & 1 for k in range(8)], np.uint8).reshape(2, 4)
  plane = np.kron(40 + 170 * bits, np.ones((BLOCK, BLOCK), np.uint8))
  return np.repeat(plane[..., None], 3, -1).astype(np.uint8)


def number_of(pixels):
  """The number that pixels [32, 64, 3] show."""
  blocks = pixels.reshape(2, BLOCK, 4, BLOCK, -1).mean((1, 3, 4)).ravel()
  return int(sum(1 << k for k in range(8) if blocks[k] > 125))


def shown_times(case):
  """Seconds at which frames are shown."""
  rate = fractions.Fraction(case.rate)
  steps = [k + (k // 5) * 2 if case.gaps else k for k in range(FRAMES)]
  return [float(step / rate) for step in steps]


def write(path, case):
  """Writes a video."""
  encoded = path.with_name(f'whole-{path.name}') if case.cut else path
  _encode(encoded, case)
  if case.cut:
    _copy(encoded, path, shown_times(case)[case.cut])
  return str(path)


def _encode(path, case):
  rate = fractions.Fraction(case.rate)
  fine = case.gaps and path.suffix != '.avi'
  base = fractions.Fraction(1, 1000) if fine else 1 / rate
  with av.open(
    str(path), 'w', format=case.format, options=dict(case.options)
  ) as container:
    stream = container.add_stream(case.codec, rate=rate)
    stream.width, stream.height = 4 * BLOCK, 2 * BLOCK
    formats = stream.codec_context.codec.video_formats or ()
    formats = [form.name for form in formats] or ['yuv420p']
    formats = ['yuvj420p'] if case.codec == 'mjpeg' else formats
    stream.pix_fmt = 'yuv420p' if 'yuv420p' in formats else formats[0]
    context = stream.codec_context
    context.gop_size, context.max_b_frames = case.gop, case.b
    stream.bit_rate = 4_000_000
    if case.codec == 'libx264':
      opened = f'{X264}:bframes={case.b}:open-gop={int(case.open_gop)}'
      stream.options = {**H264, 'x264-params': opened}
    elif case.codec == 'libx265':
      stream.options = {
        'preset': 'ultrafast',
        'x265-params': f'log-level=none:scenecut=0:b-adapt=0:bframes={case.b}:'
        f'keyint={case.gop}:min-keyint={case.gop}:'
        f'open-gop={int(case.open_gop)}',
      }
    elif case.codec.startswith('libvpx'):
      stream.options = {'deadline': 'realtime', 'cpu-used': '8'}
    elif case.b or case.codec in ('mpeg4', 'mpeg1video', 'mpeg2video'):
      context.qmax = 4
      stream.options = {'sc_threshold': '1000000000'}
    context.time_base = base
    sound = None
    if case.sound:
      codec = {'.wmv': 'mp2', '.avi': 'mp2', '.webm': 'libopus'}.get(
        path.suffix, 'aac'
      )
      sound = container.add_stream(codec, rate=48000, layout='mono')
    for number, time in enumerate(shown_times(case)):
      frame = av.VideoFrame.from_ndarray(picture(number))
      frame.pts, frame.time_base = round((time + case.offset) / base), base
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
    if sound:
      for second in range(int(case.sound * 50)):
        silence = av.AudioFrame.from_ndarray(
          np.zeros((1, 960), np.float32), 'fltp', 'mono'
        )
        silence.sample_rate, silence.pts = 48000, 960 * second
        container.mux(sound.encode(silence))
      container.mux(sound.encode())


def _copy(source, path, start):
  """Copies packets so that a frame in the middle is shown first."""
  with av.open(str(source)) as old, av.open(str(path), 'w') as new:
    stream = old.streams.video[0]
    copied = new.add_stream_from_template(stream)
    packets = [p for p in old.demux(stream) if p.size]
    shift = round(start / stream.time_base) + (stream.start_time or 0)
    keys = [
      n for n, p in enumerate(packets) if p.is_keyframe and p.pts <= shift
    ]
    for packet in packets[keys[-1] :]:
      packet.pts -= shift
      packet.dts = None if packet.dts is None else packet.dts - shift
      packet.stream = copied
      new.mux(packet)


def decoded(path):
  """(number, seconds or None) of each frame, decoded from the start."""
  frames = []
  with av.open(path) as container:
    stream = container.streams.video[0]
    for frame in container.decode(stream):
      pixels = frame.to_ndarray(format='rgb24')
      frames.append((number_of(pixels), frame.time))
  return frames


def check(path, case):
  """Holds count, order, seeks and times against a sequential decode."""
  reference = decoded(path)
  numbers = [number for number, _ in reference]
  assert numbers == list(range(numbers[0], FRAMES))
  count, rate = len(numbers), float(fractions.Fraction(case.rate))
  # Raw streams and avi have no times at which frames are shown; what decoders
  # make up for them depends on the delay of the codec.
  intended = np.array(shown_times(case))[numbers]
  times = [time for _, time in reference]
  if path.endswith((*RAW, '.avi')) or None in times:
    times = intended
  times = np.array(times) - times[0]
  np.testing.assert_allclose(times, intended - intended[0], atol=2e-2)
  with decode.Video(path) as video:
    assert video.count == count
    assert times[-1] < video.seconds <= times[-1] + 6.5 / rate
    read = lambda wanted, fps=None: [
      (k, number_of(frame.to_ndarray(format='rgb24')))
      for k, frame in video.frames(wanted, fps)
    ]
    assert read(range(count)) == list(enumerate(numbers))
    for start in (*range(count - 3, 0, -3), 1, 0):
      wanted = range(start, min(start + 3, count))
      assert read(wanted) == [(k, numbers[k]) for k in wanted], start
    ends = [0, count // 2, count - 1]
    assert read(ends) == [(k, numbers[k]) for k in ends]
    ticks = range(int(video.seconds * 8 + 1e-3))
    at = np.searchsorted(times * 8, np.array(ticks) + 1e-3, 'right') - 1
    assert read(ticks, 8) == [(k, numbers[at[k]]) for k in ticks]
    for k in reversed(ticks):
      assert read([k], 8) == [(k, numbers[at[k]])]
    every = [
      (number_of(frame.to_ndarray(format='rgb24')), time)
      for time, frame in video.all_frames()
    ]
  assert [number for number, _ in every] == numbers
  np.testing.assert_allclose([time for _, time in every], times, atol=1e-3)


def cases():
  """Yields videos of all kinds."""
  gops = (
    {'gop': 1},
    {'gop': 8},
    {'gop': 8, 'b': 2},
    {'gop': 8, 'b': 2, 'open_gop': True},
    {'gop': 250, 'b': 3},
  )
  names = 'mp4', 'mov', 'm4v', 'mkv', 'ts', 'flv', 'avi', 'h264'
  rates = '25', '30000/1001'
  for ending, gop, rate in itertools.product(names, gops, rates):
    yield Case(f'x.{ending}', rate=rate, **gop)
  for ending, gop in itertools.product(('mp4', 'mkv', 'ts', 'hevc'), gops[1:4]):
    yield Case(f'x.{ending}', 'libx265', **gop)
  for codec, endings in {
    'mpeg4': ('avi', 'mp4', 'mkv', 'mov', 'm4v'),
    'mpeg2video': ('ts', 'vob', 'mxf', 'mkv', 'mpg', 'm2v'),
    'mpeg1video': ('mpg', 'm1v', 'mkv'),
  }.items():
    for ending, b in itertools.product(endings, (0, 2)):
      form = FORMATS.get((codec, ending))
      yield Case(f'x.{ending}', codec, b=b, format=form)
  for codec, endings in {
    'libvpx': ('webm', 'mkv', 'ivf', 'ogv'),
    'libvpx-vp9': ('webm', 'mkv', 'ivf', 'mp4'),
    'mjpeg': ('avi', 'mkv', 'mov', 'mjpeg'),
    'ffv1': ('mkv', 'avi'),
    'huffyuv': ('avi',),
    'rawvideo': ('avi', 'y4m'),
    'prores': ('mov',),
    'png': ('mov',),
    'qtrle': ('mov',),
    'gif': ('gif',),
    'apng': ('apng',),
    'flv': ('flv',),
    'wmv2': ('wmv', 'avi'),
    'wmv1': ('asf',),
    'msmpeg4v3': ('avi', 'asf'),
  }.items():
    for ending in endings:
      yield Case(f'x.{ending}', codec, format=FORMATS.get((codec, ending)))
  names = 'mp4', 'mov', 'mkv', 'flv', 'ts', 'avi'
  for ending, b in itertools.product(names, (0, 2)):
    if not (ending == 'avi' and b):
      yield Case(f'x.{ending}', b=b, gaps=True)
  for ending, codec in (('webm', 'libvpx'), ('wmv', 'wmv2'), ('gif', 'gif')):
    yield Case(f'x.{ending}', codec, gaps=True)
  for ending, b in itertools.product(('mp4', 'mkv', 'ts', 'flv'), (0, 2)):
    yield Case(f'x.{ending}', b=b, offset=3.6)
  for b in (0, 2):
    below = (('avoid_negative_ts', 'disabled'),)
    yield Case('x.mkv', b=b, offset=-0.4, options=below)
  for ending, gop, cut in itertools.product(
    ('mp4', 'mov', 'm4v'), gops[1:], (5, 16, 19)
  ):
    yield Case(f'x.{ending}', cut=cut, **gop)
  for ending, cut in itertools.product(('mkv', 'ts', 'flv'), (8, 19)):
    yield Case(f'x.{ending}', b=2, cut=cut)
  for ending, codec in (
    ('wmv', 'wmv2'), ('mkv', 'libx264'), ('webm', 'libvpx'),
    ('flv', 'libx264'), ('mp4', 'libx264'), ('avi', 'libx264'),
    ('ts', 'libx264'),
  ):  # fmt: skip
    yield Case(f'x.{ending}', codec, sound=4.0)
  for flags in ('frag_keyframe', 'frag_keyframe+empty_moov', 'dash'):
    options = (('movflags', flags),)
    yield Case('x.mp4', b=2, options=options)


RAW = '.h264', '.hevc', '.m4v', '.m1v', '.m2v', '.mjpeg'
FORMATS = {
  ('mpeg4', 'm4v'): 'm4v',
  ('mpeg2video', 'mpg'): 'mpeg',
  ('mpeg2video', 'm2v'): 'mpeg2video',
  ('mpeg1video', 'm1v'): 'mpeg1video',
}


QUICK = (
  Case('x.mp4', b=2, open_gop=True, rate='30000/1001'),
  Case('x.mov', gop=250, b=3, cut=19),
  Case('x.mkv', b=2, gaps=True),
  Case('x.avi', b=2, open_gop=True),
  Case('x.ts', gop=250, b=3),
  Case('x.flv', b=2, offset=3.6),
  Case('x.wmv', 'wmv2', sound=4.0),
  Case('x.mpg', 'mpeg1video', b=2),
  Case('x.h264', b=2, open_gop=True, rate='30000/1001'),
  Case('x.mp4', b=2, options=(('movflags', 'frag_keyframe'),)),
)


@pytest.mark.slow
@pytest.mark.parametrize('case', QUICK, ids=str)
def test_frames_are_those_of_a_sequential_decode(case, tmp_path):
  check(write(tmp_path / case.name, case), case)


@pytest.mark.slow
@pytest.mark.parametrize('case', [*cases()], ids=str)
def test_frames_of_all_containers_and_codecs(case, tmp_path):
  check(write(tmp_path / case.name, case), case)


def test_the_generator_makes_more_than_200_videos():
  assert len({*cases()}) == len([*cases()]) >= 200


@pytest.mark.slow
@pytest.mark.parametrize(
  'case',
  [
    Case('x.ts', b=2),
    Case('x.ts', gop=250, b=3),
    Case('x.mkv', b=2, open_gop=True),
    Case('x.flv', b=2, offset=3.6),
    Case('x.vob', 'mpeg2video', b=2),
    Case('x.mpg', 'mpeg1video', b=2),
    Case('x.wmv', 'wmv2', sound=4.0),
    Case('x.webm', 'libvpx', rate='30000/1001'),
    Case('x.mxf', 'mpeg2video', b=2),
  ],
  ids=str,
)
def test_files_too_large_to_read_through(case, tmp_path, monkeypatch):
  """At a constant rate, times alone give the same frames."""
  monkeypatch.setattr(timeline, 'MAX_BYTES', 0)
  check(write(tmp_path / case.name, case), case)


@pytest.mark.parametrize('b', [0, 2])
def test_an_edit_list_hides_frames(b, tmp_path):
  case = Case('x.mp4', gop=12, b=b, cut=17)
  path = write(tmp_path / 'x.mp4', case)
  with av.open(path) as container:
    stream = container.streams.video[0]
    packets = [packet for packet in container.demux(stream) if packet.size]
  assert sum(packet.is_discard for packet in packets) == 5  # 12 to 16
  assert stream.frames == 28
  numbers = [number for number, _ in decoded(path)]
  assert numbers == [*range(17, FRAMES)]
  target = transcode.Target(quality=1, preset='ultrafast')
  prepared = str(tmp_path / 'y.mp4')
  with open(prepared, 'wb') as file:
    file.write(transcode.transcode(path, target))
  assert [number for number, _ in decoded(prepared)] == numbers
  target = dataclasses.replace(target, fps=5)
  with open(prepared, 'wb') as file:
    file.write(transcode.transcode(path, target))
  assert [number for number, _ in decoded(prepared)] == [17, 22, 27, 32]


def test_a_stream_that_starts_between_key_frames(tmp_path):
  """Frames that cannot be decoded are neither counted nor returned."""
  path = tmp_path / 'x.ts'
  write(path, Case('x.ts', gop=12))
  with av.open(str(path)) as container:
    packets = [p for p in container.demux(video=0) if p.size]
  path.write_bytes(path.read_bytes()[packets[4].pos :])
  with decode.Video(str(path)) as video:
    frames = [*video.frames(range(video.count))]
  numbers = [number_of(f.to_ndarray(format='rgb24')) for _, f in frames]
  assert numbers == [*range(12, FRAMES)]


def test_pictures_that_are_only_predicted_from_are_not_counted(tmp_path):
  whole, path = tmp_path / 'whole.webm', str(tmp_path / 'x.webm')
  _encode(whole, Case('x.webm', 'libvpx', gop=250))
  with av.open(str(whole)) as old, av.open(path, 'w') as new:
    stream = new.add_stream_from_template(old.streams.video[0])
    for number, packet in enumerate(old.demux(video=0)):
      if not packet.size:
        continue
      data = bytearray(bytes(packet))
      data[0] &= 0xFF if number % 7 != 3 else ~0x10  # show_frame
      hidden = av.Packet(bytes(data))
      hidden.pts, hidden.dts = packet.pts, packet.dts
      hidden.time_base, hidden.stream = packet.time_base, stream
      hidden.is_keyframe = packet.is_keyframe
      new.mux(hidden)
  numbers = [number for number, _ in decoded(path)]
  assert numbers == [n for n in range(FRAMES) if n % 7 != 3]
  with decode.Video(path) as video:
    assert video.count == len(numbers)
    for start in (25, 3, 0):
      frames = [f for _, f in video.frames(range(start, start + 6))]
      found = [number_of(f.to_ndarray(format='rgb24')) for f in frames]
      assert found == numbers[start : start + 6]


def test_a_file_is_read_through_once(tmp_path, monkeypatch):
  path = write(tmp_path / 'x.mkv', Case('x.mkv'))
  scans = []
  original = timeline._from_packets
  monkeypatch.setattr(
    timeline,
    '_from_packets',
    lambda *args: scans.append(args) or original(*args),
  )
  for _ in range(3):
    with decode.Video(path) as video:
      assert video.count == FRAMES
  assert len(scans) == 1
  write(tmp_path / 'x.mkv', Case('x.mkv', cut=8))  # another file of that name
  with decode.Video(path) as video:
    assert video.count == FRAMES - 8
  assert len(scans) == 2
