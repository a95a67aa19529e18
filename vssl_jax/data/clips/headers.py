"""Reads frame rate, duration and orientation from the header of a video."""

import contextlib
import struct

import av
from av.sidedata import sidedata

from vssl_jax.data.clips import transforms


def _unnamed(cls: type[sidedata.Type], value: int) -> sidedata.Type:
  member = object.__new__(cls)
  member._name_, member._value_ = f'TYPE_{value}', value
  return member


# PyAV raises on all side data of a frame if one of its types has no name in
# PyAV, such as EXIF. An unnamed value avoids this.
sidedata.Type._missing_ = classmethod(_unnamed)

# Raw streams of these codecs contain their frame rate.
_RAW = ('h264', 'hevc', 'mpegvideo', 'm4v', 'av1', 'obu', 'mjpeg')


def is_cover(stream: av.video.stream.VideoStream) -> bool:
  """Returns whether a stream is the cover image of an audio file."""
  return bool(stream.disposition & av.stream.Disposition.attached_pic)


def is_mov(container: av.container.InputContainer) -> bool:
  """Returns whether a file is mp4, mov or a related format."""
  return 'mp4' in container.format.name.split(',')


def is_avi(container: av.container.InputContainer) -> bool:
  """Returns whether a file is avi, which has no presentation times."""
  return container.format.name == 'avi'


def is_raw(container: av.container.InputContainer) -> bool:
  """Returns whether a file is a raw codec stream, without time stamps."""
  return container.format.name in _RAW


def has_length(container: av.container.InputContainer) -> bool:
  """Returns whether the format of a file stores the duration.

  FFmpeg estimates the duration of MPEG program and transport streams from the
  end of the file.
  """
  return container.format.name not in ('mpeg', 'mpegts')


def rate(
  container: av.container.InputContainer, stream: av.video.stream.VideoStream
) -> float:
  """Returns the average frames per second, 25 if the header has none."""
  rates = [stream.average_rate, stream.guessed_rate, stream.base_rate]
  if is_raw(container):  # the average is what the demuxer assumes
    rates[:2] = rates[1::-1]
  for value in rates:
    if value and 0.01 < value < 1000:
      return float(value)
  return 25.0


def length(
  container: av.container.InputContainer, stream: av.video.stream.VideoStream
) -> tuple[float, bool]:
  """Returns the end time of a file according to its header.

  Returns:
    Seconds on the clock of the time stamps (0 if the header has none), and
    whether this is the end of the video stream. If not, it may be the end of
    another stream.
  """
  base = stream.time_base
  start = float((stream.start_time or 0) * base) if base else 0.0
  tag = stream.metadata.get('DURATION')
  if tag:  # Matroska: the time at which the track ends
    with contextlib.suppress(ValueError):
      hours, minutes, seconds = tag.split(':')
      return int(hours) * 3600 + int(minutes) * 60 + float(seconds), True
  is_only_stream = len(container.streams) == 1
  # asf gives each stream the length of the file.
  if (
    stream.duration
    and base
    and (is_only_stream or container.format.name != 'asf')
  ):
    # In fragmented mp4 it can include the time before the first frame.
    start = 0.0 if is_mov(container) else start
    return start + float(stream.duration * base), True
  if container.duration:
    start = (container.start_time or 0) / av.time_base
    return start + container.duration / av.time_base, is_only_stream
  return 0.0, True


def shown(frame: av.VideoFrame, pace: float) -> float:
  """Returns the seconds for which a frame is shown; 1 / pace if unknown."""
  if frame.duration and frame.time_base:
    return float(frame.duration * frame.time_base)
  return 1 / pace


def orientation(frame: av.VideoFrame) -> transforms.Orientation:
  """Reads the orientation in which a player shows a frame.

  The display matrix [a b u; c d v; x y w] maps a pixel at (x, y) to
  (a x + c y, b x + d y). Cameras write it into videos, and FFmpeg derives it
  from the EXIF orientation of images. Angles are rounded to quarter turns.
  """
  matrix = frame.side_data.get('DISPLAYMATRIX')
  if matrix is None:
    return transforms.Orientation()
  a, b, _, c, d = struct.unpack_from('<5i', bytes(matrix))
  if abs(a) + abs(d) >= abs(b) + abs(c):
    return transforms.Orientation(False, mirror=a < 0, flip=d < 0)
  return transforms.Orientation(True, mirror=c < 0, flip=b < 0)
