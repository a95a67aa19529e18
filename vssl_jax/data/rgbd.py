"""Clips with depth out of the frames of a scene.

Both pictures of a frame are cut by the same box and flipped alike, in
fractions of their sides, so that they may differ in size. Colour is scaled
with smoothing, depth takes the nearest measurement: a mean of two depths is
the depth of nothing. Depth stays 16-bit, as two more bytes of each pixel,
until a batch is complete.
"""

import json
import os
from collections.abc import Sequence

import av
import numpy as np
from jaxtyping import Float, UInt8, UInt16

from vssl_jax.data import clip as clip_lib
from vssl_jax.data import decode, headers

NOTHING = (0, 65535)  # what sensors write where they measured nothing
GREY = ('gray16be', 'gray16le')
# Sides of a picture and of its depth may differ by a rounded crop (ScanNet:
# 1296x968 and 640x480), not more.
ASPECT_SLACK = 0.05


def read(
  media: str,
  spec: clip_lib.Spec,
  entropy: Sequence[int],
  out: np.ndarray | None = None,
) -> clip_lib.Clips:
  """Reads clips with depth.

  Args:
    media: JSON of a stretch of frames: folder, colour and depth.
    spec: what to take.
    entropy: seeds of everything random.
    out: uint8 [clips, *spec.stored] to write into, or None for a new array.

  Returns:
    The clips, a pure function of the arguments.

  Raises:
    decode.VideoError: with the file and the reason.
  """
  stretch = json.loads(media)
  count = len(stretch['colour'])
  if count < spec.min_frames:
    raise decode.VideoError(
      'too_short', f'{count} frames, wanted {spec.min_frames}'
    )
  rng = np.random.default_rng(entropy)
  if out is None:
    out = np.empty((spec.clips, *spec.stored), np.uint8)
  rows = clip_lib.numbers(count, spec, rng)
  wanted, cutters = clip_lib.places(rows), None
  for number in sorted(wanted):
    colour, depth = (
      _picture(os.path.join(stretch['folder'], stretch[kind][number]), spec)
      for kind in ('colour', 'depth')
    )
    path = os.path.join(stretch['folder'], stretch['depth'][number])
    measured = _measured(depth, colour, path)
    if cutters is None:
      size = colour.height, colour.width
      plans = clip_lib.plans(size, spec, rng)
      cutters = [clip_lib.Cutter(*plan, spec) for plan in plans]
    for which, position in wanted[number]:
      place, cutter = out[which, position], cutters[which]
      cutter.cut(colour, place[..., : spec.channels])
      place[..., spec.channels :] = nearest(measured, cutter, place.shape[:2])
  return clip_lib.Clips(
    video=out,
    crop=np.asarray([c.done for c in cutters], np.float32),
    flipped=np.asarray([c.flip for c in cutters]),
    short=clip_lib.is_short(rows),
  )


def _picture(path: str, spec: clip_lib.Spec) -> av.VideoFrame:
  """Reads one picture; errors name the file."""
  try:
    with decode.Video(path, max_pixels=spec.max_pixels) as video:
      ((_, frame),) = video.frames([0])
  except decode.VideoError as error:
    raise decode.VideoError(error.reason, f'{path}: {error.detail}') from error
  return frame


def _measured(
  depth: av.VideoFrame, colour: av.VideoFrame, path: str
) -> UInt16[np.ndarray, 'h w']:
  """Returns the depth picture as it was written."""
  if depth.format.name not in GREY:
    raise decode.VideoError(
      'unreadable',
      f'{path}: found a picture of type {depth.format.name}, wanted depth as a '
      '16-bit grey PNG',
    )
  aspects = [f.width / f.height for f in (depth, colour)]
  turned = any(headers.orientation(colour))
  if abs(aspects[0] / aspects[1] - 1) > ASPECT_SLACK or turned:
    raise decode.VideoError(
      'unreadable',
      f'{path}: depth of {depth.width}x{depth.height} does not lie over a '
      f'picture of {colour.width}x{colour.height}'
      + ' that is turned or mirrored'
      * turned,
    )
  return depth.to_ndarray()


def nearest(
  measured: UInt16[np.ndarray, 'h w'],
  cutter: clip_lib.Cutter,
  size: tuple[int, int],
) -> UInt8[np.ndarray, 'H W 2']:
  """Cuts the box that was cut out of the picture, without smoothing.

  Args:
    measured: depth in units of the source.
    cutter: that has cut the picture.
    size: height and width wanted.

  Returns:
    The nearest measurement of each pixel, low byte first.
  """
  top, left, bottom, right = cutter.done
  y, x = (
    np.floor((low + (np.arange(n) + 0.5) / n * (high - low)) * side)
    for n, low, high, side in zip(
      size, (top, left), (bottom, right), measured.shape, strict=True
    )
  )
  y = np.clip(y, 0, measured.shape[0] - 1).astype(np.int64)
  x = np.clip(x, 0, measured.shape[1] - 1).astype(np.int64)
  found = measured[y[:, None], (x[::-1] if cutter.flip else x)[None]]
  return found.astype('<u2')[..., None].view(np.uint8)


def split(
  stored: UInt8[np.ndarray, 'B T H W c'], spec: clip_lib.Spec
) -> tuple[UInt8[np.ndarray, 'B T H W C'], Float[np.ndarray, 'B T H W']]:
  """Returns pictures, and depth in metres: 0 where there is none.

  Args:
    stored: clips as readers write them.
    spec: says what a metre is and which depths are believed.
  """
  video = np.ascontiguousarray(stored[..., : spec.channels])
  raw = np.ascontiguousarray(stored[..., spec.channels :]).view('<u2')[..., 0]
  metres = raw.astype(np.float32) / np.float32(spec.depth_units)
  low, high = spec.depth_range
  valid = ~np.isin(raw, NOTHING) & (metres >= low) & (metres <= high)
  return video, np.where(valid, metres, np.float32(0))
