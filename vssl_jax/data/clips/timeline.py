"""Presentation timeline of a video: the frames that a player shows.

Headers are not sufficient. They count stored frames, although frames outside
an edit list are never shown. Their rates are averages, and audio can be longer
than video. The timeline is therefore built from the index of the file if it
has one (mp4, mov, avi). Otherwise it is built from its packets, which are read
once without decoding.
"""

import bisect
import collections
import contextlib
import dataclasses
import itertools
import os

import av

from vssl_jax.data.clips import headers

# For larger files without an index the packets are not read. Their frames are
# numbered by time, at the average rate of the header.
MAX_BYTES = 2**26
MAX_PACKETS = 2**17
# Bytes and seconds before the end of the file to search for the last frame.
TAIL = 2**22
EARLIER = (1, 4, 16, 64, 256, 1024)
# Fraction by which the duration of the header may exceed that of the frames.
SLACK = 0.02
# Number of files whose timelines are cached.
CACHED = 64
_cache: collections.OrderedDict = collections.OrderedDict()


@dataclasses.dataclass(frozen=True)
class Timeline:
  """Frames of a video in the order in which they are shown.

  Attributes:
    count: number of shown frames.
    seconds: time from the start of the first to the end of the last frame.
    start: time stamp of the first shown frame in ticks of the stream; None for
      raw streams, whose packets have no time stamps.
    keys: stamp of each key frame in the order of the file; None for an
      estimated timeline.
    before: number of shown frames that are stored before each key frame.
    clock: type of the stamps in `keys`: 'pts', 'dts' or (raw streams) 'packet'
      numbers.
    ordered: whether time stamps give the order in which frames are shown. If
      not (raw streams, avi), only decoding gives it.
    delayed: whether frames that are stored after a key frame can be shown
      before it.
    times: if not `ordered`, the ticks at which each frame is shown; empty for
      a constant rate.
    promised: duration of the header in seconds if the file is truncated, or 0.
  """

  count: int
  seconds: float
  start: int | None
  keys: tuple[int, ...] | None = None
  before: tuple[int, ...] = ()
  clock: str = 'pts'
  ordered: bool = True
  delayed: bool = True
  times: tuple[int, ...] = ()
  promised: float = 0.0

  def stamp(self, packet: av.Packet, number: int) -> int | None:
    """Returns the stamp of a packet, of the type that `keys` hold.

    Args:
      packet: packet of this stream.
      number: number of packets of this stream before it in the file.
    """
    if self.clock == 'packet':
      return number
    return packet.pts if self.clock == 'pts' else packet.dts

  def key_before(self, frame: int) -> int:
    """Returns the last key frame with at most `frame` frames before it."""
    return max(bisect.bisect_right(self.before, frame) - 1, 0)

  def key_by(self, ticks: int) -> int:
    """Returns the last key frame that can be shown at or before a time."""
    if self.times:
      return self.key_before(bisect.bisect_right(self.times, ticks) - 1)
    return max(bisect.bisect_right(self.keys, ticks) - 1, 0)


def load(
  media: str | bytes,
  container: av.container.InputContainer,
  stream: av.video.stream.VideoStream,
) -> tuple[Timeline, bool]:
  """Builds the timeline of an open file, or returns it from the cache.

  Args:
    media: path of the file, or its content.
    container: the file, just opened.
    stream: its video stream.

  Returns:
    The timeline, and whether packets were read from the container.

  Raises:
    ValueError: the number of frames in the header is impossible.
  """
  size = len(media) if isinstance(media, bytes) else os.path.getsize(media)
  if stream.frames > size:
    raise ValueError(f'the header declares {stream.frames} frames in {size} B')
  name = _identity(media)
  if name in _cache:
    return _cache[name], False
  timeline, read = _from_index(container, stream), False
  if timeline is None:
    timeline, read = _from_packets(size, container, stream), True
  if name is not None:
    _cache[name] = timeline
    while len(_cache) > CACHED:
      _cache.popitem(last=False)
  return timeline, read


def is_shown(packet: av.Packet) -> bool:
  """Returns whether a packet holds a frame that a player shows."""
  if not packet.size or packet.is_discard:
    return False
  # VP8 stores frames that only serve prediction in separate packets. Bit 4 of
  # the first byte is show_frame (RFC 6386, section 9.1).
  if packet.stream.codec_context.name in ('vp8', 'libvpx'):
    return bool(memoryview(packet)[0] & 0x10)
  return True


def _identity(media: str | bytes) -> tuple | None:
  if isinstance(media, bytes):
    return None
  status = os.stat(media)
  return media, status.st_size, status.st_mtime_ns, status.st_ino


def _from_index(
  container: av.container.InputContainer, stream: av.video.stream.VideoStream
) -> Timeline | None:
  """Reads the index of an mp4, mov or avi file; None if it is incomplete."""
  avi = headers.is_avi(container)
  entries = stream.index_entries
  # More entries than frames in the header: the file is fragmented, and the
  # index covers only some of its fragments.
  if not avi and (
    not headers.is_mov(container) or len(entries) > stream.frames
  ):
    return None
  keys, before, shown = [], [], []
  for entry in entries:
    if entry.is_keyframe:
      keys.append(entry.timestamp)
      before.append(len(shown))
    if entry.size and not entry.is_discard:
      shown.append(entry.timestamp)
  if not keys or not shown or not stream.duration:
    return None
  step = (shown[-1] - shown[0]) / max(len(shown) - 1, 1)
  last_duration = stream.duration - (shown[-1] - shown[0])
  slack = SLACK * stream.duration + 4 * step
  if abs(last_duration) > slack or any(
    a >= b for a, b in itertools.pairwise(keys)
  ):
    return None
  return Timeline(
    count=len(shown),
    seconds=float(stream.duration * stream.time_base),
    start=shown[0] if avi else stream.start_time or 0,
    keys=tuple(keys),
    before=tuple(before),
    clock='dts',
    ordered=not avi,
    delayed=bool(stream.codec_context.reorder_depth),
    times=tuple(shown) if avi else (),
  )


def _from_packets(
  size: int,
  container: av.container.InputContainer,
  stream: av.video.stream.VideoStream,
) -> Timeline:
  """Builds the timeline from the packets; estimates it for large files."""
  raw = headers.is_raw(container)
  if size > MAX_BYTES and not raw:
    return _estimate(size, container, stream)
  length, is_video_length = headers.length(container, stream)
  packets = _Packets(container, stream)
  # The duration of the file can be that of the audio, so that is read too.
  streams = [stream] if is_video_length else list(container.streams)
  for packet in container.demux(streams):
    packets.add(packet)
    if packets.number > MAX_PACKETS and not raw:
      return _estimate(size, container, stream)
  timeline = packets.timeline()
  slack = SLACK * length + 3 * timeline.seconds / max(timeline.count, 1)
  if (
    headers.has_length(container)
    and timeline.start is not None
    and length > packets.end + slack
  ):
    return dataclasses.replace(timeline, promised=length)
  return timeline


class _Packets:
  """Collects the packets of a file and builds the timeline from them.

  Attributes:
    number: number of packets of the video stream so far.
    end: time in seconds at which the last packet of any stream ends.
  """

  def __init__(
    self,
    container: av.container.InputContainer,
    stream: av.video.stream.VideoStream,
  ) -> None:
    self._stream, self._raw = stream, headers.is_raw(container)
    self._rate = headers.rate(container, stream)
    self._ordered = not headers.is_avi(container)
    self._delayed = bool(stream.codec_context.reorder_depth)
    self.number, self.end = 0, 0.0
    self._keys, self._shown, self._last = [], [], (0, 0)

  def add(self, packet: av.Packet) -> None:
    """Adds the next packet."""
    stamp = packet.pts if self._ordered else packet.dts
    if stamp is not None:
      stop = (stamp + (packet.duration or 0)) * packet.time_base
      self.end = max(self.end, float(stop))
    if packet.stream_index != self._stream.index:
      return
    if packet.is_keyframe:
      self._keys.append((stamp, self.number, len(self._shown)))
    self.number += 1
    # Frames that are stored or shown before the first key frame cannot be
    # decoded.
    if not self._keys or not is_shown(packet):
      return
    first = self._keys[0][0]
    if self._ordered and None not in (stamp, first) and stamp < first:
      return
    self._shown.append(stamp)
    if stamp is not None:
      self._last = max(self._last, (stamp, packet.duration or 0))

  def timeline(self) -> Timeline:
    """Builds the timeline from the packets added so far."""
    shown, count, rate = self._shown, len(self._shown), self._rate
    columns = list(zip(*self._keys, strict=True)) or [(), (), ()]
    stamps, numbers, before = columns
    unknown = None in shown or None in stamps
    if self._raw or not count or unknown or len(set(shown)) < count:
      return Timeline(
        count=count,
        seconds=count / rate,
        start=None,
        keys=numbers,
        before=before,
        clock='packet',
        ordered=False,
        delayed=self._delayed,
      )
    base, start = self._stream.time_base, min(shown)
    last, duration = self._last
    return Timeline(
      count=count,
      seconds=float((last + duration - start) * base) + (not duration) / rate,
      start=start,
      keys=stamps,
      before=before,
      clock='pts' if self._ordered else 'dts',
      ordered=self._ordered,
      delayed=self._delayed,
      times=() if self._ordered else tuple(sorted(shown)),
    )


def _estimate(
  size: int,
  container: av.container.InputContainer,
  stream: av.video.stream.VideoStream,
) -> Timeline:
  """Estimates the timeline of a file that is too large to read its packets."""
  start, base = stream.start_time or 0, stream.time_base
  length, _ = headers.length(container, stream)
  end = round(length / base)
  for early in EARLIER:
    with contextlib.suppress(av.error.FFmpegError):
      if headers.has_length(container):
        container.seek(end - int(early / base), stream=stream)
      else:
        tail = TAIL * max(int(early), 1)
        container.seek(max(size - tail, 0), unsupported_byte_offset=True)
      stamps = [
        packet.pts + (packet.duration or 0)
        for packet in container.demux(stream)
        if packet.pts is not None
      ]
      if stamps:
        end = max(stamps)
        break
  seconds = float((end - start) * base)
  count = max(1, round(seconds * headers.rate(container, stream)))
  return Timeline(count, seconds, start)
