"""Source of RGB-D scenes: folders of colour images with depth images.

Two layouts are supported: a folder for each kind (`color/12.jpg` and
`depth/12.png`, as in exported ScanNet), and both kinds in one folder
(`frame-000012.color.png` and `frame-000012.depth.png`, as in 7-Scenes). Images
are paired by the numbers in their names.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging

from vssl_jax.data.clips import decode
from vssl_jax.data.sources import example as example_lib

COLOUR = ('color', 'colour', 'rgb', 'image', 'images')
DEPTH = ('depth', 'depths')
LISTS = ('.txt', '.list', '.lst')
_WHERE = re.compile(r'\s*frames\s*=\s*(\d+-\d+(?:\s*,\s*\d+-\d+)*)\s*$')

Numbers = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Scene:
  """Frames of one scene, in order.

  Attributes:
    name: name in reports.
    folder: folder that the file names are relative to.
    colour: names of the colour images, one per line; one string saves memory,
      because large data sets have millions of frames.
    depth: names of the depth images, one per line.
    count: number of frames.
  """

  name: str
  folder: str
  colour: str
  depth: str
  count: int


@dataclasses.dataclass(frozen=True)
class Stretches:
  """A source whose examples are stretches of consecutive frames of scenes.

  Attributes:
    scenes: the scenes.
    length: minimum number of frames of a stretch; 0 takes scenes whole.
    classes: None, because scenes have no labels.
  """

  scenes: tuple[Scene, ...]
  length: int
  classes: tuple[str, ...] | None = None

  @functools.cached_property
  def _counts(self) -> np.ndarray:
    """Number of stretches of each scene."""
    frames = np.asarray([scene.count for scene in self.scenes])
    if not self.length:
      return np.ones_like(frames)
    return np.maximum(frames // self.length, 1)

  @functools.cached_property
  def _ends(self) -> np.ndarray:
    return np.cumsum(self._counts)

  def __len__(self) -> int:
    return int(self._ends[-1])

  def lines(self) -> Iterator[str]:
    """Yields each scene with a hash of its file names, without their sizes."""
    for scene in self.scenes:
      names = example_lib.digest((str(self.length), scene.colour, scene.depth))
      yield f'{scene.name}\t{scene.count} frames, names {names}'

  def describe(self) -> str:
    """Returns a summary: folder, number of examples, scenes and frames."""
    frames = sum(scene.count for scene in self.scenes)
    folder = os.path.commonpath(
      [os.path.abspath(s.folder) for s in self.scenes]
    )
    return (
      f'{folder}: {len(self):,} examples of {len(self.scenes):,} RGB-D scenes, '
      f'{frames:,} frames'
    )

  def item(self, index: int) -> example_lib.Item:
    """Returns example `index`. The parts of a scene cover all its frames."""
    scene_index = int(np.searchsorted(self._ends, index, side='right'))
    scene, parts = self.scenes[scene_index], int(self._counts[scene_index])
    part = index - int(self._ends[scene_index]) + parts
    low, high = (scene.count * i // parts for i in (part, part + 1))
    names = {
      kind: getattr(scene, kind).split('\n')[low:high]
      for kind in ('colour', 'depth')
    }
    first, last = names['colour'][0], names['colour'][-1]
    return example_lib.Item(
      f'{scene.name}: {first} to {last}',
      json.dumps({'folder': scene.folder, **names}),
    )


def find(
  sources: Sequence[str], *, where: str = '', stretch: int = 0
) -> tuple[Stretches, ...]:
  """Lists the RGB-D scenes of sources.

  Args:
    sources: folders that are a scene or contain scenes, at any depth; or text
      files that list such folders, one per line.
    where: 'frames=0-699' or 'frames=0-99,200-299' takes the frames whose
      (last) number is in one of these ranges, both ends included.
    stretch: frames per example; 0 makes each scene one example.

  Returns:
    One source for each entry of `sources`.

  Raises:
    FileNotFoundError: a path does not exist or has no scenes.
    ValueError: `where` is invalid, or no frames are left.
  """
  if stretch < 0:
    raise ValueError(f'data.stretch is {stretch}; wanted 0 or more frames')
  frame_ranges = ranges(where)
  paths = [os.path.expanduser(path.strip()) for path in sources]
  if not paths or not all(paths):
    raise FileNotFoundError(
      'data.source is empty; set it to a folder of RGB-D scenes, such as '
      '--config.data.source=/my/scans'
    )
  return tuple(
    Stretches(_taken(path, _found(path), frame_ranges, where), stretch)
    for path in paths
  )


def ranges(where: str) -> list[tuple[int, int]]:
  """Parses ranges of frame numbers, 'frames=0-99,200-299'.

  Returns:
    (first, last) of each range; [] for ''.

  Raises:
    ValueError: the text has another form.
  """
  if not where:
    return []
  match = _WHERE.match(where)
  if not match:
    raise ValueError(
      f'data.where is {where!r}; of RGB-D frames it takes ranges of frame '
      "numbers, such as 'frames=0-699' or 'frames=0-99,200-299'"
    )
  return [tuple(map(int, part.split('-'))) for part in match[1].split(',')]


def _found(path: str) -> list[tuple[Scene, list[Numbers]]]:
  """Returns the scenes of a path, each with the numbers of its frames."""
  if os.path.isdir(path):
    scenes = [
      _scene(os.path.relpath(base, path), base, colour, depth)
      for base, colour, depth in _walk(path)
    ]
  elif os.path.isfile(path) and path.lower().endswith(LISTS):
    with open(path, encoding='utf-8') as file:
      lines = [line.strip() for line in file]
    root = os.path.dirname(os.path.abspath(path))
    folders = [os.path.join(root, x) for x in lines if x and x[0] != '#']
    scenes = [scene for folder in folders for scene in _found(folder)]
  else:
    raise FileNotFoundError(
      f'data.source: there is no folder of RGB-D scenes, and no list of such '
      f'folders ({", ".join(LISTS)}), at {path!r} (from {os.getcwd()})'
    )
  if not scenes:
    raise FileNotFoundError(
      f'no RGB-D frames in {path!r}; wanted folders that hold color/ and '
      'depth/ (12.jpg and 12.png), or frame-12.color.jpg beside '
      'frame-12.depth.png; for videos without depth set data.depth_units=0'
    )
  return scenes


def _walk(root: str) -> Iterator[tuple[str, list[str], list[str]]]:
  """Yields (folder, colour names, depth names) of every scene below root."""
  for base, folders, files in os.walk(root, followlinks=True):
    folders[:] = sorted(f for f in folders if not f.startswith('.'))
    kinds = [
      [f for f in folders if f.lower() in names] for names in (COLOUR, DEPTH)
    ]
    if all(kinds):
      folders[:] = []
      yield base, *(_listing(base, kind[0]) for kind in kinds)
      continue
    pictures = sorted(f for f in files if _is_picture(f))
    depth = [f for f in pictures if 'depth' in f.lower()]
    colour = [
      f
      for f in pictures
      if f not in set(depth) and any(name in f.lower() for name in COLOUR)
    ]
    if colour and depth:
      yield base, colour, depth


def _listing(base: str, folder: str) -> list[str]:
  names = sorted(os.listdir(os.path.join(base, folder)))
  return [os.path.join(folder, n) for n in names if _is_picture(n)]


def _is_picture(name: str) -> bool:
  return not name.startswith('.') and name.lower().endswith(decode.IMAGES)


def _numbers(name: str) -> Numbers:
  return tuple(map(int, re.findall(r'\d+', os.path.basename(name))))


def _scene(
  name: str, base: str, colour: list[str], depth: list[str]
) -> tuple[Scene, list[Numbers]]:
  """Pairs the colour and depth images of a scene by their numbers."""
  numbered = [{_numbers(n): n for n in names} for names in (colour, depth)]
  paired = sorted(n for n in numbered[0] if n and n in numbered[1])
  num_unpaired = len(colour) + len(depth) - 2 * len(paired)
  if num_unpaired:
    logging.warning(
      '%s: %d of %d pictures are left out: no picture of the other kind has '
      'the same numbers in its name.',
      base,
      num_unpaired,
      len(colour) + len(depth),
    )
  lines = ['\n'.join(names[n] for n in paired) for names in numbered]
  name = os.path.basename(os.path.abspath(base)) if name == '.' else name
  return Scene(name, base, *lines, len(paired)), paired


def _taken(
  path: str,
  found: list[tuple[Scene, list[Numbers]]],
  wanted: list[tuple[int, int]],
  where: str,
) -> tuple[Scene, ...]:
  """Selects the frames in the ranges; removes scenes without frames."""
  selected = []
  for scene, numbers in found:
    indices = [
      i
      for i, number in enumerate(numbers)
      if not wanted or any(a <= number[-1] <= b for a, b in wanted)
    ]
    lines = [
      '\n'.join(names.split('\n')[i] for i in indices) if indices else ''
      for names in (scene.colour, scene.depth)
    ]
    if indices:
      selected.append(Scene(scene.name, scene.folder, *lines, len(indices)))
  if not selected:
    last = max((n[-1][-1] for _, n in found if n), default=None)
    raise ValueError(
      f'{path}: no frames are left of {len(found)} scenes'
      + (f' where {where}; the last frame is {last}' if where else '')
      + '. A picture and its depth are matched by the numbers in their '
      'names, such as color/12.jpg and depth/12.png'
    )
  return tuple(selected)
