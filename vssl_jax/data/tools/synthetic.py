"""Generates labelled video files whose classes differ in motion only.

A few textured shapes with the same motion cross a shaking, textured background.
The scene wraps around at the edges. Position, angle, size, colour and phase
have the same distributions for all classes, and wrapping preserves them in
every frame. By construction a single frame therefore has the same distribution
for all classes, and only motion distinguishes them.
"""

import csv
import dataclasses
import json
import os
import pathlib
import re
import zlib
from collections.abc import Mapping

import av
import numpy as np
from absl import logging
from jaxtyping import Float, UInt8

MOTIONS = (
  'right',
  'left',
  'down',
  'up',
  'clockwise',
  'anticlockwise',
  'orbit_clockwise',
  'orbit_anticlockwise',
  'sway',
  'bob',
)
VERSION = 1  # Increase it when the same seed generates other clips.


@dataclasses.dataclass(frozen=True)
class Scene:
  """Parameters of clips; lengths are in pixels of a frame `size` pixels wide.

  Ranges are `(low, high)` of uniform distributions, sampled once per clip.

  Attributes:
    size: height and width in pixels, even (as the video codec requires).
    frames: frames per clip.
    fps: frames per second written into the file; motion is per frame.
    speed: speed of straight paths and top speed of the others, pixels/frame.
    turn: degrees per frame of rotating shapes.
    period: frames per cycle of orbits and swings.
    radius: half the longer axis of the shape, pixels.
    slenderness: longer over shorter axis, so that rotation is visible.
    contrast: mean brightness of the shape against the background's, 0 to 1.
    polarity: 'bright', 'dark' or 'both' (each with probability 0.5).
    texture: amplitude of the shape's texture, 0 to 1.
    background: amplitude of the background's texture, 0 to 1.
    detail: highest spatial frequency of the background, cycles per frame.
    shake: standard deviation of the background's position per frame, pixels.
    flicker: standard deviation of a brightness offset per frame, 0 to 1.
    shapes: shapes that share the motion.
    distractors: shapes that do not move.
    noise: standard deviation of pixel noise, 0 to 1.
  """

  size: int = 32
  frames: int = 8
  fps: int = 8
  speed: tuple[float, float] = (2.0, 3.5)
  turn: tuple[float, float] = (20.0, 30.0)
  period: tuple[float, float] = (7.0, 10.0)
  radius: tuple[float, float] = (3.0, 4.5)
  slenderness: tuple[float, float] = (1.5, 2.2)
  contrast: tuple[float, float] = (0.5, 0.7)
  polarity: str = 'bright'
  texture: float = 0.05
  background: float = 0.05
  detail: int = 2
  shake: float = 0.5
  flicker: float = 0.0
  shapes: int = 4
  distractors: int = 0
  noise: float = 0.0

  def __post_init__(self) -> None:
    if self.size % 2 or self.size < 16:
      raise ValueError(f'size={self.size}: wanted an even number >= 16.')
    if self.polarity not in ('bright', 'dark', 'both'):
      raise ValueError(
        f"polarity={self.polarity!r}: wanted 'bright', 'dark' or 'both'."
      )


def path(
  motion: str, scene: Scene, rng: np.random.Generator
) -> tuple[Float[np.ndarray, 'T 2'], Float[np.ndarray, 'T']]:
  """Samples the path of a shape, relative to its start position and angle.

  Args:
    motion: one of `MOTIONS`.
    scene: ranges of speed, turn and period.
    rng: random generator, used in the same order for every motion.

  Returns:
    Offsets (x to the right, y downwards) in pixels, [T, 2], and angles in
    radians (clockwise as seen on the screen), [T].

  Raises:
    ValueError: the motion is unknown.
  """
  t = np.arange(scene.frames, dtype=np.float32)
  speed = rng.uniform(*scene.speed)
  turn = np.deg2rad(rng.uniform(*scene.turn))
  cycle = 2 * np.pi / rng.uniform(*scene.period)  # Radians per frame.
  phase = rng.uniform(0, 2 * np.pi)
  swing = speed / cycle  # This radius makes `speed` the (top) speed.
  zero = np.zeros_like(t)
  cos, sin = (swing * f(cycle * t + phase) for f in (np.cos, np.sin))
  paths = {
    'right': (speed * t, zero, zero),
    'left': (-speed * t, zero, zero),
    'down': (zero, speed * t, zero),
    'up': (zero, -speed * t, zero),
    'clockwise': (zero, zero, turn * t),
    'anticlockwise': (zero, zero, -turn * t),
    'orbit_clockwise': (cos, sin, zero),
    'orbit_anticlockwise': (cos, -sin, zero),
    'sway': (sin, zero, zero),
    'bob': (zero, sin, zero),
  }
  if motion not in paths:
    raise ValueError(f'motion {motion!r}: wanted one of {", ".join(MOTIONS)}.')
  x, y, angle = paths[motion]
  return np.stack([x, y], -1).astype(np.float32), angle.astype(np.float32)


def render(
  motion: str, scene: Scene, rng: np.random.Generator
) -> UInt8[np.ndarray, 'T H W 3']:
  """Renders one clip.

  Args:
    motion: one of `MOTIONS`.
    scene: parameters of the clip.
    rng: random generator, used in the same order for every motion.

  Returns:
    RGB frames, [T, size, size, 3].
  """
  offsets, angles = path(motion, scene, rng)
  video = _background(scene, rng)
  sign = {'bright': 1, 'dark': -1, 'both': rng.choice([-1, 1])}[scene.polarity]
  still = np.zeros_like(offsets), np.zeros_like(angles)
  for index in range(scene.distractors + scene.shapes):
    moving = index >= scene.distractors  # Last, so that they are in front.
    cover, shade = _shape(scene, rng, *((offsets, angles) if moving else still))
    tint = rng.uniform(-0.08, 0.08, 3)
    level = 0.5 + sign * (rng.uniform(*scene.contrast) + tint) / 2
    colour = level.astype(np.float32) + shade[..., None]
    video += cover[..., None] * (colour - video)
  video += rng.normal(0, scene.flicker, (scene.frames, 1, 1, 1))
  if scene.noise:
    video += rng.normal(0, scene.noise, video.shape)
  return (np.clip(video, 0, 1) * 255 + 0.5).astype(np.uint8)


def write(
  folder: str | os.PathLike[str],
  *,
  clips: int | Mapping[str, int],
  seed: int = 0,
  **scene: object,
) -> pathlib.Path:
  """Writes a labelled set of video files, unless it exists.

  The files are `<folder>/<split>/<motion>/<number>.mp4` and
  `<folder>/labels.csv` (path, label, split). Each split is a folder of class
  folders. The label list is written last: without it, a folder is incomplete
  and is generated again; with it, nothing is written.

  Args:
    folder: output folder.
    clips: clips per split (`{'train': 2560, 'test': 500}`), or of 'train'.
    seed: seed of the set; no two splits share a clip.
    **scene: fields of `Scene`.

  Returns:
    The path of the label list.

  Raises:
    ValueError: the folder holds clips of another recipe, or other files.
  """
  look = Scene(**scene)
  folder = pathlib.Path(folder)
  splits = {'train': clips} if isinstance(clips, int) else dict(clips)
  recipe = json.loads(
    json.dumps(
      {'version': VERSION, 'seed': seed, 'clips': splits}
      | dataclasses.asdict(look)
    )
  )
  labels = folder / 'labels.csv'
  if _finished(folder, recipe):
    return labels
  rows = []
  logging.info('Writing %s generated clips into %s.', splits, folder)
  for split, count in splits.items():
    for motion in MOTIONS[:count]:
      (folder / split / motion).mkdir(parents=True, exist_ok=True)
    for index in range(count):
      motion = MOTIONS[index % len(MOTIONS)]
      name = f'{split}/{motion}/{index:06d}.mp4'
      encode(folder / name, clip(motion, look, seed, split, index), look.fps)
      rows.append((name, motion, split))
  unfinished = labels.with_suffix('.unfinished')
  with unfinished.open('w', newline='') as file:
    csv.writer(file).writerows([('path', 'label', 'split'), *rows])
  unfinished.replace(labels)
  return labels


def clip(
  motion: str, scene: Scene, seed: int, split: str, index: int
) -> UInt8[np.ndarray, 'T H W 3']:
  """Renders the clip with an index, as a pure function of the arguments.

  Args:
    motion: one of `MOTIONS`.
    scene: parameters of the clip.
    seed: seed of the whole set.
    split: name of the split.
    index: index within the split.

  Returns:
    RGB frames, [T, size, size, 3].
  """
  rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index])
  return render(motion, scene, rng)


def encode(
  file: str | os.PathLike[str],
  video: UInt8[np.ndarray, 'T H W 3'],
  fps: int,
) -> None:
  """Writes frames as H.264 in mp4, with almost lossless brightness.

  Args:
    file: path of the file, which is overwritten.
    video: RGB frames with even height and width, [T, H, W, 3].
    fps: frames per second.
  """
  with av.open(os.fspath(file), 'w', format='mp4') as container:
    stream = container.add_stream('libx264', rate=fps)
    stream.height, stream.width = video.shape[1:3]
    stream.pix_fmt = 'yuv420p'
    stream.thread_count = 1
    stream.options = {'crf': '8', 'preset': 'veryfast', 'bf': '0'}
    # With lookahead, one file in two thousand was not bit-identical.
    stream.options |= {'rc-lookahead': '0', 'mbtree': '0'}
    for picture in video:
      frame = av.VideoFrame.from_ndarray(picture, format='rgb24')
      container.mux(stream.encode(frame))
    container.mux(stream.encode())


def _waves(
  x: Float[np.ndarray, '...'],
  y: Float[np.ndarray, '...'],
  frequencies: Float[np.ndarray, 'K 2'],
  rng: np.random.Generator,
) -> Float[np.ndarray, '...']:
  """Samples a smooth texture: plane waves of random phase, variance 0.5."""
  total = np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)
  for fx, fy in frequencies.astype(np.float32):
    total += np.cos(fx * x + fy * y + np.float32(rng.uniform(0, 2 * np.pi)))
  return total / np.float32(np.sqrt(len(frequencies)))


def _background(
  scene: Scene, rng: np.random.Generator
) -> Float[np.ndarray, 'T H W 3']:
  """Samples waves around mid-grey, with a random shift in every frame."""
  line = np.arange(scene.size, dtype=np.float32)
  shake = rng.normal(0, scene.shake, (scene.frames, 2)).astype(np.float32)
  x = line[None, None, :] + shake[:, :1, None]
  y = line[None, :, None] + shake[:, 1:, None]
  cycles = rng.integers(-scene.detail, scene.detail + 1, (4, 2))
  texture = _waves(x, y, cycles * (2 * np.pi / scene.size), rng)
  colour = 0.5 + rng.uniform(-0.06, 0.06, 3)
  return (colour + scene.background * texture[..., None]).astype(np.float32)


def _shape(
  scene: Scene,
  rng: np.random.Generator,
  offsets: Float[np.ndarray, 'T 2'],
  angles: Float[np.ndarray, 'T'],
) -> tuple[Float[np.ndarray, 'T H W'], Float[np.ndarray, 'T H W']]:
  """Samples one shape: cover (0 outside, 1 inside, soft edge) and texture."""
  size = np.float32(scene.size)
  position = rng.uniform(0, scene.size, 2).astype(np.float32) + offsets
  angle = np.float32(rng.uniform(0, 2 * np.pi)) + angles
  long = np.float32(rng.uniform(*scene.radius))
  short = np.float32(long / rng.uniform(*scene.slenderness))
  power = int(rng.choice([2, 6]))  # An ellipse, or a box with round corners.
  line = np.arange(scene.size, dtype=np.float32)
  # Relative to the nearest copy of the shape, because the scene wraps around.
  x = (line[None, :] - position[:, :1] + size / 2) % size - size / 2
  y = (line[None, :] - position[:, 1:] + size / 2) % size - size / 2
  x, y = x[:, None, :], y[:, :, None]
  cos, sin = (f(angle)[:, None, None] for f in (np.cos, np.sin))
  u, v = (cos * x + sin * y) / long, (cos * y - sin * x) / short
  distance = (u**power + v**power) ** np.float32(1 / power)
  cover = np.clip((1 - distance) * short + np.float32(0.5), 0, 1)
  shade = scene.texture * _waves(u, v, rng.uniform(-6, 6, (2, 2)), rng)
  return cover, shade.astype(np.float32)


def _read(note: pathlib.Path) -> dict[str, object]:
  try:
    recipe = json.loads(note.read_bytes())
    return recipe if isinstance(recipe, dict) else {}
  except ValueError as error:
    raise ValueError(
      f'{note} is corrupt ({error}): remove {note.parent} to have its clips '
      'generated again'
    ) from error


# Files that `write` generates, relative to the folder.
_OWN = re.compile(r'recipe\.json|labels\.unfinished|[^/]+/[^/]+/\d{6}\.mp4')


def _finished(folder: pathlib.Path, recipe: Mapping[str, object]) -> bool:
  """Returns whether the folder already holds the complete set.

  Otherwise prepares the folder and writes the recipe.

  Raises:
    ValueError: the folder holds clips of another recipe, or other files.
  """
  note = folder / 'recipe.json'
  if not note.exists():
    if folder.exists() and any(folder.iterdir()):
      raise ValueError(
        f'{folder} holds files that were not generated here: choose another '
        'folder, or empty it.'
      )
  elif (saved := _read(note)) != recipe:
    keys = sorted(
      key
      for key in saved.keys() | recipe.keys()
      if saved.get(key) != recipe.get(key)
    )
    raise ValueError(
      f'{folder} holds clips of another recipe: '
      + ', '.join(
        f'{k}={saved.get(k)!r}, wanted {recipe.get(k)!r}' for k in keys
      )
      + '. Choose another folder, or remove it.'
    )
  elif (folder / 'labels.csv').exists():
    return True
  # An incomplete set is overwritten.
  for path in folder.rglob('*') if folder.exists() else ():
    name = str(path.relative_to(folder))
    if path.is_file() and not _OWN.fullmatch(name):
      raise ValueError(
        f'{folder} is to be completed and holds {name}, which was not '
        'generated here: move it away, or choose another folder.'
      )
  folder.mkdir(parents=True, exist_ok=True)
  note.write_text(json.dumps(recipe, indent=2))
  return False
