"""Decodes selected frames of a video file, without trusting its header.

A file is opened under the `file` protocol with a list of formats that cannot
refer to other files (no playlists). The frame size is checked before anything
is decoded. Frame counts are only used to choose where to seek, so memory is
proportional to the number of requested frames.
"""

import collections
import contextlib
import io
import os
from collections.abc import Iterator, Sequence

import av

from vssl_jax.data.clips import frame_numbers, headers, timeline

# Demuxers that read one stream of bytes and never open another file.
FORMATS = (
  'mov,mp4,m4a,3gp,3g2,mj2', 'matroska,webm', 'avi', 'mpegts', 'mpeg',
  'mpegvideo', 'm4v', 'h264', 'hevc', 'av1', 'ivf', 'obu', 'ogg', 'asf', 'flv',
  'mxf', 'gif', 'apng', 'mjpeg', 'y4m', 'yuv4mpegpipe', 'jpeg_pipe',
  'png_pipe', 'webp_pipe', 'bmp_pipe',
)  # fmt: skip
IMAGES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp')
VIDEOS = (
  '.mp4', '.m4v', '.mov', '.webm', '.mkv', '.avi', '.mpg', '.mpeg', '.ts',
  '.m2ts', '.mts', '.flv', '.f4v', '.wmv', '.asf', '.ogv', '.ogm',
  '.3gp', '.3g2', '.qt', '.vob', '.mpe', '.mpv', '.m1v', '.m2v', '.mxf',
  '.divx', '.xvid', '.gif', '.h264', '.264', '.hevc', '.265', '.obu', '.mjpeg',
  '.mjpg', '.ivf', '.y4m',
)  # fmt: skip
# Seconds up to which decoding through a gap is cheaper than a seek.
SEEK_GAP = 1.5
# Seconds by which a seek is repeated earlier, if it ended after its target.
EARLIER = (0.0, 1.0, 4.0, 16.0, 64.0)

# PyAV before 19 raises on stream names that are not UTF-8, unless this argument
# is set. From 19 on it never raises and does not have the argument.
_OLD = int(av.__version__.split('.')[0]) < 19
_LENIENT = {'metadata_errors': 'ignore'} if _OLD else {}


class VideoError(Exception):
  """A video that cannot be used, with a reason that can be counted.

  Reasons: missing, empty, unreadable, no_video, wrong_extension, too_large,
  too_short, truncated, undecodable, unwritable, io, memory, timeout, died.
  """

  def __init__(self, reason: str, detail: str) -> None:
    super().__init__(f'{reason}: {detail}')
    self.reason = reason
    self.detail = detail

  def __reduce__(self) -> tuple:
    return VideoError, (self.reason, self.detail)


class Video:
  """An open video: frame rate, duration and decoded frames.

  Attributes:
    rate: average frames per second (25 if the header has none).
    seconds: time from the start of the first frame to the end of the last.
    count: number of frames that a player shows.
    still: True for an image.
    pixel_aspect: width / height of one pixel.
  """

  def __init__(
    self, media: str | bytes, *, max_pixels: int = 2**26, threads: int = 1
  ) -> None:
    """Opens a video file or the content of one.

    Args:
      media: path of a local file, or the file's content.
      max_pixels: frames with more pixels are rejected before decoding.
      threads: decoding threads.

    Raises:
      VideoError: with the reason.
    """
    self._media, self._max_pixels, self._threads = media, max_pixels, threads
    self._fresh = False
    self._open()
    try:
      with translated('unreadable', 'cannot be read'):
        self._read_header()
    except BaseException:
      self.close()
      raise

  def __enter__(self) -> 'Video':
    return self

  def __exit__(self, *unused: object) -> None:
    self.close()

  def close(self) -> None:
    """Closes the file."""
    self._container.close()

  def _open(self) -> None:
    options = {
      'protocol_whitelist': 'file',
      'format_whitelist': ','.join(FORMATS),
      # For decoders that start while a file is opened, to detect its format.
      'max_pixels': str(self._max_pixels),
      'threads': str(self._threads),
    }
    if isinstance(self._media, bytes):
      if not self._media:
        raise VideoError('empty', 'the record holds no bytes')
      source = io.BytesIO(self._media)
    else:
      check_file(self._media)
      source = f'file:{self._media}'
      if self._media.lower().endswith(IMAGES):
        # FFmpeg takes a large JPEG, by its name, for the first of a numbered
        # sequence of files, which is rejected. From its content it is opened
        # as one image.
        with translated('io', 'cannot be read'), open(self._media, 'rb') as f:
          source = io.BytesIO(f.read())
    with translated('unreadable', 'cannot be opened'):
      self._container = av.open(source, options=options, **_LENIENT)
    streams = [
      s for s in self._container.streams.video if not headers.is_cover(s)
    ]
    if not streams:
      kinds = sorted({s.type for s in self._container.streams}) or ['nothing']
      self.close()
      raise VideoError('no_video', f'holds {", ".join(kinds)} only')
    self._stream = streams[0]
    self._fresh = True

  def _read_header(self) -> None:
    stream, container = self._stream, self._container
    context = stream.codec_context
    if context is None:
      raise VideoError('unreadable', 'there is no decoder for its pictures')
    self._check_size(context.width, context.height)
    self.still = container.format.name.endswith('_pipe')
    extension = os.path.splitext(str(self._media))[1].lower()
    if self.still and isinstance(self._media, str) and extension in VIDEOS:
      raise VideoError(
        'wrong_extension', f'{extension} but the content is {context.name}'
      )
    self.pixel_aspect = float(stream.sample_aspect_ratio or 1)
    self.rate = headers.rate(container, stream)
    if self.still:
      self._timeline = timeline.Timeline(
        1, 0.0, None, (0,), (0,), 'packet', ordered=False
      )
    else:
      self._timeline, read = timeline.load(self._media, container, stream)
      self._fresh = not read
    self.count, self.seconds = self._timeline.count, self._timeline.seconds
    if not self.count:
      raise VideoError('empty', 'the picture stream holds no frames')
    if self._timeline.promised:
      raise VideoError(
        'truncated',
        f'frames end at {self.seconds:.2f} s of {self._timeline.promised:.2f} '
        's',
      )
    if self.seconds and not stream.average_rate:
      self.rate = self.count / self.seconds
    self._set_up_decoder()

  def _set_up_decoder(self) -> None:
    context = self._stream.codec_context
    context.thread_count = self._threads
    context.copy_opaque = not self._timeline.ordered

  def _check_size(self, width: int, height: int) -> None:
    if width <= 0 or height <= 0:
      raise VideoError(
        'unreadable',
        'no picture, or one of more than '
        f'{self._max_pixels} pixels (data.max_pixels)',
      )
    if width * height > self._max_pixels:
      raise VideoError(
        'too_large',
        f'picture of {width}x{height} has more than {self._max_pixels} pixels',
      )

  def _rewind(self) -> None:
    """Reopens the file, because some streams cannot seek to their start."""
    if not self._fresh:
      self._container.close()
      self._open()
      self._set_up_decoder()

  def frames(
    self, wanted: Sequence[int], fps: int | float | None = None
  ) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yields (number, frame) for each requested frame number.

    Without `fps`, numbers count the frames of the presentation timeline, from
    0. With `fps`, number k is the frame shown k / fps seconds after the first.

    Args:
      wanted: sorted, distinct frame numbers.
      fps: numbers per second, or None to count frames.

    Raises:
      VideoError: truncated or undecodable at a requested frame.
    """
    pace = fps or self.rate
    group = []
    for number in wanted:
      if group and number - group[-1] > SEEK_GAP * pace:
        yield from self._stretch(group, fps)
        group = []
      group.append(number)
    if group:
      yield from self._stretch(group, fps)

  def all_frames(self) -> Iterator[tuple[float, av.VideoFrame]]:
    """Yields (seconds, frame) for all frames of the video.

    Raises:
      VideoError: any part is undecodable, or the video is truncated.
    """
    last = None
    for _, time, frame in self._decode(0):
      yield time, frame
      last = time, frame
    if last is None:
      raise VideoError('truncated', 'there is not one picture')
    self._check_end(*last)

  def _check_end(self, time: float, frame: av.VideoFrame) -> None:
    """Raises VideoError if the last frame ends before the video does."""
    end = time + headers.shown(frame, self.rate)
    slack = max(3 / self.rate, timeline.SLACK * self.seconds)
    if end < self.seconds - slack:
      raise VideoError(
        'truncated',
        f'pictures end at {end:.2f} s of {self.seconds:.2f} s',
      )

  def _stretch(
    self, wanted: Sequence[int], fps: int | float | None
  ) -> Iterator[tuple[int, av.VideoFrame]]:
    pending = collections.deque(wanted)
    last, last_time = None, 0.0
    for number, time, frame in self._numbered(wanted[0], fps):
      while pending and number > pending[0] + 1e-3:
        yield pending.popleft(), last or frame
      if fps is None and pending and number == pending[0]:
        yield pending.popleft(), frame
      if not pending:
        return
      last, last_time = frame, time
    if last is None:
      start = wanted[0] / (fps or self.rate)
      raise VideoError(
        'truncated', f'no picture at {start:.2f} s of {self.seconds:.2f} s'
      )
    self._check_end(last_time, last)
    for number in pending:  # the last frame stays on the screen
      yield number, last

  def _numbered(
    self, first: int, fps: int | float | None
  ) -> Iterator[tuple[float, float, av.VideoFrame]]:
    """Yields (number, seconds, frame), starting at or before number `first`."""
    for key in self._key_frames(first, fps):
      accepted = key == 0
      for position, time, frame in self._decode(key):
        number = position if fps is None else time * fps
        if not accepted and number > first + 1e-3:
          break  # decoding began too late: the frame `first` is lost
        accepted = True
        yield number, time, frame
      else:
        if accepted:
          return

  def _key_frames(self, first: int, fps: int | float | None) -> Iterator[int]:
    """Yields key frames to try to decode from, the latest first, then 0.

    They are indices into `Timeline.keys`, or time stamps in ticks if the
    timeline was estimated; 0 is the start of the file.
    """
    line, seconds = self._timeline, first / (fps or self.rate)
    if line.keys is None:
      for early in EARLIER:
        if seconds > max(early, SEEK_GAP):
          yield line.start + round((seconds - early) / self._stream.time_base)
    else:
      if fps is None:
        key = line.key_before(first)
      elif line.start is None:
        key = line.key_before(int(seconds * self.rate))
      else:
        key = line.key_by(line.start + int(seconds / self._stream.time_base))
      yield from (key - back for back in (0, 1, 3) if key > back)
    yield 0

  def _decode(self, key: int) -> Iterator[tuple[int, float, av.VideoFrame]]:
    """Yields (number, seconds, frame), starting at a key frame."""
    time, stream = 0.0, self._stream
    numbers = frame_numbers.start(
      self._timeline, key, rate=self.rate, time_base=stream.time_base
    )
    with translated('undecodable', 'breaks off after', lambda: time):
      for packet, stamp in self._packets(numbers.first):
        numbers.add(packet, stamp)
        for frame in packet.decode():
          self._check_size(frame.width, frame.height)
          position = numbers.position(frame)
          if position is None:
            continue
          number, time = position
          if frame.is_corrupt:
            raise VideoError('undecodable', f'damaged picture at {time:.2f} s')
          yield number, time, frame

  def _packets(self, key: int) -> Iterator[tuple[av.Packet, int | None]]:
    """Yields (packet, stamp) from a key frame to the end of the file."""
    line = self._timeline
    target = line.keys[key] if line.keys is not None else None
    for _ in self._seek(key):
      packets = self._container.demux(self._stream)
      for number, packet in enumerate(packets):
        stamp = line.stamp(packet, number)
        if stamp is None or not packet.size:
          continue
        if packet.is_keyframe if target is None else stamp == target:
          yield packet, stamp
          for count, following in enumerate(packets, number + 1):
            yield following, line.stamp(following, count)
          return
        if target is not None and stamp > target:
          break  # the seek ended after its target

  def _seek(self, key: int) -> Iterator[None]:
    """Seeks to a key frame or before it, further back at each iteration."""
    line, base = self._timeline, self._stream.time_base
    if line.keys is None:
      ticks = key
    elif line.clock == 'dts':
      # The seek compares presentation times, so its target is the last tick
      # before the next key frame.
      ticks = (*line.keys, line.keys[-1] + 2**31)[key + 1] - 1
    else:
      ticks = line.keys[key]
    near = line.start is None or (ticks - line.start) * base < SEEK_GAP
    if self._fresh and (near or not key):
      self._fresh = False
      yield
    if line.start is not None and (key or line.keys is not None):
      for early in EARLIER:
        try:
          self._container.seek(ticks - int(early / base), stream=self._stream)
        except av.error.FFmpegError:
          break
        self._fresh = False
        yield
    self._rewind()
    self._fresh = False
    yield


def check_file(path: str) -> None:
  """Raises VideoError if there is no readable, non-empty file at path."""
  try:
    size = os.stat(path).st_size
    readable = os.path.isfile(path) and os.access(path, os.R_OK)
  except FileNotFoundError as error:
    raise VideoError('missing', 'there is no such file') from error
  except OSError as error:
    raise VideoError('io', str(error)) from error
  if not readable:
    raise VideoError('io', 'is not a readable file')
  if not size:
    raise VideoError('empty', 'the file holds 0 bytes')


@contextlib.contextmanager
def translated(reason: str, detail: str, time: object = None) -> Iterator[None]:
  """Converts errors of the reader to VideoError.

  Args:
    reason: reason for errors of the content; I/O errors become 'io'.
    detail: operation that failed, for the message.
    time: optional function that returns the position reached, in seconds.
  """
  try:
    yield
  except MemoryError as error:
    raise VideoError('memory', f'{detail}: out of memory') from error
  except (
    av.error.FFmpegError,
    OSError,
    ValueError,
    ArithmeticError,
    NotImplementedError,
  ) as error:
    text = str(error).split(": '")[0]
    if isinstance(error, av.error.ArgumentError) and reason == 'unreadable':
      text = 'not a format that is read here (lists of files are refused)'
    if isinstance(error, OSError):
      reason = 'memory' if error.errno == 12 else 'io'
    position = f' {time():.2f} s' if time else ''
    raise VideoError(reason, f'{detail}{position}: {text}') from error
