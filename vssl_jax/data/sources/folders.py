"""Lists videos and images below a folder, and counts skipped files."""

import collections
import os
import re
from collections.abc import Iterator, Sequence

from vssl_jax.data.clips import decode

MEDIA = decode.VIDEOS + decode.IMAGES
# Images with consecutive numbers, from this many on, are frames of a video.
_FRAMES = 3
_NUMBERED = re.compile(r'(.*?)(\d+)')
_SHOWN = 8  # number of kinds of skipped files in a report


def listing(root: str) -> tuple[list[str], tuple[str, ...]]:
  """Lists videos and images below a folder, each file once.

  Hidden files and folders are skipped, and also images in the same folder as a
  video of the same name. Links are followed, except to folders that are already
  listed.

  Returns:
    Names relative to the folder, sorted, and notes on skipped files.

  Raises:
    FileNotFoundError: there are no videos, or the folder cannot be read.
    ValueError: a folder contains the numbered frames of a video.
  """
  skipped = collections.Counter()
  names = []
  for base, files in _walk(root, skipped):
    media = sorted(f for f in files if f.lower().endswith(MEDIA))
    skipped.update(_kind(f) for f in files if not f.lower().endswith(MEDIA))
    thumbnails = _thumbnails(media)
    skipped['pictures beside a video of the same name'] += len(thumbnails)
    media = [f for f in media if f not in thumbnails]
    _refuse_frames(root, base, media)
    names += [os.path.join(base, f) for f in media]
  notes = [f'{n} {kind}' for kind, n in skipped.most_common(_SHOWN) if n]
  others = sum(skipped.values()) - sum(
    n for _, n in skipped.most_common(_SHOWN)
  )
  notes += [f'{others} others'] if others else []
  if not names:
    raise FileNotFoundError(
      f'no videos in {root!r}; files ending in {", ".join(MEDIA)} are read, '
      'and shards ending in .array_record'
      + (f'; found {", ".join(notes)}' if notes else '; it is empty')
    )
  notes = (f'skipped {", ".join(notes)}',) if notes else ()
  return sorted(names), notes


def _kind(name: str) -> str:
  """Returns the name in reports for the kind of a skipped file."""
  ending = os.path.splitext(name)[1].lower()
  return f'*{ending}' if ending else 'without an ending'


def _walk(
  root: str, skipped: collections.Counter[str]
) -> Iterator[tuple[str, list[str]]]:
  """Yields (folder relative to root, its files); linked folders are last."""
  # Pairs of a folder and its real path. Folders come before links to them, so
  # that file names do not depend on the names of links.
  folders, links = [('', os.path.realpath(root))], []
  visited = set()
  while folders or links:
    base, real_path = folders.pop() if folders else links.pop(0)
    if real_path in visited:
      skipped['links to a folder that is listed already'] += 1
      continue
    visited.add(real_path)
    try:
      with os.scandir(os.path.join(root, base)) as scan:
        entries = sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
      if not base:
        raise FileNotFoundError(
          f'data.source: {root!r} cannot be read ({error.strerror})'
        ) from error
      skipped['folders that cannot be read'] += 1
      continue
    files = []
    for entry in entries:
      name = os.path.join(base, entry.name)
      if not _is_folder(entry):
        files.append(entry.name)
      elif entry.name.startswith('.'):
        skipped['hidden'] += 1
      elif entry.is_symlink():
        links.append((name, os.path.realpath(os.path.join(root, name))))
      else:
        folders.append((name, os.path.join(real_path, entry.name)))
    hidden = [f for f in files if f.startswith('.')]
    skipped['hidden'] += len(hidden)
    yield base, [f for f in files if not f.startswith('.')]


def _is_folder(entry: os.DirEntry[str]) -> bool:
  try:
    return entry.is_dir()
  except OSError:  # a link to itself
    return False


def _thumbnails(names: Sequence[str]) -> set[str]:
  """Returns images with the name of a video in the same folder."""
  videos = [f for f in names if f.lower().endswith(decode.VIDEOS)]
  stems = {os.path.splitext(f)[0] for f in videos} | set(videos)
  return {
    f
    for f in names
    if f.lower().endswith(decode.IMAGES) and os.path.splitext(f)[0] in stems
  }


def _refuse_frames(root: str, base: str, names: Sequence[str]) -> None:
  """Raises ValueError if the images of a folder are frames of a video."""
  pictures = [f for f in names if f.lower().endswith(decode.IMAGES)]
  stems = [os.path.splitext(f)[0] for f in pictures]
  matches = [_NUMBERED.fullmatch(stem) for stem in stems]
  if len(pictures) < _FRAMES or not all(matches):
    return
  numbers = sorted(int(match[2][-18:]) for match in matches)
  steps = set(map(int.__sub__, numbers[1:], numbers))
  if (
    len({match[1] for match in matches}) == 1
    and len(steps) == 1
    and 0 not in steps
  ):
    raise ValueError(
      f'{os.path.join(root, base)!r} holds {len(pictures)} numbered pictures '
      f'({pictures[0]} to {pictures[-1]}), the frames of a video: folders of '
      'frames are not read. Make videos of them (ffmpeg -i '
      f'{matches[0][1]}%0{len(matches[0][2])}d'
      f'{os.path.splitext(pictures[0])[1]} video.mp4), or list them in a file '
      'if each is an example of its own (RGB-D scenes: set data.depth_units)'
    )
