"""Clip specification (Spec), and reading clips from one video (read)."""

import dataclasses
import functools
from collections.abc import Sequence

import av
import numpy as np
from av import filter as av_filter
from av.video.reformatter import Interpolation

from vssl_jax.data.clips import augment, decode, headers, transforms
from vssl_jax.utils import colours

CROPS = ('random_resized', 'multi_scale', 'centre')
# With full chroma: without it images are almost 2 of 255 too dark.
SCALING = int(Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT)
THIN = 16  # pixels; thinner frames are converted to RGB before cropping
SAMPLINGS = (
  'window',
  'middle',
  'linspace',
  'parts',
  'scattered',
  'spread',
  'interleaved',
)


@dataclasses.dataclass(frozen=True)
class Spec:
  """Clip specification. `options.KEYS` documents the fields.

  A video yields `segments` x `views` clips for evaluation (samplings 'spread'
  and 'interleaved') and `repeats` clips for training.
  """

  frames: int = 16
  stride: int = 4
  fps: int | float = 0.0
  height: int = 224
  width: int = 224
  channels: int = 3
  mean: tuple[transforms.Number, ...] = ()
  std: tuple[transforms.Number, ...] = ()
  sampling: str = 'window'
  crop: str = 'random_resized'
  crop_scale: tuple[transforms.Number, transforms.Number] = (0.3, 1.0)
  crop_aspect: tuple[transforms.Number, transforms.Number] = (0.75, 4 / 3)
  crop_part: int | float = 1.0
  flip: bool = True
  auto_augment: str = ''
  erase: int | float = 0.0
  repeats: int = 1
  repeat_frames: str = 'own'
  segments: int = 1
  views: int = 1
  min_frames: int = 1
  max_pixels: int = 2**26
  threads: int = 1
  depth_units: int | float = 0.0
  depth_range: tuple[transforms.Number, transforms.Number] = (1e-3, 10.0)

  def __post_init__(self) -> None:
    checks = (
      ('crop', CROPS),
      ('sampling', SAMPLINGS),
      ('repeat_frames', ('own', 'shared')),
      ('channels', (1, 3)),
    )
    for name, allowed in checks:
      if getattr(self, name) not in allowed:
        raise ValueError(
          f'data.{name} is {getattr(self, name)!r}; wanted one of {allowed}'
        )
    colours.of(self.channels, self.mean, self.std)
    if self.fps and self.stride != 1:
      raise ValueError(
        f'data.fps is {self.fps} and data.stride is {self.stride}: frames are '
        'picked by time or by number, not both. Set data.stride to 1 or '
        'data.fps to 0.'
      )
    if self.depth_units < 0 or (self.depth_units and self.fps):
      raise ValueError(
        f'data.depth_units is {self.depth_units} and data.fps is {self.fps}; '
        'wanted units per metre of 0 or more, and, as such frames have no '
        'frame rate, data.fps=0 and a data.stride'
      )
    policy = augment.parse(self.auto_augment)
    if not 0 <= self.erase <= 1:
      raise ValueError(
        f'data.erase is {self.erase}; wanted a probability of 0 to 1'
      )
    if self.depth_units and (policy or self.erase):
      raise ValueError(
        f'data.auto_augment is {self.auto_augment!r} and data.erase is '
        f'{self.erase}: they would change pictures but not their depth. '
        "Wanted '' and 0 with data.depth_units"
      )
    for name in ('frames', 'stride', 'height', 'width', 'repeats', 'segments'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'data.{name} is {getattr(self, name)}; wanted 1 or more'
        )

  @property
  def testing(self) -> bool:
    """Whether clips are at fixed positions, for evaluation."""
    return self.sampling in ('spread', 'interleaved')

  @property
  def clips(self) -> int:
    """Number of clips per video."""
    return self.segments * self.views if self.testing else self.repeats

  @property
  def shape(self) -> tuple[int, int, int, int]:
    """Shape (T, H, W, C) of one clip."""
    return self.frames, self.height, self.width, self.channels

  @property
  def stored(self) -> tuple[int, int, int, int]:
    """Shape of one clip as readers store it: depth adds two byte channels."""
    extra = 2 if self.depth_units else 0
    return *self.shape[:3], self.channels + extra


@dataclasses.dataclass(frozen=True)
class Clips:
  """Clips of one video.

  Attributes:
    video: uint8 [clips, T, H, W, C].
    crop: float32 [clips, 4], crop box: top, left, bottom, right as fractions
      of the upright frame.
    flipped: bool [clips], whether the crop is mirrored left-right.
    short: whether frames were repeated because the video is short.
  """

  video: np.ndarray
  crop: np.ndarray
  flipped: np.ndarray
  short: bool = False


def read(
  media: str | bytes,
  spec: Spec,
  entropy: Sequence[int],
  out: np.ndarray | None = None,
) -> Clips:
  """Reads clips from a video.

  Args:
    media: path of a file, or a file's content.
    spec: clip specification.
    entropy: seeds of all random choices.
    out: uint8 [clips, T, H, W, C] to write into, or None for a new array.

  Returns:
    The clips. They are a pure function of the arguments.

  Raises:
    decode.VideoError: the video cannot be read; with the reason.
  """
  rng = np.random.default_rng(entropy)
  if out is None:
    out = np.empty((spec.clips, *spec.shape), np.uint8)
  with decode.Video(
    media, max_pixels=spec.max_pixels, threads=spec.threads
  ) as video:
    frame_numbers = numbers(_count(video, spec), spec, rng)
    targets = places(frame_numbers)
    cutters = None
    for number, frame in video.frames(sorted(targets), spec.fps or None):
      if cutters is None:
        cutters = [
          Cutter(*plan, spec)
          for plan in plans(upright_size(video, frame), spec, rng)
        ]
      for clip, position in targets[number]:
        cutters[clip].cut(frame, out[clip, position])
  return Clips(
    video=out,
    crop=np.asarray([cutter.done for cutter in cutters], np.float32),
    flipped=np.asarray([cutter.flip for cutter in cutters]),
    short=is_short(frame_numbers),
  )


def _count(video: decode.Video, spec: Spec) -> int:
  """Returns the number of frames, at the rate of the video or at spec.fps."""
  if not video.still and video.count < spec.min_frames:
    raise decode.VideoError(
      'too_short', f'{video.count} frames, wanted {spec.min_frames}'
    )
  if not spec.fps or video.still:
    return video.count
  return max(1, int(video.seconds * spec.fps + 1e-3))


def is_short(rows: np.ndarray) -> bool:
  """Returns whether any clip repeats a frame, given its frame numbers."""
  return bool((np.diff(rows, axis=-1) == 0).any())


def numbers(count: int, spec: Spec, rng: np.random.Generator) -> np.ndarray:
  """Samples the frame numbers of the clips of a video.

  Args:
    count: frames in the video.
    spec: clip specification.
    rng: random generator; not used for evaluation.

  Returns:
    int64 [clips, T].
  """
  if spec.testing:
    if spec.sampling == 'spread':
      frame_numbers = transforms.spread(
        count, spec.frames, spec.stride, spec.segments
      )
    else:
      frame_numbers = transforms.interleaved(count, spec.frames, spec.segments)
    return np.tile(frame_numbers, (spec.views, 1))
  distinct = spec.repeats if spec.repeat_frames == 'own' else 1
  frame_numbers = [
    _row(count, spec, rng, which, distinct) for which in range(distinct)
  ]
  return np.broadcast_to(np.stack(frame_numbers), (spec.repeats, spec.frames))


def _row(
  count: int, spec: Spec, rng: np.random.Generator, which: int, own: int
) -> np.ndarray:
  """Samples the frame numbers, int64 [T], of one clip for training."""
  if spec.sampling == 'scattered':
    return transforms.scattered(count, spec.frames, rng.random(spec.frames))
  if spec.sampling == 'parts':
    return transforms.part(
      count, spec.frames, spec.stride, rng.random(), which, own
    )
  # Also drawn for 'middle', so that the crops are the same for all samplings.
  chance = rng.random()
  if spec.sampling == 'linspace':
    return transforms.linspace(count, spec.frames, spec.stride, chance)
  if spec.sampling == 'middle':
    chance = 0.5
  return transforms.window(count, spec.frames, spec.stride, chance)


def places(rows: np.ndarray) -> dict[int, list[tuple[int, int]]]:
  """Maps each frame number to its (clip, position) pairs."""
  pairs = {}
  for (clip, position), number in np.ndenumerate(rows):
    pairs.setdefault(int(number), []).append((clip, position))
  return pairs


def upright_size(
  video: decode.Video, frame: av.VideoFrame
) -> tuple[transforms.Number, transforms.Number]:
  """Returns height and width of the upright frame with square pixels."""
  height, width = float(frame.height), frame.width * video.pixel_aspect
  turned = headers.orientation(frame).transpose
  return (width, height) if turned else (height, width)


def plans(
  size: tuple[transforms.Number, transforms.Number],
  spec: Spec,
  rng: np.random.Generator,
) -> list[tuple[transforms.Box, bool]]:
  """Samples the crop box and the flip of each clip of a video.

  Args:
    size: height and width of the upright frame with square pixels.
    spec: clip specification.
    rng: random generator; not used for evaluation.

  Returns:
    (box, flip) per clip.
  """
  if spec.testing:
    boxes = transforms.views(
      *size, spec.width / spec.height, spec.views, spec.crop_part
    )
    return [(box, False) for box in boxes for _ in range(spec.segments)]
  draw = {
    'random_resized': lambda: transforms.random_resized(
      rng, *size, spec.crop_scale, spec.crop_aspect
    ),
    'multi_scale': lambda: transforms.multi_scale(rng, *size),
    'centre': lambda: transforms.centre(
      *size, spec.width / spec.height, spec.crop_part
    ),
  }[spec.crop]
  # The flip is drawn even when it is off, so that the option changes no other
  # random choice.
  return [
    (draw(), bool(rng.random() < 0.5) and spec.flip)
    for _ in range(spec.repeats)
  ]


class Cutter:
  """Crops frames by one box, resizes them, brings them upright and flips them.

  Attributes:
    done: crop box after rounding to whole pixels; None before the first frame.
  """

  def __init__(self, box: transforms.Box, flip: bool, spec: Spec) -> None:
    self.box, self.flip, self.spec, self.done = box, flip, spec, None
    self._graph = functools.lru_cache(maxsize=2)(_crop_graph)

  def cut(self, frame: av.VideoFrame, out: np.ndarray) -> None:
    """Writes the crop of a frame.

    Args:
      frame: a decoded frame.
      out: uint8 [H, W, C] to write into.

    Raises:
      decode.VideoError: the frame cannot be cropped.
    """
    with decode.translated('undecodable', 'a frame cannot be cropped'):
      self._cut(frame, out)

  def _cut(self, frame: av.VideoFrame, out: np.ndarray) -> None:
    orientation = headers.orientation(frame)
    if min(frame.width, frame.height) < THIN:
      # Subsampled chroma would leave too few positions for a crop.
      frame = frame.reformat(format='rgb24', interpolation=SCALING, threads=1)
    box = transforms.turn_back(self.box, orientation)
    x, y, w, h = _pixels(box, frame)
    if self.done is None:
      cut = (y / frame.height, x / frame.width)
      cut += ((y + h) / frame.height, (x + w) / frame.width)
      self.done = transforms.turn_box(cut, orientation)
    if (w, h) != (frame.width, frame.height):
      _, source, sink = self._graph(
        frame.width, frame.height, frame.format.name, x, y, w, h
      )
      source.push(frame)
      frame = sink.pull()
    height, width = out.shape[:2]
    if orientation.transpose:
      height, width = width, height
    image = frame.reformat(
      width=width,
      height=height,
      format='gray' if self.spec.channels == 1 else 'rgb24',
      interpolation=SCALING,
      threads=1,
    ).to_ndarray()
    image = transforms.turn(image, orientation)
    out[...] = (image[:, ::-1] if self.flip else image).reshape(out.shape)


def _pixels(
  box: transforms.Box, frame: av.VideoFrame
) -> tuple[int, int, int, int]:
  """Returns x, y, width and height of a box, rounded to the chroma grid."""
  form = frame.format
  step_x, step_y = 4 // form.chroma_width(4), 4 // form.chroma_height(4)
  top, bottom = _snap(box[0], box[2], frame.height, step_y)
  left, right = _snap(box[1], box[3], frame.width, step_x)
  return left, top, right - left, bottom - top


def _snap(low: float, high: float, size: int, step: int) -> tuple[int, int]:
  start = min(round(low * size / step) * step, (size - 1) // step * step)
  stop = min(max(round(high * size / step) * step, start + step), size)
  return start, size if high >= 1 else stop


def _crop_graph(
  width: int, height: int, form: str, x: int, y: int, w: int, h: int
) -> tuple:
  graph = av_filter.Graph()
  graph.threads = 1
  source = graph.add(
    'buffer',
    f'video_size={width}x{height}:pix_fmt={form}:time_base=1/1000',
  )
  crop = graph.add('crop', f'{w}:{h}:{x}:{y}:exact=1')
  sink = graph.add('buffersink')
  graph.link_nodes(source, crop, sink).configure()
  return graph, source, sink  # filters hold no reference to their graph
