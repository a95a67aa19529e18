"""Published encoders from a local folder, a file, or the hub."""

import dataclasses
import logging
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vssl_jax import masking
from vssl_jax.models import framewise, hiera, hiera_mae, layers, positions, vit
from vssl_jax.weights import (
  convert,
  hiera_files,
  hiera_tables,
  modules,
  pairs,
  read,
  video_positions,
)
from vssl_jax.weights import source as source_lib

# Stride and frames per second of the clips of pre-training, by family.
TIMING = {
  'vjepa2': (1, 4.0),  # vjepa2, configs/train/*/pretrain-*.yaml: fps
  'videomae': (4, 0.0),  # on K400; on SSv2 2, which no file states
  'scaling4d': (2, 0.0),  # representations4d: 16 frames, every second one
  'hiera': (4, 0.0),  # arXiv 2306.00989: 16x4
  'image': (4, 0.0),  # our choice: these have seen no video
}


def describe(
  source: str | os.PathLike[str],
) -> vit.Vit | hiera.Hiera | framewise.Framewise:
  """Returns the encoder of a source without reading its parameters.

  Image models come as `framewise.Framewise`, on every second frame.
  """
  found = source_lib.open_source(source)
  return modules.build(found, 'encoder', None)


def clip_shape(source: str | os.PathLike[str]) -> tuple[int, int, int, int]:
  """Returns (T, H, W, C) of the clips that the encoder was trained on.

  Files without a config tell it by their learned positions; those without
  these give VideoMAE's 16 frames of 224 x 224. Image models are taken to see
  16 frames of the images that they were trained on.
  """
  found = source_lib.open_source(source)
  config, grid = found.config, _grid(found)
  if 'video' in config:
    t, h, w, c = config['video']
    return t, h, w, c
  if grid is not None:
    module = modules.build(found, 'encoder', None)
    t, h, w = _pixels(grid, module)
    channels = len(getattr(module, 'image', module).mean)
    return 16 if isinstance(module, framewise.Framewise) else t, h, w, channels
  frames = config.get('frames_per_clip', config.get('num_frames', 16))
  side = config.get('crop_size', config.get('image_size', 224))
  if isinstance(side, dict):  # of an image processor
    side = side['height']
  return (
    frames,
    side,
    side,
    config.get('num_channels', config.get('in_chans', 3)),
  )


def clip_timing(source: str | os.PathLike[str]) -> tuple[int, float]:
  """Returns stride and frames per second of the clips of `clip_shape`.

  Our own files state them (0 and 0.0: not known); those of other models have
  the values that their authors trained with.
  """
  found = source_lib.open_source(source)
  if 'clip' in found.config:
    return int(found.config['clip'][0]), float(found.config['clip'][1])
  if found.layout is None:
    return 0, 0.0
  return TIMING[found.layout.family]


def load_published(
  source: str | os.PathLike[str],
  *,
  part: str = 'encoder',
  trained: bool = False,
  num_heads: int | None = None,
  grid: layers.Grid | None = None,
  allow_missing: Iterable[str] = (),
  allow_unused: Iterable[str] = (),
  **fields: Any,
) -> tuple[nn.Module, dict[str, Any], convert.Report]:
  """Loads published weights.

  Args:
    source: a folder with `config.json` and safetensors files, or with one
      `.npz` file; a single `.safetensors`, `.npz`, `.pth` or `.pt` file; or a
      hub id.
    part: `encoder`, or `head` for the predictor or decoder beside it.
    trained: of a file with a network and its average, take the network that
      was trained, to continue from it, and not the average.
    num_heads: attention heads, for a file without a config whose width says
      nothing about them.
    grid: tokens (t, h, w) to resize learned positions to, of Hiera those of
      the first stage; None for the file's own. Image models have one table
      for all frames.
    allow_missing: patterns of our names that may stay unfilled.
    allow_unused: patterns of their keys that may fill nothing, beside other
      parts of the published model.
    **fields: replace fields of the module, such as `dtype` and `remat`, or,
      of image models, `every` and `cell`.

  Returns:
    The module, its float32 parameters, and what became of every key.

  Raises:
    WeightsError: nothing there, an unknown layout, or keys that do not fit.
  """
  found = source_lib.open_source(source)
  found = dataclasses.replace(found, trained=trained)
  module = modules.build(found, part, num_heads).clone(**fields)
  named = found.tensors(part)
  if found.layout and found.layout.family == hiera_tables.FAMILY:
    named = hiera_files.tensors(found, part)
  family = found.layout.family if found.layout else ''
  if family == 'videomae' and part == 'encoder':
    video_positions.log(found)
    named = _with_grid(found, named)
  shapes = _shapes(module, named, grid or _grid(found, part))
  try:
    rows, elsewhere = _rows(found, part, module, named)
  except read.WeightsError as e:
    raise read.WeightsError(f'{found.source}: {e}') from e
  others = found.layout.others if found.layout else ()
  keys = {name: key for name, (key, _) in named.items()}
  params, report = convert.to_ours(
    {name: x for name, (_, x) in named.items()},
    rows,
    shapes,
    source=found.source,
    layout=found.layout.name if found.layout else source_lib.OURS,
    resize=getattr(getattr(module, 'image', module), 'resize', 'trilinear'),
    allow_missing=allow_missing,
    allow_unused=(*allow_unused, *others),
    elsewhere=elsewhere,
  )
  report = dataclasses.replace(
    report,
    loaded=tuple(keys[n] for n in report.loaded),
    unused=tuple(keys[n] for n in report.unused),
  )
  logging.getLogger(__name__).info('%s', report)
  return module, params, report


def _rows(
  found: source_lib.Found, part: str, module: Any, named: Mapping[str, Any]
) -> tuple[tuple[pairs.Row, ...], tuple[str, ...]]:
  """Returns the table, and names that belong elsewhere."""
  if found.layout is None:
    return tuple(pairs.Row(n, n) for n in named), ()
  tokens = getattr(module, 'num_mask_tokens', 1)
  rows = found.layout.parts[part].rows(module.depth, tokens)
  others: list[str] = []
  for name, other in found.layout.parts.items():
    if name != part:
      others += [row.theirs for row in other.rows(other.depth(named), tokens)]
  network = getattr(module, 'image', module)
  if isinstance(network, vit.Vit) and network.positions in positions.TABLES:
    # Computed again, so that it fits every grid.
    others += [r.theirs for r in rows if r.ours == 'positions']
  return rows, tuple(others)


def _with_grid(
  found: source_lib.Found, named: Mapping[str, tuple[str, read.Tensor]]
) -> dict[str, tuple[str, read.Tensor]]:
  """Returns tensors whose learned positions [1, N, D] are [t, h, w, D]."""
  position, named = video_positions.of(found), dict(named)
  if position.kind == 'learned':
    key, x = named[video_positions.STORED]
    table = np.asarray(x).reshape(*position.grid, x.shape[2])
    named[video_positions.STORED] = key, table
  return named


def _grid(found: source_lib.Found, part: str = 'encoder') -> layers.Grid | None:
  """Returns the tokens (t, h, w) of learned positions, None without them."""
  if found.layout is None and 'hiera' in found.config:
    return hiera_files.grid(found)
  if found.layout is not None and found.layout.family == hiera_tables.FAMILY:
    return hiera_files.grid(found, part)
  name = 'positions'
  if found.layout is not None and found.layout.family == 'videomae':
    position = video_positions.of(found)
    return position.grid if part == 'encoder' else None
  if found.layout is not None:
    rows = found.layout.parts['encoder'].rows(0)
    name = {r.ours: r.theirs for r in rows}.get(name, '')
  _, table = found.tensors('encoder').get(name, ('', None))
  if table is None:
    return None
  if len(table.shape) == 3:  # a square, after the row of a class token
    side = math.isqrt(table.shape[1] - 1)
    return 1, side, side
  t, h, w, _ = table.shape
  return t, h, w


def _pixels(grid: layers.Grid, module: Any) -> layers.Grid:
  """Returns (T, H, W) of a clip by the grid of its learned positions."""
  cell = getattr(module, 'image', module)
  cell = cell.stride if isinstance(cell, hiera.Hiera) else module.patch
  t, h, w = (n * p for n, p in zip(grid, cell, strict=True))
  return t, h, w


def _shapes(
  module: Any, named: Mapping[str, Any], grid: layers.Grid | None
) -> Any:
  """Returns the module's parameters as shapes."""
  key = jax.random.key(0)
  if isinstance(module, framewise.Framewise):
    module, grid = module.image, (1, *(grid or (1, 1, 1))[1:])
  if isinstance(module, vit.Vit | hiera.Hiera):
    size = _pixels(grid or (1, 1, 1), module)
    clip = jax.ShapeDtypeStruct((1, *size, len(module.mean)), jnp.uint8)
    return jax.eval_shape(module.init, key, clip)['params']
  index = jnp.zeros((1, 1), jnp.int32)
  mask = masking.Mask(index, index)
  if isinstance(module, hiera_mae.Decoder):
    ends, grid = hiera_files.ends(named), (grid[0], grid[1] // 2, grid[2] // 2)
    return jax.eval_shape(lambda: module.init(key, ends, mask, grid))['params']
  width = _in_width(module, named)
  return jax.eval_shape(
    lambda: module.init(key, jnp.zeros((1, 1, width)), mask, (1, 1, 1))
  )['params']


def _in_width(module: Any, named: Mapping[str, Any]) -> int:
  """Returns the width of the encoder in front of a head."""
  for name in ('predictor.embeddings.predictor_embeddings', 'predictor_embed',
               'encoder_to_decoder'):  # fmt: skip
    if f'{name}.weight' in named:
      return named[f'{name}.weight'][1].shape[1]
  raise read.WeightsError('the file has no predictor and no decoder')
