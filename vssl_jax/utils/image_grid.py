"""Draws labelled rows of frames with a caption as one image.

Frames are enlarged by integer factors without smoothing: each pixel becomes a
square of one colour.
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
SMALLEST = 96  # minimum side of an enlarged frame, in pixels


def rgb(clips: UInt8[np.ndarray, '*batch C']) -> UInt8[np.ndarray, '*batch 3']:
  """Converts clips of one or three channels to three."""
  return np.repeat(clips, 3, -1) if clips.shape[-1] == 1 else clips


def some(clip: UInt8[np.ndarray, 'T H W 3']) -> UInt8[np.ndarray, 'S H W 3']:
  """Returns at most `MAX_FRAMES` evenly spaced frames."""
  indices = np.linspace(0, len(clip) - 1, min(MAX_FRAMES, len(clip)))
  return clip[indices.round().astype(int)]


def enlarge(frame: UInt8[np.ndarray, 'H W 3']) -> UInt8[np.ndarray, 'h w 3']:
  """Enlarges a frame to a shorter side of at least `SMALLEST` pixels."""
  factor = max(1, -(-SMALLEST // min(frame.shape[:2])))
  return frame.repeat(factor, 0).repeat(factor, 1)


def draw(
  rows: Mapping[str, Sequence[UInt8[np.ndarray, 'H W 3']]], caption: str
) -> Image.Image:
  """Draws rows of frames as one image.

  Args:
    rows: label -> frames [H, W, 3] of one size, from left to right.
    caption: text below the rows, inside the image.
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
  """Draws rows of frames and saves the image (as PNG, by suffix)."""
  draw(rows, caption).save(path)
