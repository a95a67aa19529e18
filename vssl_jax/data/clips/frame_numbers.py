"""Numbers decoded frames on the presentation timeline, also after a seek.

Both classes take each packet before it is decoded, and then number the decoded
frames. `ByTime` is for videos whose time stamps give the order of the frames,
`ByOrder` for videos in which only decoding gives it.
"""

import fractions
import heapq

import av

from vssl_jax.data.clips import timeline as timeline_lib

Position = tuple[int, float]  # number of a frame, and its time in seconds


def start(
  timeline: timeline_lib.Timeline,
  key: int,
  *,
  rate: float,
  time_base: fractions.Fraction | None,
) -> 'ByTime | ByOrder':
  """Builds the object that numbers frames from a key frame on.

  Args:
    timeline: timeline of the video.
    key: index of the key frame in `Timeline.keys`.
    rate: frames per second, used if there are no time stamps.
    time_base: seconds per tick.
  """
  kind = ByTime if timeline.ordered else ByOrder
  return kind(timeline, key, rate, time_base)


class ByTime:
  """Numbers frames by the ranks of their time stamps.

  A key frame is shown after all frames that are stored before it. The frames
  after it are shown in the order of their time stamps. When the decoder returns
  a frame, all smaller time stamps have been read.

  Attributes:
    first: index of the key frame at which reading of packets has to start.
  """

  def __init__(
    self,
    timeline: timeline_lib.Timeline,
    key: int,
    rate: float,
    time_base: fractions.Fraction,
  ) -> None:
    self.first, self._timeline, self._rate = key, timeline, rate
    self._base, self._stamps, self._floor = float(time_base), [], None
    self._number = timeline.before[key] - 1 if timeline.keys else None

  def add(self, packet: av.Packet, stamp: int | None) -> None:
    """Adds the next packet, with its stamp on the timeline."""
    del stamp
    if packet.pts is None:
      return
    if self._floor is None:
      self._floor = packet.pts
    if timeline_lib.is_shown(packet):
      heapq.heappush(self._stamps, packet.pts)

  def position(self, frame: av.VideoFrame) -> Position | None:
    """Returns the position of the next frame.

    Returns:
      None for a frame that is shown before the key frame, because frames that
      it is predicted from were not decoded.
    """
    if frame.pts is None:
      return None
    rank = 0
    while self._stamps and self._stamps[0] <= frame.pts:
      heapq.heappop(self._stamps)
      rank += 1
    seconds = (frame.pts - self._timeline.start) * self._base
    if self._number is not None:
      self._number += max(rank, 1)
    if frame.pts < self._floor:
      return None
    if self._number is None:  # estimated timeline: number by time
      self._number = round(seconds * self._rate)
    return self._number, seconds


class ByOrder:
  """Numbers frames by counting them.

  Frames that are stored after a key frame can be shown before it. Their number
  is only known after decoding. If there can be any, decoding starts one key
  frame earlier.

  Attributes:
    first: index of the key frame at which reading of packets has to start.
  """

  def __init__(
    self,
    timeline: timeline_lib.Timeline,
    key: int,
    rate: float,
    time_base: fractions.Fraction | None,
  ) -> None:
    self.first = max(key - timeline.delayed, 0)
    self._timeline, self._rate = timeline, rate
    self._base, self._packets = float(time_base or 0), 0
    self._anchor = None
    self._stamp, self._before = timeline.keys[key], timeline.before[key]
    self._leading, self._number = 0, -1 if key == 0 else None

  def add(self, packet: av.Packet, stamp: int | None) -> None:
    """Adds the next packet, with its stamp on the timeline."""
    packet.opaque = self._packets
    if packet.size and stamp == self._stamp:
      self._anchor = self._packets
    self._packets += 1

  def position(self, frame: av.VideoFrame) -> Position | None:
    """Returns the position of the next frame, None before the key frame."""
    if self._number is not None:
      self._number += 1
    elif frame.opaque == self._anchor:
      self._number = self._before + self._leading
    else:
      after = self._anchor is not None and frame.opaque is not None
      self._leading += after and frame.opaque > self._anchor
      return None
    times = self._timeline.times
    if not times:
      return self._number, self._number / self._rate
    ticks = times[min(self._number, len(times) - 1)] - times[0]
    return self._number, ticks * self._base
