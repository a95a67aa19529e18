"""What the header of a video says about its clock, where it says anything."""

import contextlib

import av


def is_cover(stream: av.video.stream.VideoStream) -> bool:
  """True for the picture of a record sleeve that sound files carry."""
  return bool(stream.disposition & av.stream.Disposition.attached_pic)


def rate(stream: av.video.stream.VideoStream) -> float:
  """Average frames per second; 25 where the header knows none."""
  for told in (stream.average_rate, stream.guessed_rate, stream.base_rate):
    if told and 0.01 < told < 1000:
      return float(told)
  return 25.0


def seconds(
  container: av.container.InputContainer,
  stream: av.video.stream.VideoStream,
  start: float,
) -> float | None:
  """Length of a picture stream, or None when only sound could tell it."""
  if stream.duration and stream.time_base:
    return float(stream.duration * stream.time_base)
  tag = stream.metadata.get('DURATION')
  if tag:  # Matroska: the time at which the track ends
    with contextlib.suppress(ValueError):
      hours, minutes, rest = tag.split(':')
      end = int(hours) * 3600 + int(minutes) * 60 + float(rest)
      return end - start if end > start else end
  if container.duration and not container.streams.audio:
    end = container.duration / av.time_base
    return end - start if end > start else end
  return None


def shown(frame: av.VideoFrame, pace: float) -> float:
  """Seconds for which a picture is shown (one frame at `pace` if unknown)."""
  if frame.duration and frame.time_base:
    return float(frame.duration * frame.time_base)
  return 1 / pace
