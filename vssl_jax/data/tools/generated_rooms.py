"""Generates rooms with exact depth, to test the depth readout without data.

    python -m vssl_jax.data.tools.generated_rooms --out=rooms

A camera moves through a box-shaped room with a few balls in it. Walls and balls
have a checkerboard of known size, so their distance is visible in the image.
Depth is computed from the geometry, pixel by pixel. The files have the layout
that `sources.scenes` reads, with depth in millimetres. Some pixels have no
measurement.
"""

import argparse
import dataclasses
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8, UInt16
from PIL import Image

UNITS = 1000  # units per metre in the depth images


@dataclasses.dataclass(frozen=True)
class Look:
  """Parameters of rooms and camera; lengths in metres.

  Attributes:
    height: height of the images in pixels.
    width: width of the images in pixels.
    frames: frames per scene.
    focal: focal length as a fraction of the width.
    size: smallest and largest half-width and half-length of a room.
    balls: balls per room.
    check: side of the squares of the checkerboard.
    speed: speed of the camera in metres per frame.
    turn: rotation of the camera in radians per frame.
    missing: fraction of pixels without a measurement.
  """

  height: int = 48
  width: int = 64
  frames: int = 24
  focal: float = 0.8
  size: tuple[float, float] = (1.5, 3.0)
  balls: int = 4
  check: float = 0.4
  speed: float = 0.03
  turn: float = 0.02
  missing: float = 0.02


def rays(look: Look) -> Float[np.ndarray, 'h w 3']:
  """Returns the ray of each pixel: x right, y down, z forward with z = 1."""
  x = (np.arange(look.width) + 0.5 - look.width / 2) / (look.focal * look.width)
  y = np.arange(look.height) + 0.5 - look.height / 2
  y = y / (look.focal * look.width)
  x, y = np.meshgrid(x, y)
  return np.stack([x, y, np.ones_like(x)], -1)


def walls(
  place: Float[np.ndarray, '3'],
  toward: Float[np.ndarray, 'h w 3'],
  half: Float[np.ndarray, '3'],
) -> tuple[Float[np.ndarray, 'h w'], Float[np.ndarray, 'h w']]:
  """Intersects rays with the walls of a room around the origin, from inside.

  Args:
    place: [3], position of the camera in metres.
    toward: [h, w, 3], directions of the rays.
    half: [3], half of the sides of the room in metres.

  Returns:
    Distances to the wall in units of the directions, [h, w], and indices of the
    walls from 0 to 5, [h, w].
  """
  with np.errstate(divide='ignore'):
    reach = (np.where(toward > 0, half, -half) - place) / toward
  reach = np.where(toward == 0, np.inf, reach)
  axis = reach.argmin(-1)
  side = np.take_along_axis(toward, axis[..., None], -1)[..., 0] > 0
  return reach.min(-1), axis * 2.0 + side


def ball(
  place: Float[np.ndarray, '3'],
  toward: Float[np.ndarray, 'h w 3'],
  centre: Float[np.ndarray, '3'],
  radius: float,
) -> Float[np.ndarray, 'h w']:
  """Intersects rays with a ball.

  Args:
    place: [3], position of the camera in metres.
    toward: [h, w, 3], directions of the rays.
    centre: [3], centre of the ball in metres.
    radius: radius of the ball in metres.

  Returns:
    Distances to the ball in units of the directions, [h, w]; infinity for rays
    that miss it.
  """
  away = place - centre
  a = (toward**2).sum(-1)
  b = (toward * away).sum(-1)
  inside = b**2 - a * ((away**2).sum() - radius**2)
  near = (-b - np.sqrt(np.maximum(inside, 0))) / a
  return np.where((inside > 0) & (near > 0), near, np.inf)


def render(
  look: Look, rng: np.random.Generator
) -> tuple[UInt8[np.ndarray, 'T h w 3'], UInt16[np.ndarray, 'T h w']]:
  """Renders one scene.

  Args:
    look: parameters of the scene.
    rng: random generator.

  Returns:
    Colour images uint8 [T, h, w, 3], and depth along the camera's axis in
    millimetres, uint16 [T, h, w], 0 for pixels without a measurement.
  """
  half = np.asarray([rng.uniform(*look.size), 1.25, rng.uniform(*look.size)])
  colours = rng.uniform(0.3, 0.9, (6 + look.balls, 3))
  centres = rng.uniform(-0.8, 0.8, (look.balls, 3)) * half
  radii = rng.uniform(0.15, 0.45, look.balls)
  position = rng.uniform(-0.5, 0.5, 3) * half
  yaw, sway = rng.uniform(0, 2 * np.pi), rng.choice([-1, 1]) * look.turn
  step = rng.normal(size=3) * (1, 0.2, 1)
  step *= look.speed / np.linalg.norm(step)
  video, depth = [], []
  for _ in range(look.frames):
    # The camera reverses before it reaches a wall.
    step = np.where(np.abs(position + step) > half - 0.3, -step, step)
    position, yaw = position + step, yaw + sway
    cos, sin = np.cos(yaw), np.sin(yaw)
    turn = np.asarray([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
    toward = rays(look) @ turn.T
    reach, surface = walls(position, toward, half)
    for index, (centre, radius) in enumerate(zip(centres, radii, strict=True)):
      near = ball(position, toward, centre, radius)
      surface = np.where(near < reach, 6.0 + index, surface)
      reach = np.minimum(near, reach)
    points = position + reach[..., None] * toward
    video.append(_paint(points, surface, colours, look))
    # Directions have z = 1, so the distance in their units is the depth.
    measured = rng.random(reach.shape) >= look.missing
    depth.append(np.where(measured, np.round(UNITS * reach), 0))
  return np.stack(video), np.stack(depth).astype(np.uint16)


def _paint(
  points: Float[np.ndarray, 'h w 3'],
  surface: Float[np.ndarray, 'h w'],
  colours: Float[np.ndarray, 'n 3'],
  look: Look,
) -> UInt8[np.ndarray, 'h w 3']:
  """Colours the points by surface, with a checkerboard fixed in space."""
  cells = np.floor(points / look.check).sum(-1) % 2
  shade = (0.6 + 0.4 * cells)[..., None]
  pixels = colours[surface.astype(np.int64)] * shade
  return (pixels * 255).round().astype(np.uint8)


def write(
  folder: str | os.PathLike[str],
  *,
  scenes: int,
  seed: int = 0,
  look: Look | None = None,
) -> pathlib.Path:
  """Writes scenes as `<folder>/room_0000/{color,depth}/000000.png`.

  Args:
    folder: output folder; existing scenes are overwritten.
    scenes: number of scenes.
    seed: seed of the rooms.
    look: parameters of the rooms; None for the defaults.

  Returns:
    The output folder.
  """
  folder = pathlib.Path(folder)
  for index in range(scenes):
    rng = np.random.default_rng([seed, index])
    video, depth = render(look or Look(), rng)
    for kind, pictures in (('color', video), ('depth', depth)):
      kind_folder = folder / f'room_{index:04d}' / kind
      kind_folder.mkdir(parents=True, exist_ok=True)
      for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(kind_folder / f'{i:06d}.png')
  return folder


def main(argv: Sequence[str] | None = None) -> None:
  """Writes training rooms and test rooms."""
  parser = argparse.ArgumentParser(
    prog='python -m vssl_jax.data.tools.generated_rooms',
    description=__doc__.split('\n')[0],
  )
  parser.add_argument('--out', type=pathlib.Path, required=True)
  parser.add_argument('--train', type=int, default=60, help='rooms')
  parser.add_argument('--test', type=int, default=20, help='rooms')
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args(argv)
  write(args.out / 'train', scenes=args.train, seed=2 * args.seed)
  write(args.out / 'test', scenes=args.test, seed=2 * args.seed + 1)
  print(f'{args.train} + {args.test} rooms in {args.out}')


if __name__ == '__main__':
  main()
