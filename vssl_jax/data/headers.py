"""What the header of a video says about its clock, where it says anything."""

import contextlib
import struct

import av
from av.sidedata import sidedata

from vssl_jax.data import transforms


def _unnamed(cls: type[sidedata.Type], value: int) -> sidedata.Type:
  member = object.__new__(cls)
  member._name_, member._value_ = f'TYPE_{value}', value
  return member


# PyAV raises for all side data of a frame where it has no name for one of its
# kinds, as for EXIF. A value without a name does no harm.
sidedata.Type._missing_ = classmethod(_unnamed)

# Raw streams of these codecs carry their rate themselves.
_RAW = ('h264', 'hevc', 'mpegvideo', 'm4v', 'av1', 'obu', 'mjpeg')


def is_cover(stream: av.video.stream.VideoStream) -> bool:
  """True for the picture of a record sleeve that sound files carry."""
  return bool(stream.disposition & av.stream.Disposition.attached_pic)


def is_mov(container: av.container.InputContainer) -> bool:
  """Returns whether a file is mp4, mov or one of their relatives."""
  return 'mp4' in container.format.name.split(',')


def is_avi(container: av.container.InputContainer) -> bool:
  """Returns whether a file is avi, which has no presentation times."""
  return container.format.name == 'avi'


def is_raw(container: av.container.InputContainer) -> bool:
  """Returns whether a file is the bare stream of a codec, without times."""
  return container.format.name in _RAW


def has_length(container: av.container.InputContainer) -> bool:
  """Returns whether files of a format give their length themselves.

  That of MPEG program and transport streams is estimated from their end.
  """
  return container.format.name not in ('mpeg', 'mpegts')


def rate(
  container: av.container.InputContainer, stream: av.video.stream.VideoStream
) -> float:
  """Average frames per second; 25 where the header gives none."""
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
  """Time at which a file ends by its header.

  Returns:
    Seconds on the clock of the time stamps (0 where the header gives none),
    and whether they hold for the picture stream. Without it another stream
    may be what ends there.
  """
  base = stream.time_base
  start = float((stream.start_time or 0) * base) if base else 0.0
  tag = stream.metadata.get('DURATION')
  if tag:  # Matroska: the time at which the track ends
    with contextlib.suppress(ValueError):
      hours, minutes, rest = tag.split(':')
      return int(hours) * 3600 + int(minutes) * 60 + float(rest), True
  alone = len(container.streams) == 1
  # asf gives each stream the length of the file.
  if stream.duration and base and (alone or container.format.name != 'asf'):
    # Of mp4 in fragments it can include the time before the first frame.
    start = 0.0 if is_mov(container) else start
    return start + float(stream.duration * base), True
  if container.duration:
    start = (container.start_time or 0) / av.time_base
    return start + container.duration / av.time_base, alone
  return 0.0, True


def shown(frame: av.VideoFrame, pace: float) -> float:
  """Seconds for which a picture is shown (one frame at `pace` if unknown)."""
  if frame.duration and frame.time_base:
    return float(frame.duration * frame.time_base)
  return 1 / pace


def orientation(frame: av.VideoFrame) -> transforms.Orientation:
  """Reads how a player turns and mirrors a frame.

  The display matrix [a b u; c d v; x y w] moves a pixel at (x, y) to
  (a x + c y, b x + d y). Cameras write it into videos, and ffmpeg makes it
  of the EXIF orientation of images. Angles between quarter turns are rounded.
  """
  matrix = frame.side_data.get('DISPLAYMATRIX')
  if matrix is None:
    return transforms.Orientation()
  a, b, _, c, d = struct.unpack_from('<5i', bytes(matrix))
  if abs(a) + abs(d) >= abs(b) + abs(c):
    return transforms.Orientation(False, mirror=a < 0, flip=d < 0)
  return transforms.Orientation(True, mirror=c < 0, flip=b < 0)
