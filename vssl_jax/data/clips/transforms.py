"""Sampling of frame numbers and of crop boxes, as pure functions.

Boxes are (top, left, bottom, right) as fractions of the upright frame with
square pixels. Random choices come from the generator or the random numbers that
are passed in.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

Number = int | float
Box = tuple[Number, Number, Number, Number]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


def window(
  count: int, frames: int, stride: int, chance: Number
) -> Int[np.ndarray, 'T']:
  """Samples every stride-th frame of a window with a random start.

  In a video that is too short, the last frame on the stride is repeated.

  Args:
    count: frames in the video.
    frames: frames in the clip.
    stride: distance of neighbours, in frames.
    chance: number in [0, 1) that determines the start.

  Returns:
    int64 [frames], frame numbers.
  """
  span = (frames - 1) * stride + 1
  start = int(chance * (max(count - span, 0) + 1))
  return _reachable(start + np.arange(frames) * stride, count, stride, start)


def linspace(
  count: int, frames: int, stride: int, chance: Number
) -> Int[np.ndarray, 'T']:
  """Samples frames evenly from a window of `frames * stride` frames.

  Both ends of the window are included: 16 frames with stride 4 are 0, 4, 8, 12,
  17, ... 59, 63 after the start. A video that is too short yields
  count // stride frames spread over all of it, then repeats its last frame.

  Args:
    count: frames in the video.
    frames: frames in the clip.
    stride: mean distance of neighbours, in frames.
    chance: number in [0, 1) that determines the start.

  Returns:
    int64 [frames], frame numbers.

  Source: VideoMAE and MVD, `kinetics.py`, `loadvideo_decord`.
  """
  span = frames * stride
  if count > span:
    start = int(chance * (count - span))
    steps = np.linspace(0, span, frames)
    return start + np.minimum(steps, span - 1).astype(np.int64)
  spread_out = np.linspace(0, count, count // stride)
  padding = np.full(frames - len(spread_out), count)
  ticks = np.concatenate([spread_out, padding])
  return np.minimum(ticks, count - 1).astype(np.int64)


def part(
  count: int, frames: int, stride: int, chance: Number, which: int, parts: int
) -> Int[np.ndarray, 'T']:
  """Samples a window inside one of `parts` equal parts of the video.

  A part has count // parts frames. If `frames * stride` frames fit, the window
  has a random start in its part. If not, the windows start at equal distances
  from the first frame on, without randomness.

  Args:
    count: frames in the video.
    frames: frames in the clip.
    stride: distance of neighbours, in frames.
    chance: number in [0, 1) that determines the start.
    which: index of the part.
    parts: number of parts.

  Returns:
    int64 [frames], frame numbers.

  Source: V-JEPA 2, `src/datasets/video_dataset.py`, with overlapping clips.
  """
  length, part_length = frames * stride, count // parts
  if part_length > length:
    start = which * part_length + int(chance * (part_length - length))
  else:
    start = which * (max(count - length, 0) // max(parts - 1, 1))
  return _reachable(start + np.arange(frames) * stride, count, stride, start)


def scattered(
  count: int, frames: int, chances: Float[np.ndarray, 'T']
) -> Int[np.ndarray, 'T']:
  """Samples one frame from each of `frames` equal parts of the video.

  Args:
    count: frames in the video.
    frames: frames in the clip, and parts of the video.
    chances: [frames], positions in the parts, in [0, 1).

  Returns:
    int64 [frames], frame numbers.
  """
  ticks = (np.arange(frames) + chances) * (count / frames)
  return np.minimum(ticks.astype(np.int64), count - 1)


def spread(
  count: int, frames: int, stride: int, segments: int
) -> Int[np.ndarray, 'segments T']:
  """Samples evenly spaced windows of a whole video, for evaluation.

  Of the list of every stride-th frame, windows of `frames` entries start at
  floor(i * (length - frames) / (segments - 1)). A single window is centred. For
  300 frames, stride 4, 16 frames and 5 segments, the windows start at 0, 14,
  29, 44 and 59 of 75.

  Args:
    count: frames in the video.
    frames: frames in the clip.
    stride: distance of neighbours, in frames.
    segments: number of clips.

  Returns:
    int64 [segments, frames], frame numbers.
  """
  length = math.ceil(count / stride)
  room = max(length - frames, 0)
  if segments == 1:
    starts = np.asarray([room // 2])
  else:
    starts = np.arange(segments) * room // (segments - 1)
  entries = starts[:, None] + np.arange(frames)
  return np.minimum(entries, length - 1) * stride


def interleaved(
  count: int, frames: int, segments: int
) -> Int[np.ndarray, 'segments T']:
  """Samples interleaved clips of a whole video, as for testing on SSv2.

  The range from the first frame to the last, count - 1 frames long, is divided
  into `frames` equal parts, and each part into `segments` pieces. Clip i takes
  the middle of the i-th piece of each part: two clips are at 1/4 and 3/4 of
  each part, a single clip is in its middle.

  Args:
    count: frames in the video.
    frames: frames in the clip.
    segments: number of clips.

  Returns:
    int64 [segments, frames], frame numbers.

  Source: MVD, `ssv2.py`, mode `test`. VideoMAE's code takes the first frames
  of the pieces.
  """
  tick = (count - 1) / frames
  pieces = np.arange(segments + 1)[:, None] * (tick / segments)
  edges = np.round(tick * np.arange(frames) + pieces).astype(np.int64)
  return (edges[:-1] + edges[1:]) // 2


def _reachable(
  numbers: np.ndarray, count: int, stride: int, start: int
) -> np.ndarray:
  last = start + max(count - 1 - start, 0) // stride * stride
  return np.minimum(numbers, last)


def random_resized(
  rng: np.random.Generator,
  height: Number,
  width: Number,
  scale: Sequence[Number],
  aspect: Sequence[Number],
) -> Box:
  """Samples a box of random area and aspect ratio (random resized crop).

  In ten attempts, area ~ U(scale) and log width/height ~ U(log aspect). If no
  box fits, the largest centred box with an aspect ratio in `aspect` is taken.

  Args:
    rng: random generator.
    height: height of the frame in pixels.
    width: width of the frame in pixels.
    scale: smallest and largest area as fractions of the frame.
    aspect: smallest and largest width / height in pixels.

  Returns:
    Box as fractions of the frame.
  """
  for _ in range(10):
    area = rng.uniform(*scale) * height * width
    ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
    w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
    if w <= width and h <= height:
      return _box(rng.random(), rng.random(), h / height, w / width)
  ratio = min(max(width / height, aspect[0]), aspect[1])
  w, h = min(width, height * ratio), min(height, width / ratio)
  return _box(0.5, 0.5, h / height, w / width)


def multi_scale(
  rng: np.random.Generator,
  height: Number,
  width: Number,
  scales: Sequence[Number] = (1.0, 0.875, 0.75, 0.66),
) -> Box:
  """Samples a box of a fixed size at one of 13 positions (VideoMAE).

  Height and width are min(height, width) times equal or neighbouring entries of
  `scales`. The positions are the corners, the centre, the middles of the sides
  and the points at 1/4 and 3/4 of the free space.

  Args:
    rng: random generator.
    height: height of the frame in pixels.
    width: width of the frame in pixels.
    scales: sides of the box, relative to the shorter side of the frame.

  Returns:
    Box as fractions of the frame.
  """
  sizes = [
    (h, w)
    for i, h in enumerate(scales)
    for j, w in enumerate(scales)
    if abs(i - j) <= 1
  ]
  h, w = sizes[rng.integers(len(sizes))]
  top, left = PLACES[rng.integers(len(PLACES))]
  side = min(height, width)
  return _box(top, left, h * side / height, w * side / width)


_quarters = (0.25, 0.75)
_halves = (0.0, 0.5, 1.0)
PLACES = tuple((y, x) for y in _halves for x in _halves) + tuple(
  (y, x) for y in _quarters for x in _quarters
)


def centre(
  height: Number, width: Number, shape: Number, part: Number = 1.0
) -> Box:
  """Returns a centred box: `part` times the largest of this width / height."""
  return views(height, width, shape, 1, part)[0]


def views(
  height: Number, width: Number, shape: Number, count: int, part: Number = 1.0
) -> list[Box]:
  """Returns boxes spread evenly along the longer side, or one centred box.

  In a frame of 224x298, three views of 224x224 start at 0, 37 and 74.

  Args:
    height: height of the frame in pixels.
    width: width of the frame in pixels.
    shape: width / height of a view.
    count: number of views.
    part: side of a view as a fraction of the largest view that fits.

  Returns:
    Boxes as fractions of the frame.
  """
  w, h = min(width, height * shape) * part, min(height, width / shape) * part
  positions = [0.5] if count == 1 else [i / (count - 1) for i in range(count)]
  horizontal = width - w >= height - h
  return [
    _box(
      0.5 if horizontal else position,
      position if horizontal else 0.5,
      h / height,
      w / width,
    )
    for position in positions
  ]


def _box(top: Number, left: Number, height: Number, width: Number) -> Box:
  """Returns a box of a relative size; top and left divide the free space."""
  height, width = min(height, 1.0), min(width, 1.0)
  y, x = top * (1 - height), left * (1 - width)
  return y, x, y + height, x + width


class Orientation(NamedTuple):
  """Operations that bring a stored image upright, in this order.

  Attributes:
    transpose: whether rows and columns are exchanged.
    mirror: whether left and right are exchanged.
    flip: whether top and bottom are exchanged.
  """

  transpose: bool = False
  mirror: bool = False
  flip: bool = False


def turn(picture: np.ndarray, orientation: Orientation) -> np.ndarray:
  """Brings a stored image [H, W, ...] upright."""
  transpose, mirror, flip = orientation
  picture = picture.swapaxes(0, 1) if transpose else picture
  return picture[:: -1 if flip else 1, :: -1 if mirror else 1]


def turn_box(box: Box, orientation: Orientation) -> Box:
  """Transforms a box of the stored image to the upright image."""
  top, left, bottom, right = box
  if orientation.transpose:
    top, left, bottom, right = left, top, right, bottom
  if orientation.mirror:
    left, right = 1 - right, 1 - left
  if orientation.flip:
    top, bottom = 1 - bottom, 1 - top
  return top, left, bottom, right


def turn_back(box: Box, orientation: Orientation) -> Box:
  """Transforms a box of the upright image to the stored image."""
  transpose, mirror, flip = orientation
  # After a transpose, mirroring corresponds to flipping the stored image.
  mirror, flip = (flip, mirror) if transpose else (mirror, flip)
  return turn_box(box, Orientation(transpose, mirror, flip))
