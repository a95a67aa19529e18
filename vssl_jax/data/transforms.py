"""Which frames and which part of them make a clip: plain functions of numbers.

Boxes are (top, left, bottom, right) in fractions of the picture as it is meant
to be seen: rotated, with square pixels. All chance comes from the generator
that is passed in.
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
  """Numbers of `frames` frames, every stride-th, starting anywhere that fits.

  A video that is too short repeats its last reachable frame.

  Args:
    count: frames in the video.
    frames: frames in the clip.
    stride: distance of neighbours, in frames.
    chance: in [0, 1), where to start.

  Returns:
    int64 [frames].
  """
  span = (frames - 1) * stride + 1
  start = int(chance * (max(count - span, 0) + 1))
  return _reachable(start + np.arange(frames) * stride, count, stride, start)


def linspace(
  count: int, frames: int, stride: int, chance: Number
) -> Int[np.ndarray, 'T']:
  """Numbers of frames spread over `frames * stride` neighbours, ends included.

  Of 16 frames with stride 4 they are 0, 4, 8, 12, 17, ... 59, 63 after the
  start. A video that is too short gives count // stride frames spread over all
  of it, and repeats its last one.

  Args:
    count: frames in the video.
    frames: frames in the clip.
    stride: mean distance of neighbours, in frames.
    chance: in [0, 1), where to start.

  Returns:
    int64 [frames].

  Source: VideoMAE and MVD, `kinetics.py`, `loadvideo_decord`.
  """
  span = frames * stride
  if count > span:
    start = int(chance * (count - span))
    steps = np.linspace(0, span, frames)
    return start + np.minimum(steps, span - 1).astype(np.int64)
  spread_out = np.linspace(0, count, count // stride)
  rest = np.full(frames - len(spread_out), count)
  ticks = np.concatenate([spread_out, rest])
  return np.minimum(ticks, count - 1).astype(np.int64)


def part(
  count: int, frames: int, stride: int, chance: Number, which: int, parts: int
) -> Int[np.ndarray, 'T']:
  """Frame numbers of a window inside one of `parts` equal parts of the video.

  Parts have count // parts frames. The window starts anywhere in its part
  where `frames * stride` frames fit. Where they do not, windows start at equal
  distances from the first frame on, without chance.

  Args:
    count: frames in the video.
    frames: frames in the clip.
    stride: distance of neighbours, in frames.
    chance: in [0, 1), where to start.
    which: number of the part.
    parts: how many there are.

  Returns:
    int64 [frames].

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
  """One frame out of each of `frames` equal parts of the video.

  Args:
    count: frames in the video.
    frames: parts.
    chances: [frames] in [0, 1), where in its part each lies.
  """
  ticks = (np.arange(frames) + chances) * (count / frames)
  return np.minimum(ticks.astype(np.int64), count - 1)


def spread(
  count: int, frames: int, stride: int, segments: int
) -> Int[np.ndarray, 'segments T']:
  """Evenly spaced windows over a whole video, for evaluation.

  Every stride-th frame of the video makes a list; windows of `frames` entries
  start at floor(i * (length - frames) / (segments - 1)), a single one in the
  middle. 300 frames, stride 4, 16 frames, 5 segments start at 0, 14, 29, 44
  and 59 of 75.

  Returns:
    int64 [segments, frames].
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
  """Samplings of a whole video that lie between each other (SSv2 testing).

  The count - 1 steps from the first frame to the last are cut into `frames`
  equal parts, and each part into `segments` pieces. Two samplings lie at 1/4
  and 3/4 of each part, a single one in its middle.

  Returns:
    int64 [segments, frames]; sampling i takes the middle of the i-th piece of
    each part.

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
  """A box of random area and shape, the crop of image classification.

  Ten tries of area ~ U(scale) and log width/height ~ U(log aspect); if none
  fits, the largest centred box whose shape is within `aspect`.

  Args:
    rng: source of chance.
    height: of the picture, in pixels.
    width: of the picture, in pixels.
    scale: smallest and largest fraction of the area.
    aspect: smallest and largest width / height.
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
  """A box from a fixed list of sizes at one of 13 fixed places (VideoMAE).

  Sides are min(height, width) times two neighbours in `scales`; places are
  the corners, the centre, the middles of the sides and of the quarters.
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
  """The largest centred box of this width / height, shrunk to `part`."""
  return views(height, width, shape, 1, part)[0]


def views(
  height: Number, width: Number, shape: Number, count: int, part: Number = 1.0
) -> list[Box]:
  """Boxes spread evenly along the longer side; one alone is centred.

  224x298 with three views of 224x224 starts them at 0, 37 and 74.

  Args:
    height: of the picture, in pixels.
    width: of the picture, in pixels.
    shape: width / height of a view.
    count: views.
    part: side of a view as a fraction of the largest that fits.
  """
  w, h = min(width, height * shape) * part, min(height, width / shape) * part
  places = [0.5] if count == 1 else [i / (count - 1) for i in range(count)]
  wide = width - w >= height - h
  return [
    _box(0.5 if wide else p, p if wide else 0.5, h / height, w / width)
    for p in places
  ]


def _box(top: Number, left: Number, height: Number, width: Number) -> Box:
  """A box of this relative size; top and left say where in the free room."""
  height, width = min(height, 1.0), min(width, 1.0)
  y, x = top * (1 - height), left * (1 - width)
  return y, x, y + height, x + width


class Orientation(NamedTuple):
  """How a stored picture is brought upright.

  Attributes:
    transpose: whether rows and columns are exchanged, first of all.
    mirror: whether left and right are exchanged then.
    flip: whether top and bottom are exchanged then.
  """

  transpose: bool = False
  mirror: bool = False
  flip: bool = False


def turn(picture: np.ndarray, orientation: Orientation) -> np.ndarray:
  """Brings a picture [H, W, ...] upright."""
  transpose, mirror, flip = orientation
  picture = picture.swapaxes(0, 1) if transpose else picture
  return picture[:: -1 if flip else 1, :: -1 if mirror else 1]


def turn_box(box: Box, orientation: Orientation) -> Box:
  """Returns where a box of the stored picture lies in the upright one."""
  top, left, bottom, right = box
  if orientation.transpose:
    top, left, bottom, right = left, top, right, bottom
  if orientation.mirror:
    left, right = 1 - right, 1 - left
  if orientation.flip:
    top, bottom = 1 - bottom, 1 - top
  return top, left, bottom, right


def turn_back(box: Box, orientation: Orientation) -> Box:
  """Returns where a box of the upright picture lies in the stored one."""
  transpose, mirror, flip = orientation
  # A transposed picture is mirrored where the stored one has to be flipped.
  mirror, flip = (flip, mirror) if transpose else (mirror, flip)
  return turn_box(box, Orientation(transpose, mirror, flip))
