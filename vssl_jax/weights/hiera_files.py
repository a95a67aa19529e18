"""Builds networks for published Hiera weights, and reads position tables."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vssl_jax.models import framewise
from vssl_jax.models.hiera import decoder, encoder
from vssl_jax.weights import source as source_lib
from vssl_jax.weights.name_maps import hiera as names
from vssl_jax.weights.readers import tensors as tensors_lib

# Attention heads of all released decoders: shapes do not determine them. The
# decoders trained here have half as many, as written in the paper.
DECODER_HEADS = 16
# Number of channels of the first stage -> number of attention heads.
HEADS = {x['channels']: x['num_heads'] for x in encoder.SIZES.values()}
STRIDE, PADDING = 'patch_stride', 'patch_padding'
# Pixel mean and deviation of the authors' video models; their image models have
# ImageNet's. Source: examples/inference.ipynb. We assume that its third
# deviation, .255, is a typo: PySlowFast has .225 three times.
VIDEO_COLOURS = {'mean': (0.45,) * 3, 'std': (0.225,) * 3}
# Tokens of the first stage per predicted token, along height and along width.
POOLED = 4


def build(found: source_lib.Found, part: str, num_heads: int | None) -> Any:
  """Builds the network of a source without loading its weights.

  Args:
    found: the source.
    part: `encoder` or `head`.
    num_heads: attention heads of the first stage; None for the default.

  Raises:
    KeyError: a tensor is missing.
    WeightsError: the file does not determine the network.
  """
  shapes = {n: x.shape for n, (_, x) in found.tensors(part).items()}
  table = found.layout.parts[part]
  if part == 'head':
    mlp, width = shapes['decoder_blocks.0.mlp.fc1.weight']
    return decoder.Decoder(
      out_width=shapes['decoder_pred.weight'][0],
      width=width,
      depth=table.depth(shapes),
      num_heads=num_heads or DECODER_HEADS,
      mlp_width=mlp,
    )
  channels, _, *kernel = shapes[names.KERNEL]
  heads = num_heads or found.config.get('num_heads') or HEADS.get(channels)
  if heads is None:
    raise tensors_lib.WeightsError(
      f'{found.source}: {channels} channels do not determine the number of '
      'heads; give a folder with model.safetensors and a config.json that has '
      'num_heads, or num_heads to weights.load_published'
    )
  depth = table.depth(shapes)
  starts = [i for i in range(depth) if f'blocks.{i}.proj.weight' in shapes]
  bounds = [0, *starts, depth]
  fields = dict(
    channels=channels,
    depths=tuple(b - a for a, b in itertools.pairwise(bounds)),
    num_heads=heads,
    # Default by whether there is a decoder; shapes do not determine it.
    q_pool=found.config.get('q_pool', 2 if names.DECODER in shapes else 3),
  )
  fields |= VIDEO_COLOURS if len(kernel) == 3 else {}
  fields |= {  # written by `export`
    ours: tuple(found.config[theirs])
    for ours, theirs in (('mean', 'image_mean'), ('std', 'image_std'))
    if theirs in found.config
  }
  conv_fields = {  # for files whose patches differ from the released models
    ours: tuple(found.config[theirs])
    for ours, theirs in (('stride', STRIDE), ('padding', PADDING))
    if theirs in found.config
  }
  try:
    if len(kernel) == 3:
      return encoder.make(fields, kernel=tuple(kernel), **conv_fields)
    return framewise.Framewise(encoder.make(fields, **encoder.IMAGE))
  except ValueError as e:
    raise tensors_lib.WeightsError(f'{found.source}: {e}') from e


def grid(
  found: source_lib.Found, part: str = 'encoder'
) -> tuple[int, int, int]:
  """Returns the token grid (t, h, w) of the positions.

  Args:
    found: the source.
    part: `encoder`, for the grid of the first stage, or `head`.

  Raises:
    WeightsError: there is no table, or the table is not of square frames.
  """
  tensors = found.tensors('encoder')
  if found.layout is None:  # our own layout
    joint = tensors.get('positions')
    space, time = (
      (joint or tensors[f'positions_{x}'])[1].shape for x in ('space', 'time')
    )
    return time[0], space[1], space[2]
  rows = {n: x.shape[1] for n, (_, x) in tensors.items() if n in names.TABLES}
  times = rows.get(names.TIME, 1)
  space = rows.get(names.SPACE, rows.get(names.BOTH, 0))
  if part == 'head':
    space = rows.get(names.DECODER, 0) // times
  config_grid = _told(found.config, part)
  if config_grid and math.prod(config_grid) == times * space:
    return config_grid
  side = math.isqrt(space)
  if not side or side**2 != space:
    raise tensors_lib.WeightsError(
      f'{found.source}: found position tables of {rows} rows, wanted those of '
      'squares at each of as many time steps'
    )
  return times, side, side


def _told(config: Mapping[str, Any], part: str) -> tuple[int, int, int] | None:
  """Returns the grid by the arguments of the authors' class; None if missing.

  It can differ from the grid of the file, because the class has defaults.
  """
  size, cell = config.get('input_size', ()), config.get(STRIDE, ())
  if len(size) != len(cell) or len(size) not in (2, 3):
    return None
  *time, h, w = (n // m for n, m in zip(size, cell, strict=True))
  pooled = POOLED if part == 'head' else 1
  return math.prod(time), h // pooled, w // pooled  # images have no time


def tensors(
  found: source_lib.Found, part: str
) -> dict[str, tuple[str, tensors_lib.Tensor]]:
  """Returns `Found.tensors` with the shapes of a video model.

  Position tables are reshaped to [t, h, w, D]: spatial ones have t = 1, and
  temporal ones h = w = 1. Convolutions of image models get an axis of time.

  Raises:
    WeightsError: a position table is not of square frames.
  """
  named = dict(found.tensors(part))
  t, h, w = grid(found, part)
  shapes = {names.DECODER: (t, h, w)}
  if part == 'encoder':
    space, time = (1, h, w), (t, 1, 1)
    shapes = {names.SPACE: space, names.TIME: time, names.BOTH: (t, h, w)}
  for name, (key, x) in named.items():
    if name in shapes:
      named[name] = key, np.asarray(x).reshape(*shapes[name], x.shape[2])
    elif len(x.shape) == 4:  # convolutions of images
      named[name] = key, np.asarray(x)[:, :, None]
  return named


def ends(
  named: Mapping[str, tuple[str, tensors_lib.Tensor]],
) -> tuple[Array, ...]:
  """Returns zero features of one unit per stage, as input of a decoder.

  Widths are those of the decoder's fusion layers. The third stage, which the
  decoder does not use, has the width of the fourth.
  """
  first, second = (
    named[f'multi_scale_fusion_heads.{i}.weight'][1].shape for i in (0, 1)
  )
  sizes = ((8, first[1]), (4, second[1]), (2, first[0]), (2, first[0]))
  return tuple(jnp.zeros((1, 1, 1, side, side, n)) for side, n in sizes)
