"""Reads clips of RGB-D frames.

The colour and the depth image of a frame have the same crop and flip. Crop
boxes are fractions of the sides, so the images may differ in size. Colour is
resized with smoothing. Depth is resized by nearest neighbour, because a mean of
two depths is not the depth of any surface. Until a batch is complete, depth is
stored as two additional bytes of each pixel, 16 bits.
"""

import json
import os
from collections.abc import Sequence

import av
import numpy as np
from jaxtyping import Float, UInt8, UInt16

from vssl_jax.data.clips import clip_spec as clip_spec_lib
from vssl_jax.data.clips import decode, headers

NOTHING = (0, 65535)  # stored values of pixels without a measurement
GREY = ('gray16be', 'gray16le')
# Relative difference of the aspect ratios of colour and depth that rounding of
# the sizes explains (ScanNet: 1296x968 and 640x480).
ASPECT_SLACK = 0.05


def read(
  media: str,
  spec: clip_spec_lib.Spec,
  entropy: Sequence[int],
  out: np.ndarray | None = None,
) -> clip_spec_lib.Clips:
  """Reads clips with depth.

  Args:
    media: JSON of a stretch of frames with keys folder, colour and depth.
    spec: clip specification.
    entropy: seeds of all random choices.
    out: uint8 [clips, *spec.stored] to write into, or None for a new array.

  Returns:
    The clips. They are a pure function of the arguments.

  Raises:
    decode.VideoError: an image cannot be read; with the file and the reason.
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
  frame_numbers = clip_spec_lib.numbers(count, spec, rng)
  targets, cutters = clip_spec_lib.places(frame_numbers), None
  for number in sorted(targets):
    colour, depth = (
      _picture(os.path.join(stretch['folder'], stretch[kind][number]), spec)
      for kind in ('colour', 'depth')
    )
    path = os.path.join(stretch['folder'], stretch['depth'][number])
    measured = _measured(depth, colour, path)
    if cutters is None:
      size = colour.height, colour.width
      plans = clip_spec_lib.plans(size, spec, rng)
      cutters = [clip_spec_lib.Cutter(*plan, spec) for plan in plans]
    for clip, position in targets[number]:
      pixels, cutter = out[clip, position], cutters[clip]
      cutter.cut(colour, pixels[..., : spec.channels])
      pixels[..., spec.channels :] = nearest(measured, cutter, pixels.shape[:2])
  return clip_spec_lib.Clips(
    video=out,
    crop=np.asarray([c.done for c in cutters], np.float32),
    flipped=np.asarray([c.flip for c in cutters]),
    short=clip_spec_lib.is_short(frame_numbers),
  )


def _picture(path: str, spec: clip_spec_lib.Spec) -> av.VideoFrame:
  """Reads one image; errors name the file."""
  try:
    with decode.Video(path, max_pixels=spec.max_pixels) as video:
      ((_, frame),) = video.frames([0])
  except decode.VideoError as error:
    raise decode.VideoError(error.reason, f'{path}: {error.detail}') from error
  return frame


def _measured(
  depth: av.VideoFrame, colour: av.VideoFrame, path: str
) -> UInt16[np.ndarray, 'h w']:
  """Returns the raw depth image, after checking its type and aspect ratio."""
  if depth.format.name not in GREY:
    raise decode.VideoError(
      'unreadable',
      f'{path}: found a picture of type {depth.format.name}, wanted depth as a '
      '16-bit grey PNG',
    )
  aspects = [f.width / f.height for f in (depth, colour)]
  rotated = any(headers.orientation(colour))
  if abs(aspects[0] / aspects[1] - 1) > ASPECT_SLACK or rotated:
    raise decode.VideoError(
      'unreadable',
      f'{path}: depth of {depth.width}x{depth.height} does not match a '
      f'picture of {colour.width}x{colour.height}'
      + ' that is turned or mirrored'
      * rotated,
    )
  return depth.to_ndarray()


def nearest(
  measured: UInt16[np.ndarray, 'h w'],
  cutter: clip_spec_lib.Cutter,
  size: tuple[int, int],
) -> UInt8[np.ndarray, 'H W 2']:
  """Crops and resizes depth by nearest neighbour, with the box of the colour.

  Args:
    measured: uint16 [h, w], depth in units of the source.
    cutter: cutter that has cropped the colour image.
    size: height and width of the result.

  Returns:
    uint8 [H, W, 2], the nearest measurement of each pixel, low byte first.
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
  sampled = measured[y[:, None], (x[::-1] if cutter.flip else x)[None]]
  return sampled.astype('<u2')[..., None].view(np.uint8)


def split(
  stored: UInt8[np.ndarray, 'B T H W c'], spec: clip_spec_lib.Spec
) -> tuple[UInt8[np.ndarray, 'B T H W C'], Float[np.ndarray, 'B T H W']]:
  """Splits stored clips into video and depth.

  Args:
    stored: uint8 [B, T, H, W, C + 2], clips as readers store them.
    spec: clip specification; its units and range of depth are used.

  Returns:
    uint8 [B, T, H, W, C] video and float32 [B, T, H, W] depth in metres, 0
    where the depth is unknown or out of range.
  """
  video = np.ascontiguousarray(stored[..., : spec.channels])
  raw = np.ascontiguousarray(stored[..., spec.channels :]).view('<u2')[..., 0]
  metres = raw.astype(np.float32) / np.float32(spec.depth_units)
  low, high = spec.depth_range
  valid = ~np.isin(raw, NOTHING) & (metres >= low) & (metres <= high)
  return video, np.where(valid, metres, np.float32(0))
