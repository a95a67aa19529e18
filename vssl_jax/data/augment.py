"""RandAugment and random erasing of clips, for training with labels.

All frames of a clip are changed in the same way. The pixels are Pillow's work,
as in the published recipes; what is drawn, and how strong it is, is here.

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

from vssl_jax import colours

TOP = 10.0  # the highest level
CHANCE = 0.5  # of each operation that is drawn
GREY = 128  # fills what an operation uncovers
STREAM = 0x52414E44  # chance of its own: nothing else moves when this is on
ERASED_AREA = (0.02, 1 / 3)  # of the picture
ERASED_ASPECT = (0.3, 1 / 0.3)  # height / width

Picture = Image.Image
Operation = Callable[[Picture, int | float], Picture]


@dataclasses.dataclass(frozen=True)
class Policy:
  """RandAugment: how many operations, how strong.

  Attributes:
    level: 0 to 10.
    count: operations drawn; each is then carried out with probability 0.5.
    spread: standard deviation of the level.
  """

  level: float = 7.0
  count: int = 4
  spread: float = 0.5


@functools.lru_cache(maxsize=8)
def parse(text: str) -> Policy | None:
  """Reads a policy as papers write it, `rand-m7-n4-mstd0.5-inc1`.

  Args:
    text: '' for none. `m` is the level, `n` the number of operations, `mstd`
      the deviation of the level; `inc1`, strengths that grow with the level,
      is the only variant.

  Raises:
    ValueError: something else is asked for.
  """
  if not text:
    return None
  head, *parts = text.split('-')
  pairs = [re.fullmatch(r'(m|n|mstd|inc)(\d+(?:\.\d+)?)', p) for p in parts]
  found = {p[1]: float(p[2]) for p in pairs if p}
  whole = head == 'rand' and all(pairs) and len(found) == len(parts)
  level, count = found.get('m', -1.0), found.get('n', 0.0)
  possible = 0 <= level <= TOP and count >= 1 and count == int(count)
  if not whole or not possible or found.get('inc') != 1:
    raise ValueError(
      f"data.auto_augment: found {text!r}, wanted '' or the form "
      "'rand-m7-n4-mstd0.5-inc1' with m of 0 to 10 and inc1"
    )
  return Policy(level, int(count), found.get('mstd', 0.0))


def _fill(picture: Picture) -> int | tuple[int, int, int]:
  return GREY if picture.mode == 'L' else (GREY,) * 3


def affine(picture: Picture, matrix: Sequence[int | float]) -> Picture:
  """Takes each pixel (x, y) from (a x + b y + c, d x + e y + f), bicubic."""
  return picture.transform(
    picture.size,
    Image.Transform.AFFINE,
    tuple(matrix),
    resample=Image.Resampling.BICUBIC,
    fillcolor=_fill(picture),
  )


def rotate(picture: Picture, degrees: int | float) -> Picture:
  """Turns counter-clockwise about the centre, bicubic."""
  return picture.rotate(
    degrees, resample=Image.Resampling.BICUBIC, fillcolor=_fill(picture)
  )


def solarize_add(picture: Picture, amount: int | float) -> Picture:
  """Adds to every value below 128."""
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
    lambda level, _: 4 - int(level / TOP * 4),  # bits that stay
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
    _signed(0.45),  # of the side
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
    (name, strength) of those that are carried out, in order.
  """
  names = list(OPERATIONS)
  drawn = []
  for number in rng.integers(len(names), size=policy.count):
    done, sign = rng.random() < CHANCE, 1 if rng.random() < 0.5 else -1
    level = min(max(rng.normal(policy.level, policy.spread), 0.0), TOP)
    if done:
      name = names[number]
      drawn.append((name, OPERATIONS[name][1](level, sign)))
  return drawn


def rand_augment(
  video: UInt8[np.ndarray, 'T H W C'],
  policy: Policy,
  rng: np.random.Generator,
) -> None:
  """Changes all frames of a clip by the same operations, in place."""
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
  """Fills one box with noise, the same box in all frames, in place.

  After the clip is normalised the noise has mean 0 and deviation 1.

  Args:
    video: a clip.
    probability: that anything is erased.
    rng: source of chance.
    mean: of `colours.of`.
    std: likewise.
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
  """Augments clips of one video in place, each in a way of its own.

  Args:
    video: the clips, cropped and flipped.
    auto_augment: see `parse`.
    erasing: probability of an erased box.
    entropy: seeds; they decide everything.
    mean: of `colours.of`, for the box.
    std: likewise.
  """
  policy = parse(auto_augment)
  for number, clip in enumerate(video):
    rng = np.random.default_rng([*entropy, STREAM, number])
    if policy is not None:
      rand_augment(clip, policy, rng)
    if erasing:
      erase(clip, erasing, rng, mean, std)
