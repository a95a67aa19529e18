"""One video: opened with care, decoded only where frames are wanted.

Nothing here trusts a header. A file is opened under the `file` protocol with
a list of formats that cannot point at other files (no playlists), its picture
size is checked before anything is decoded, and frame counts are only used to
choose where to look: memory is proportional to the frames asked for.
"""

import collections
import contextlib
import io
import os
from collections.abc import Iterator, Sequence

import av

from vssl_jax.data import headers, numbering, timeline

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
# Decoding on through a gap of so many seconds is cheaper than a seek.
SEEK_GAP = 1.5
# Seconds by which seeks go further back, where one ends behind its target.
EARLIER = (0.0, 1.0, 4.0, 16.0, 64.0)

# PyAV before 19 raises on names of streams that are not UTF-8, unless told
# otherwise; from 19 on it never does, and takes no such argument.
_OLD = int(av.__version__.split('.')[0]) < 19
_LENIENT = {'metadata_errors': 'ignore'} if _OLD else {}


class VideoError(Exception):
  """A video that cannot be used, with a reason fit for counting.

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
  """An open video: its clock and its frames.

  Attributes:
    rate: average frames per second (25 where the header knows none).
    seconds: from the start of the first frame to the end of the last.
    count: number of frames that a player shows.
    still: True for an image.
    pixel_aspect: width / height of one pixel.
  """

  def __init__(
    self, media: str | bytes, *, max_pixels: int = 2**26, threads: int = 1
  ) -> None:
    """Opens a file or the bytes of one.

    Args:
      media: path of a local file, or the file's content.
      max_pixels: pictures with more pixels are refused before decoding.
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
      # For the decoders that opening a file may start to learn its format.
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
        # By its name a large JPEG is taken for the first of a numbered list
        # of files, which is refused; by its content it is what it is.
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
    """Opens the file again: some streams cannot seek to their start."""
    if not self._fresh:
      self._container.close()
      self._open()
      self._set_up_decoder()

  def frames(
    self, wanted: Sequence[int], fps: int | float | None = None
  ) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yields the picture shown at each wanted number.

    Without `fps`, numbers count the frames of the presentation timeline, from
    0. With `fps`, number k is the picture shown at k / fps seconds after the
    first one.

    Args:
      wanted: sorted, distinct numbers.
      fps: ticks per second of the numbers; None: frames.

    Raises:
      VideoError: truncated or undecodable where a frame was wanted.
    """
    pace = fps or self.rate
    stretch = []
    for number in wanted:
      if stretch and number - stretch[-1] > SEEK_GAP * pace:
        yield from self._stretch(stretch, fps)
        stretch = []
      stretch.append(number)
    if stretch:
      yield from self._stretch(stretch, fps)

  def all_frames(self) -> Iterator[tuple[float, av.VideoFrame]]:
    """Yields (seconds, picture) of the whole video, from its start.

    Raises:
      VideoError: undecodable somewhere, or truncated.
    """
    last = None
    for _, time, frame in self._decode(0):
      yield time, frame
      last = time, frame
    if last is None:
      raise VideoError('truncated', 'there is not one picture')
    self._check_end(*last)

  def _check_end(self, time: float, frame: av.VideoFrame) -> None:
    """Raises VideoError if the video goes on behind the last frame."""
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
    held, held_time = None, 0.0
    for number, time, frame in self._numbered(wanted[0], fps):
      while pending and number > pending[0] + 1e-3:
        yield pending.popleft(), held or frame
      if fps is None and pending and number == pending[0]:
        yield pending.popleft(), frame
      if not pending:
        return
      held, held_time = frame, time
    if held is None:
      start = wanted[0] / (fps or self.rate)
      raise VideoError(
        'truncated', f'no picture at {start:.2f} s of {self.seconds:.2f} s'
      )
    self._check_end(held_time, held)
    for number in pending:  # the last picture stays on the screen
      yield number, held

  def _numbered(
    self, first: int, fps: int | float | None
  ) -> Iterator[tuple[float, float, av.VideoFrame]]:
    """Yields (number, seconds, frame) from at or before the number first."""
    for key in self._key_frames(first, fps):
      accepted = key == 0
      for position, time, frame in self._decode(key):
        number = position if fps is None else time * fps
        if not accepted and number > first + 1e-3:
          break  # frames between the key frame and this one are lost
        accepted = True
        yield number, time, frame
      else:
        if accepted:
          return

  def _key_frames(self, first: int, fps: int | float | None) -> Iterator[int]:
    """Yields key frames to decode from, ever earlier, and 0 for the start.

    They are numbers of `Timeline.keys`, or time stamps where the file was not
    read through.
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
    """Yields (number, seconds, frame) from a key frame on."""
    time, stream = 0.0, self._stream
    numbers = numbering.start(
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
    wanted = line.keys[key] if line.keys is not None else None
    for _ in self._seek(key):
      packets = self._container.demux(self._stream)
      for number, packet in enumerate(packets):
        stamp = line.stamp(packet, number)
        if stamp is None or not packet.size:
          continue
        if packet.is_keyframe if wanted is None else stamp == wanted:
          yield packet, stamp
          for count, following in enumerate(packets, number + 1):
            yield following, line.stamp(following, count)
          return
        if wanted is not None and stamp > wanted:
          break  # the seek went too far

  def _seek(self, key: int) -> Iterator[None]:
    """Moves to a key frame or before it, at each step further back."""
    line, base = self._timeline, self._stream.time_base
    if line.keys is None:
      ticks = key
    elif line.clock == 'dts':
      # Searched by presentation time: the last moment before the next one.
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
  """Turns the reader's errors into VideoError with this reason.

  Args:
    reason: for errors of the content; errors of the disk become 'io'.
    detail: what the reader was about to do.
    time: optional function that says how far it came, in seconds.
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
    where = f' {time():.2f} s' if time else ''
    raise VideoError(reason, f'{detail}{where}: {text}') from error
