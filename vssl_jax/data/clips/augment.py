"""RandAugment and random erasing of clips, for training with labels.

All frames of a clip are changed in the same way. Pillow computes the pixels, as
in the published recipes. This module draws the operations and their strengths.

Sources: RandAugment, arXiv 1909.13719; its increasing variant and strengths as
in timm, which V-JEPA 2, VideoMAE and MVD use; random erasing, arXiv 1708.04896.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps

from vssl_jax.utils import colours

TOP = 10.0  # the highest level
CHANCE = 0.5  # probability of each drawn operation
GREY = 128  # fills pixels outside of the source image
STREAM = 0x52414E44  # own random stream: augmentation shifts no other stream
ERASED_AREA = (0.02, 1 / 3)  # fraction of the image
ERASED_ASPECT = (0.3, 1 / 0.3)  # height / width

Picture = Image.Image
Operation = Callable[[Picture, int | float], Picture]


@dataclasses.dataclass(frozen=True)
class Policy:
  """RandAugment policy.

  Attributes:
    level: mean level (strength), 0 to 10.
    count: number of drawn operations; each is applied with probability 0.5.
    spread: standard deviation of the level.
  """

  level: float = 7.0
  count: int = 4
  spread: float = 0.5


@functools.lru_cache(maxsize=8)
def parse(text: str) -> Policy | None:
  """Parses a RandAugment policy as written in papers.

  Args:
    text: such as `rand-m7-n4-mstd0.5-inc1`, or '' for none. `m` is the level,
      `n` the number of operations, `mstd` the standard deviation of the level.
      `inc1` (strengths that increase with the level) is required.

  Returns:
    The policy, or None for ''.

  Raises:
    ValueError: the text has another form or a value out of range.
  """
  if not text:
    return None
  head, *parts = text.split('-')
  matches = [
    re.fullmatch(r'(m|n|mstd|inc)(\d+(?:\.\d+)?)', match) for match in parts
  ]
  values = {match[1]: float(match[2]) for match in matches if match}
  well_formed = head == 'rand' and all(matches) and len(values) == len(parts)
  level, count = values.get('m', -1.0), values.get('n', 0.0)
  in_range = 0 <= level <= TOP and count >= 1 and count == int(count)
  if not well_formed or not in_range or values.get('inc') != 1:
    raise ValueError(
      f"data.auto_augment: found {text!r}, wanted '' or the form "
      "'rand-m7-n4-mstd0.5-inc1' with m of 0 to 10 and inc1"
    )
  return Policy(level, int(count), values.get('mstd', 0.0))


def _fill(picture: Picture) -> int | tuple[int, int, int]:
  return GREY if picture.mode == 'L' else (GREY,) * 3


def affine(picture: Picture, matrix: Sequence[int | float]) -> Picture:
  """Samples pixel (x, y) at (a x + b y + c, d x + e y + f), bicubic."""
  return picture.transform(
    picture.size,
    Image.Transform.AFFINE,
    tuple(matrix),
    resample=Image.Resampling.BICUBIC,
    fillcolor=_fill(picture),
  )


def rotate(picture: Picture, degrees: int | float) -> Picture:
  """Rotates counter-clockwise about the centre, bicubic."""
  return picture.rotate(
    degrees, resample=Image.Resampling.BICUBIC, fillcolor=_fill(picture)
  )


def solarize_add(picture: Picture, amount: int | float) -> Picture:
  """Adds an amount to every value below 128."""
  table = [min(255, i + int(amount)) if i < 128 else i for i in range(256)]
  return picture.point(table * len(picture.getbands()))


def _signed(largest: float) -> Callable[[float, int], float]:
  return lambda level, sign: sign * level / TOP * largest


def _enhance(level: float, sign: int) -> float:
  return 1 + sign * level / TOP * 0.9


# Name -> the operation, and its strength from a level of 0 to 10 and a sign.
OPERATIONS: dict[str, tuple[Operation, Callable[[float, int], int | float]]] = {
  'auto_contrast': (lambda p, _: ImageOps.autocontrast(p), lambda *_: 0),
  'equalize': (lambda p, _: ImageOps.equalize(p), lambda *_: 0),
  'invert': (lambda p, _: ImageOps.invert(p), lambda *_: 0),
  'rotate': (rotate, _signed(30.0)),  # degrees
  'posterize': (
    lambda p, bits: ImageOps.posterize(p, int(bits)),
    lambda level, _: 4 - int(level / TOP * 4),  # remaining bits
  ),
  'solarize': (
    lambda p, threshold: ImageOps.solarize(p, int(threshold)),
    lambda level, _: 256 - int(level / TOP * 256),
  ),
  'solarize_add': (solarize_add, lambda level, _: int(level / TOP * 110)),
  'color': (lambda p, x: ImageEnhance.Color(p).enhance(x), _enhance),
  'contrast': (lambda p, x: ImageEnhance.Contrast(p).enhance(x), _enhance),
  'brightness': (lambda p, x: ImageEnhance.Brightness(p).enhance(x), _enhance),
  'sharpness': (lambda p, x: ImageEnhance.Sharpness(p).enhance(x), _enhance),
  'shear_x': (lambda p, x: affine(p, (1, x, 0, 0, 1, 0)), _signed(0.3)),
  'shear_y': (lambda p, x: affine(p, (1, 0, 0, x, 1, 0)), _signed(0.3)),
  'translate_x': (
    lambda p, x: affine(p, (1, 0, x * p.width, 0, 1, 0)),
    _signed(0.45),  # fraction of the side
  ),
  'translate_y': (
    lambda p, x: affine(p, (1, 0, 0, 0, 1, x * p.height)),
    _signed(0.45),
  ),
}


def draw(
  policy: Policy, rng: np.random.Generator
) -> list[tuple[str, int | float]]:
  """Draws the operations of one clip.

  Returns:
    (name, strength) of the operations to apply, in order.
  """
  names = list(OPERATIONS)
  drawn = []
  for index in rng.integers(len(names), size=policy.count):
    applied, sign = rng.random() < CHANCE, 1 if rng.random() < 0.5 else -1
    level = min(max(rng.normal(policy.level, policy.spread), 0.0), TOP)
    if applied:
      name = names[index]
      drawn.append((name, OPERATIONS[name][1](level, sign)))
  return drawn


def rand_augment(
  video: UInt8[np.ndarray, 'T H W C'],
  policy: Policy,
  rng: np.random.Generator,
) -> None:
  """Applies the same random operations to all frames of a clip, in place."""
  operations = draw(policy, rng)
  if not operations:
    return
  for frame in video:
    grey = frame.shape[-1] == 1
    picture = Image.fromarray(frame[..., 0] if grey else frame)
    for name, strength in operations:
      picture = OPERATIONS[name][0](picture, strength)
    frame[...] = np.asarray(picture).reshape(frame.shape)


def erase(
  video: UInt8[np.ndarray, 'T H W C'],
  probability: float,
  rng: np.random.Generator,
  mean: Sequence[int | float] = (),
  std: Sequence[int | float] = (),
) -> None:
  """Fills one random box with noise, the same box in all frames, in place.

  In the normalised clip the noise has mean 0 and standard deviation 1.

  Args:
    video: uint8 [T, H, W, C], a clip.
    probability: probability that a box is erased.
    rng: random generator.
    mean: pixel means, see `colours.of`.
    std: pixel standard deviations, see `colours.of`.
  """
  if rng.random() >= probability:
    return
  frames, height, width, channels = video.shape
  for _ in range(100):
    area = rng.uniform(*ERASED_AREA) * height * width
    low, high = (math.log(x) for x in ERASED_ASPECT)
    aspect = math.exp(rng.uniform(low, high))
    h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if h < height and w < width:
      break
  else:
    return
  top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
  noise = rng.standard_normal((frames, h, w, channels), np.float32)
  mean, std = colours.of(channels, mean, std)
  noise *= np.asarray([255 * x for x in std], np.float32)
  noise += np.asarray([255 * x for x in mean], np.float32)
  box = video[:, top : top + h, left : left + w]
  box[...] = np.clip(np.rint(noise), 0, 255).astype(np.uint8)


def clips(
  video: UInt8[np.ndarray, 'clips T H W C'],
  auto_augment: str,
  erasing: float,
  entropy: Sequence[int],
  mean: Sequence[int | float] = (),
  std: Sequence[int | float] = (),
) -> None:
  """Augments the clips of one video in place, each clip independently.

  Args:
    video: uint8 [clips, T, H, W, C], cropped and flipped clips.
    auto_augment: RandAugment policy, see `parse`.
    erasing: probability of random erasing, per clip.
    entropy: seeds of all random choices.
    mean: pixel means for the erased box, see `colours.of`.
    std: pixel standard deviations, see `colours.of`.
  """
  policy = parse(auto_augment)
  for index, clip in enumerate(video):
    rng = np.random.default_rng([*entropy, STREAM, index])
    if policy is not None:
      rand_augment(clip, policy, rng)
    if erasing:
      erase(clip, erasing, rng, mean, std)
