"""Clips under their masks, and with hidden patches as they were predicted."""

import numpy as np
from jaxtyping import Float, Int, Num, UInt8

from vssl_jax import losses, masking

Patch = tuple[int, int, int]
Clips = UInt8[np.ndarray, 'B T H W C']

# Of patches that are to be predicted, and of those in neither set.
GREY, DARK = 128, 48


def rgb(clips: UInt8[np.ndarray, '*batch C']) -> UInt8[np.ndarray, '*batch 3']:
  """Returns clips of one or three channels with three."""
  return np.repeat(clips, 3, -1) if clips.shape[-1] == 1 else clips


def cut(
  clips: Num[np.ndarray, 'B T H W C'], patch: Patch
) -> Num[np.ndarray, 'B N P C']:
  """Returns the pixels of each patch, in raster order."""
  b, frames, height, width, c = clips.shape
  pt, py, px = patch
  x = clips.reshape(b, frames // pt, pt, height // py, py, width // px, px, c)
  return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, -1, pt * py * px, c)


def join(
  patches: Num[np.ndarray, 'B N P C'],
  patch: Patch,
  shape: tuple[int, ...],
) -> Num[np.ndarray, 'B T H W C']:
  """Puts patches back: the inverse of `cut`.

  Args:
    patches: all patches of the clips, in raster order.
    patch: (frames, rows, columns) of a patch.
    shape: (B, T, H, W, C).
  """
  b, frames, height, width, c = shape
  pt, py, px = patch
  x = patches.reshape(b, frames // pt, height // py, width // px, pt, py, px, c)
  return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(shape)


def masked(clips: Clips, mask: masking.Mask, patch: Patch) -> Clips:
  """Returns clips that show what the encoder sees.

  Patches to predict are `GREY`, and those that are neither seen nor predicted
  are `DARK`.
  """
  patches = cut(clips, patch)
  out = np.full_like(patches, DARK)
  rows = np.arange(len(clips))[:, None]
  visible, hidden = (np.asarray(index) for index in mask)
  out[rows, hidden] = GREY
  out[rows, visible] = patches[rows, visible]
  return join(out, patch, clips.shape)


def lit(clips: Clips, scores: Float[np.ndarray, 'B N'], patch: Patch) -> Clips:
  """Returns clips as bright as the scores of their patches.

  Args:
    clips: whole ones.
    scores: not negative; the highest of a time step is full brightness.
    patch: (frames, rows, columns) of a patch.
  """
  patches, steps = cut(clips, patch), clips.shape[1] // patch[0]
  light = scores.reshape(len(clips), steps, -1)
  light = light / np.maximum(light.max(2, keepdims=True), 1e-30)
  out = patches * light.reshape(len(clips), -1, 1, 1)
  return join(out.round().astype(np.uint8), patch, clips.shape)


def restore(
  predicted: Float[np.ndarray, 'B M PC'],
  truth: Float[np.ndarray, 'B M P C'],
  kind: str,
) -> Float[np.ndarray, 'B M P C']:
  """Undoes the normalisation of pixel targets with the truth's statistics.

  Args:
    predicted: in the units of `losses.pixel_targets`.
    truth: the same patches in [0, 1].
    kind: of `losses.pixel_targets`.

  Raises:
    ValueError: unknown kind.
  """
  if kind not in losses.PIXEL_NORMS:
    raise ValueError(
      f'pixel_norm: found {kind!r}, wanted one of {sorted(losses.PIXEL_NORMS)}'
    )
  x = predicted.reshape(truth.shape)
  if kind == 'none':
    return x
  axes = 2 if kind == 'patch_channel' else (2, 3)
  spread = truth.std(axes, ddof=1, keepdims=True)
  # The two published codes keep away from 0 in different ways.
  if kind == 'patch_channel':
    spread = spread + 1e-6
  else:
    spread = np.sqrt(np.square(spread) + 1e-6)
  return x * spread + truth.mean(axes, keepdims=True)


def reconstructed(
  clips: Clips,
  mask: masking.Mask,
  predicted: Float[np.ndarray, 'B M PC'],
  kind: str,
  patch: Patch,
) -> Clips:
  """Returns what the encoder sees, with predictions where it is grey."""
  shown = cut(masked(clips, mask, patch), patch)
  rows = np.arange(len(clips))[:, None]
  hidden: Int[np.ndarray, 'B M'] = np.asarray(mask.masked)
  truth = cut(clips, patch)[rows, hidden] / np.float32(255)
  pixels = restore(predicted, truth, kind)
  shown[rows, hidden] = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
  return join(shown, patch, clips.shape)
