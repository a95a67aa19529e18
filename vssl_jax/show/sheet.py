"""Rows of frames with labels and a caption, as one picture.

Frames are enlarged by whole factors without smoothing, so a pixel of a clip
is a square of its own colour.
"""

import pathlib
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

GAP = 4
LABEL_WIDTH = 150
LINE = 18
MAX_FRAMES = 8
SMALLEST = 96  # pixels of an enlarged frame, at least


def some(clip: UInt8[np.ndarray, 'T H W 3']) -> UInt8[np.ndarray, 'S H W 3']:
  """Returns at most `MAX_FRAMES` frames, spread evenly."""
  at = np.linspace(0, len(clip) - 1, min(MAX_FRAMES, len(clip)))
  return clip[at.round().astype(int)]


def enlarge(frame: UInt8[np.ndarray, 'H W 3']) -> UInt8[np.ndarray, 'h w 3']:
  """Repeats every pixel until the frame can be seen."""
  factor = max(1, -(-SMALLEST // min(frame.shape[:2])))
  return frame.repeat(factor, 0).repeat(factor, 1)


def draw(
  rows: Mapping[str, Sequence[UInt8[np.ndarray, 'H W 3']]], caption: str
) -> Image.Image:
  """Returns the sheet.

  Args:
    rows: label -> frames of one size, from left to right.
    caption: stands below, within the picture.
  """
  strips = {
    label: [enlarge(f) for f in frames] for label, frames in rows.items()
  }
  width = LABEL_WIDTH + max(
    sum(f.shape[1] + GAP for f in frames) for frames in strips.values()
  )
  font = ImageFont.load_default(size=13)
  lines = textwrap.wrap(caption, max(40, (width - 2 * GAP) // 7))
  height = sum(frames[0].shape[0] + GAP for frames in strips.values())
  size = (width, height + 2 * GAP + LINE * len(lines))
  page = Image.new('RGB', size, 'white')
  pen = ImageDraw.Draw(page)
  top = GAP
  for label, frames in strips.items():
    for i, line in enumerate(textwrap.wrap(label, LABEL_WIDTH // 8)):
      pen.text((GAP, top + i * LINE), line, fill='black', font=font)
    left = LABEL_WIDTH
    for frame in frames:
      page.paste(Image.fromarray(frame), (left, top))
      left += frame.shape[1] + GAP
    top += frames[0].shape[0] + GAP
  for i, line in enumerate(lines):
    pen.text((GAP, top + i * LINE), line, fill='black', font=font)
  return page


def save(
  path: pathlib.Path,
  rows: Mapping[str, Sequence[UInt8[np.ndarray, 'H W 3']]],
  caption: str,
) -> None:
  """Writes the sheet as a PNG."""
  draw(rows, caption).save(path)
