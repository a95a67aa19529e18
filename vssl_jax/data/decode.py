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

from vssl_jax.data import headers

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
    seconds: length that the header gives the picture stream, or None.
    count: number of frames (from the header, or seconds * rate).
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
    self._check_size(context.width, context.height)
    context.thread_count = self._threads
    base = stream.time_base
    self.still = container.format.name.endswith('_pipe')
    self._start = float((stream.start_time or 0) * base) if base else 0.0
    self.pixel_aspect = float(stream.sample_aspect_ratio or 1)
    self.rate = headers.rate(stream)
    self.seconds = (
      0.0 if self.still else headers.seconds(container, stream, self._start)
    )
    count = 1 if self.still else stream.frames
    if not count and self.seconds is None:
      count = self._count_packets()
    if count and self.seconds and not stream.average_rate:
      self.rate = count / self.seconds
    self.count = count or max(1, round(self.seconds * self.rate))
    if self.seconds is None:
      self.seconds = self.count / self.rate
    extension = os.path.splitext(str(self._media))[1].lower()
    if self.still and isinstance(self._media, str) and extension in VIDEOS:
      raise VideoError(
        'wrong_extension', f'{extension} but the content is {context.name}'
      )

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

  def _count_packets(self) -> int:
    with translated('unreadable', 'cannot be read through'):
      count = sum(p.size > 0 for p in self._container.demux(self._stream))
    self._rewind()
    if not count:
      raise VideoError('empty', 'the picture stream holds no packets')
    return count

  def _rewind(self) -> None:
    """Goes back to the start; streams that cannot seek are opened again."""
    self._container.close()
    self._open()
    self._stream.codec_context.thread_count = self._threads

  def frames(
    self, wanted: Sequence[int], fps: int | float | None = None
  ) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yields the picture shown at each wanted number.

    Without `fps`, numbers count the frames themselves; a seek finds the first
    of a stretch by its time (exact at a constant rate), and from there on
    frames are counted, so that neighbours stay neighbours at any rate. With
    `fps`, number k is the picture shown at k / fps seconds, by time stamps.

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
    if not self._fresh:
      self._rewind()
    end = 0.0
    for time, frame in self._decode():
      yield time, frame
      end = time + headers.shown(frame, self.rate)
    if not end:
      raise VideoError('truncated', 'there is not one picture')
    self._check_end(end)

  def _check_end(self, end: float) -> None:
    slack = max(3 / self.rate, 0.02 * self.seconds)
    if end < self.seconds - slack:
      raise VideoError(
        'truncated',
        f'pictures end at {end:.2f} s of {self.seconds:.2f} s',
      )

  def _stretch(
    self, wanted: Sequence[int], fps: int | float | None
  ) -> Iterator[tuple[int, av.VideoFrame]]:
    pending = collections.deque(wanted)
    held, last = None, 0.0
    for number, time, frame in self._numbered(wanted[0], fps):
      while pending and number > pending[0] + 1e-3:
        yield pending.popleft(), held or frame
      if fps is None and pending and number == pending[0]:
        yield pending.popleft(), frame
      if not pending:
        return
      held, last = frame, time + headers.shown(frame, self.rate)
    if held is None:
      start = wanted[0] / (fps or self.rate)
      raise VideoError(
        'truncated', f'no picture at {start:.2f} s of {self.seconds:.2f} s'
      )
    self._check_end(last)
    for number in pending:  # the last picture stays on the screen
      yield number, held

  def _numbered(
    self, first: int, fps: int | float | None
  ) -> Iterator[tuple[float, float, av.VideoFrame]]:
    """Yields (number, seconds, frame) from about the frame numbered first."""
    start = first / (fps or self.rate)
    for early in (0.0, 4.0, None):  # an index can lie: look further back
      from_start = self._go_to(start, early)
      number, shown_until = None, -1.0
      for time, frame in self._decode():
        if number is None and not from_start:
          found = time <= start + 1e-3 or time <= shown_until + 1e-3
          if not found and time > start + (0 if fps else 0.5) / self.rate:
            break  # pictures between the key frame and this one are lost
        shown_until = time + headers.shown(frame, self.rate)
        if fps is not None:
          number = time * fps
        elif number is not None:
          number += 1
        elif time > start - 0.5 / self.rate:
          number = first
        else:
          continue
        yield number, time, frame
      else:
        return

  def _go_to(self, seconds: int | float, early: float | None) -> bool:
    """Moves to a key frame; returns whether that is the start of the file."""
    if self._fresh and seconds < SEEK_GAP:
      return True
    target = seconds - (early or 0.0)
    if early is not None and target > 0 and self._stream.time_base:
      ticks = int((target + self._start) / self._stream.time_base)
      with contextlib.suppress(av.error.FFmpegError):
        self._container.seek(ticks, stream=self._stream)
        return False
    self._rewind()
    return True

  def _decode(self) -> Iterator[tuple[float, av.VideoFrame]]:
    time = -1 / self.rate
    self._fresh = False
    with translated('undecodable', 'breaks off after', lambda: time):
      for packet in self._container.demux(self._stream):
        for frame in packet.decode():
          self._check_size(frame.width, frame.height)
          stamp = frame.time
          time = time + 1 / self.rate if stamp is None else stamp - self._start
          if frame.is_corrupt:
            raise VideoError('undecodable', f'damaged picture at {time:.2f} s')
          yield time, frame


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
  except (av.error.FFmpegError, OSError, ValueError) as error:
    text = str(error).split(": '")[0]
    if isinstance(error, av.error.ArgumentError) and not time:
      text = 'not a format that is read here (lists of files are refused)'
    if isinstance(error, OSError):
      reason = 'memory' if error.errno == 12 else 'io'
    where = f' {time():.2f} s' if time else ''
    raise VideoError(reason, f'{detail}{where}: {text}') from error
