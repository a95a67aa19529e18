"""Fills open clip keys of `config.data` with the encoder's training clips.

An evaluation config leaves `data.frames`, `data.stride`, `data.size` and
`data.channels` at 0, for the values that the encoder was trained on. Keys that
are set are kept. The log and the report state both.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections

from vssl_jax import encoder
from vssl_jax.data import options


def follow(
  config: ml_collections.ConfigDict, clip: encoder.Clip
) -> ml_collections.ConfigDict:
  """Returns a copy of the config with open clip keys filled from `clip`.

  Args:
    config: a resolved config.
    clip: training clips of the encoder.

  Raises:
    ValueError: a key is open and the encoder does not state its value; only one
      of the two sides is open; or the channels differ from the encoder's.
  """
  c = config.copy_and_resolve_references()
  data = c.data
  frames, height, width, channels = clip.video
  data.frames = data.frames or frames
  data.channels = data.channels or channels
  if not any(_sides(data.size)):
    data.size = (height, width)
  elif not all(_sides(data.size)):
    raise ValueError(
      f'data.size: found {tuple(data.size)}, wanted height and width, such as '
      f"--config.data.size=({height},{width}), or (0, 0) for the encoder's"
    )
  if data.fps:
    data.stride = data.stride or 1
  elif not data.stride:
    if not clip.stride or (clip.fps and data.depth_units):
      raise ValueError(
        'data.stride: the weights do not state how many frames lie between '
        'those that the encoder was trained on'
        + (f', but {clip.fps:g} per second' if clip.fps else '')
        + '; wanted --config.data.stride=<frames>'
        + (
          ''
          if data.depth_units
          else ' or --config.data.fps=<frames per second>'
        )
      )
    data.stride, data.fps = clip.stride, float(clip.fps)
  if data.channels != channels:
    raise ValueError(
      f'data.channels: found {data.channels}, wanted {channels}, the channels '
      'of the encoder; leave the key out'
    )
  return c


def check_patches(
  config: ml_collections.ConfigDict, patch: tuple[int, int, int]
) -> None:
  """Raises ValueError if clips do not divide into the encoder's patches.

  Args:
    config: from `follow`.
    patch: frames, height and width of a patch.

  Raises:
    ValueError: states the key that does not fit and a value that does.
  """
  frames, *size = options.spec(config.data.to_dict()).shape[:3]
  t, *sides = patch
  if frames % t:
    raise ValueError(
      f'data.frames: found {frames}, wanted a multiple of the {t} frames of '
      f"the encoder's patches, such as --config.data.frames={_near(frames, t)}"
    )
  if any(side % p for side, p in zip(size, sides, strict=True)):
    fitting = [_near(side, p) for side, p in zip(size, sides, strict=True)]
    raise ValueError(
      f'data.size: found {tuple(size)}, wanted multiples of the '
      f"{'x'.join(map(str, sides))} pixels of the encoder's patches, such as "
      f'--config.data.size=({fitting[0]},{fitting[1]})'
    )


def _near(value: int, step: int) -> int:
  return max(round(value / step), 1) * step


def _sides(size: Any) -> tuple[int, ...]:
  return (size,) if isinstance(size, int) else tuple(size)


def timing(data: Mapping[str, Any] | ml_collections.ConfigDict) -> str:
  """Returns the frame rate or the stride as text."""
  return f'{data["fps"]:g} fps' if data['fps'] else f'stride {data["stride"]}'


def shape(clip: Any) -> str:
  """Returns frames, height and width as text."""
  return 'x'.join(map(str, tuple(clip)[:3]))


def report(
  data: Mapping[str, Any], clip: encoder.Clip | None
) -> dict[str, Any]:
  """Returns the report entries on the clips.

  Args:
    data: `config.data` of the evaluated clips.
    clip: training clips of the encoder; None for random initialisation.
  """
  out = {'clip': list(options.spec(data).shape), 'timing': timing(data)}
  if clip is not None:
    has_timing = bool(clip.stride or clip.fps)
    out['encoder_clip'] = list(clip.video)
    out['encoder_timing'] = (
      timing(dataclasses.asdict(clip)) if has_timing else ''
    )
  return out


def describe(found: Mapping[str, Any]) -> str:
  """Returns the evaluated clips as text, and the encoder's if they differ.

  Args:
    found: from `report`.
  """
  text = f'{shape(found["clip"])}, {found["timing"]}'
  if 'encoder_clip' not in found:
    return text
  trained = found['encoder_clip'], found['encoder_timing']
  if trained == (found['clip'], found['timing']):
    return f'{text}, as the encoder was trained on'
  trained_timing = trained[1] or 'with a stride that its weights do not state'
  return (
    f'{text}; the encoder was trained on {shape(trained[0])}, {trained_timing}'
  )
