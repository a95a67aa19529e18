"""Networks for published weights of Hiera, and its tables of positions."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vssl_jax.models import framewise, hiera, hiera_mae
from vssl_jax.weights import hiera_tables as names
from vssl_jax.weights import read
from vssl_jax.weights import source as source_lib

# Of every released decoder: shapes do not tell. What is trained here has half
# of them, as the paper says.
DECODER_HEADS = 16
# Attention heads of the first stage by its channels.
HEADS = {x['channels']: x['num_heads'] for x in hiera.SIZES.values()}
STRIDE, PADDING = 'patch_stride', 'patch_padding'
# Of the authors' video models; their image models have ImageNet's. Source:
# examples/inference.ipynb, whose third deviation, .255, we take for a slip:
# PySlowFast has .225 three times.
VIDEO_COLOURS = {'mean': (0.45,) * 3, 'std': (0.225,) * 3}
# Along height and width, tokens of the first stage to one that is predicted.
POOLED = 4


def build(found: source_lib.Found, part: str, num_heads: int | None) -> Any:
  """Builds the network of a source without reading its numbers.

  Args:
    found: the source.
    part: `encoder` or `head`.
    num_heads: attention heads, of the first stage; None for the usual ones.

  Raises:
    KeyError: a tensor is missing.
    WeightsError: the file does not tell the network.
  """
  shapes = {n: x.shape for n, (_, x) in found.tensors(part).items()}
  table = found.layout.parts[part]
  if part == 'head':
    mlp, width = shapes['decoder_blocks.0.mlp.fc1.weight']
    return hiera_mae.Decoder(
      out_width=shapes['decoder_pred.weight'][0],
      width=width,
      depth=table.depth(shapes),
      num_heads=num_heads or DECODER_HEADS,
      mlp_width=mlp,
    )
  channels, _, *kernel = shapes[names.KERNEL]
  heads = num_heads or found.config.get('num_heads') or HEADS.get(channels)
  if heads is None:
    raise read.WeightsError(
      f'{found.source}: {channels} channels do not tell the number of heads; '
      'give a folder with model.safetensors and a config.json that says '
      'num_heads, or num_heads to weights.load_published'
    )
  depth = table.depth(shapes)
  starts = [i for i in range(depth) if f'blocks.{i}.proj.weight' in shapes]
  edges = [0, *starts, depth]
  fields = dict(
    channels=channels,
    depths=tuple(b - a for a, b in itertools.pairwise(edges)),
    num_heads=heads,
    # Those with a decoder were trained like this; shapes do not tell.
    q_pool=found.config.get('q_pool', 2 if names.DECODER in shapes else 3),
  )
  fields |= VIDEO_COLOURS if len(kernel) == 3 else {}
  fields |= {  # as we write them
    ours: tuple(found.config[theirs])
    for ours, theirs in (('mean', 'image_mean'), ('std', 'image_std'))
    if theirs in found.config
  }
  told = {  # a config's, where the file is of other patches than the released
    ours: tuple(found.config[theirs])
    for ours, theirs in (('stride', STRIDE), ('padding', PADDING))
    if theirs in found.config
  }
  try:
    if len(kernel) == 3:
      return hiera.make(fields, kernel=tuple(kernel), **told)
    return framewise.Framewise(hiera.make(fields, **hiera.IMAGE))
  except ValueError as e:
    raise read.WeightsError(f'{found.source}: {e}') from e


def grid(
  found: source_lib.Found, part: str = 'encoder'
) -> tuple[int, int, int]:
  """Returns the tokens (t, h, w) that positions are for.

  Args:
    found: the source.
    part: `encoder`, whose positions are for the first stage, or `head`.

  Raises:
    WeightsError: no table, or that of another than a square.
  """
  tensors = found.tensors('encoder')
  if found.layout is None:  # as we write them
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
  told = _told(found.config, part)
  if told and math.prod(told) == times * space:
    return told
  side = math.isqrt(space)
  if not side or side**2 != space:
    raise read.WeightsError(
      f'{found.source}: found position tables of {rows} rows, wanted those of '
      'squares at each of as many time steps'
    )
  return times, side, side


def _told(config: Mapping[str, Any], part: str) -> tuple[int, int, int] | None:
  """Returns the grid by what the authors' class is made with, if it is there.

  It need not be that of the file: the class has defaults, too.
  """
  size, cell = config.get('input_size', ()), config.get(STRIDE, ())
  if len(size) != len(cell) or len(size) not in (2, 3):
    return None
  *time, h, w = (n // m for n, m in zip(size, cell, strict=True))
  pooled = POOLED if part == 'head' else 1
  return math.prod(time), h // pooled, w // pooled  # images have no time


def tensors(
  found: source_lib.Found, part: str
) -> dict[str, tuple[str, read.Tensor]]:
  """Returns tensors as `Found.tensors` does, those of images as of clips.

  Position tables get axes of their own for time, rows and columns.

  Raises:
    WeightsError: a table that is not of squares.
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


def ends(named: Mapping[str, tuple[str, read.Tensor]]) -> tuple[Array, ...]:
  """Returns stages of one unit, of the channels that a decoder wants.

  The third stage, which it does not use, has those of the fourth.
  """
  first, second = (
    named[f'multi_scale_fusion_heads.{i}.weight'][1].shape for i in (0, 1)
  )
  sizes = ((8, first[1]), (4, second[1]), (2, first[0]), (2, first[0]))
  return tuple(jnp.zeros((1, 1, 1, side, side, n)) for side, n in sizes)
