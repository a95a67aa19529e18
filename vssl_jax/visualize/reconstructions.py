"""Renders clips under their masks, and with predicted patches."""

import einops
import numpy as np
from jaxtyping import Float, Int, Num, UInt8

from vssl_jax import losses
from vssl_jax.masks import sampling

Patch = tuple[int, int, int]
Clips = UInt8[np.ndarray, 'B T H W C']

# Grey: patches to predict. Dark: patches neither visible nor to predict.
GREY, DARK = 128, 48


def cut(
  clips: Num[np.ndarray, 'B T H W C'], patch: Patch
) -> Num[np.ndarray, 'B N P C']:
  """Returns the pixels of each patch, in raster order."""
  pt, py, px = patch
  return einops.rearrange(
    clips,
    'b (t pt) (h py) (w px) c -> b (t h w) (pt py px) c',
    pt=pt,
    py=py,
    px=px,
  )


def join(
  patches: Num[np.ndarray, 'B N P C'],
  patch: Patch,
  shape: tuple[int, ...],
) -> Num[np.ndarray, 'B T H W C']:
  """Returns clips from their patches: the inverse of `cut`.

  Args:
    patches: all patches of the clips, in raster order.
    patch: (frames, rows, columns) of a patch.
    shape: (B, T, H, W, C).
  """
  pt, py, px = patch
  return einops.rearrange(
    patches,
    'b (t h w) (pt py px) c -> b (t pt) (h py) (w px) c',
    t=shape[1] // pt,
    h=shape[2] // py,
    pt=pt,
    py=py,
    px=px,
  )


def masked(clips: Clips, mask: sampling.Mask, patch: Patch) -> Clips:
  """Returns clips as the encoder sees them.

  Patches to predict are `GREY`; those that are neither visible nor to predict
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
  """Returns clips with the brightness of each patch scaled by its score.

  Args:
    clips: clips without a mask.
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
  """Inverts the normalisation of pixel targets, with the true statistics.

  Args:
    predicted: in the units of `losses.pixel_targets`.
    truth: the same patches in [0, 1].
    kind: `kind` of `losses.pixel_targets`.

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
  # The two published codes avoid a deviation of 0 in different ways.
  if kind == 'patch_channel':
    spread = spread + 1e-6
  else:
    spread = np.sqrt(np.square(spread) + 1e-6)
  return x * spread + truth.mean(axes, keepdims=True)


def reconstructed(
  clips: Clips,
  mask: sampling.Mask,
  predicted: Float[np.ndarray, 'B M PC'],
  kind: str,
  patch: Patch,
) -> Clips:
  """Returns masked clips with predictions in place of the grey patches."""
  shown = cut(masked(clips, mask, patch), patch)
  rows = np.arange(len(clips))[:, None]
  hidden: Int[np.ndarray, 'B M'] = np.asarray(mask.masked)
  truth = cut(clips, patch)[rows, hidden] / np.float32(255)
  pixels = restore(predicted, truth, kind)
  shown[rows, hidden] = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
  return join(shown, patch, clips.shape)
