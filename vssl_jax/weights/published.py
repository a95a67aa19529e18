"""Loads published encoders from a local folder, a file, or the hub."""

import dataclasses
import logging
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vssl_jax.masks import sampling, tubelets
from vssl_jax.models import Module, framewise, positions, vit
from vssl_jax.models.hiera import decoder, encoder
from vssl_jax.weights import convert, hiera_files, modules, video_positions
from vssl_jax.weights import source as source_lib
from vssl_jax.weights.name_maps import hiera as hiera_lib
from vssl_jax.weights.name_maps import rules
from vssl_jax.weights.readers import tensors

# Stride and frames per second of the clips in pretraining, by family.
TIMING = {
  'vjepa2': (1, 4.0),  # vjepa2, configs/train/*/pretrain-*.yaml: fps
  'videomae': (4, 0.0),  # on K400; 2 on SSv2, but no file states the data set
  'scaling4d': (2, 0.0),  # representations4d: 16 frames, every second one
  'hiera': (4, 0.0),  # arXiv 2306.00989: 16x4
  'image': (4, 0.0),  # our choice: not trained on video
}


def describe(
  source: str | os.PathLike[str],
) -> vit.Vit | encoder.Hiera | framewise.Framewise:
  """Builds the encoder of a source without loading its parameters.

  Image models are wrapped in `framewise.Framewise` and read every second frame.
  """
  opened = source_lib.open_source(source)
  return modules.build(opened, 'encoder', None)


def clip_shape(source: str | os.PathLike[str]) -> tuple[int, int, int, int]:
  """Returns (T, H, W, C) of the clips that an encoder was trained on.

  Without a config, the shape is derived from the learned positions. Without
  these, it is VideoMAE's 16 frames of 224 x 224. For image models it is 16
  frames of the image size they were trained on.
  """
  opened = source_lib.open_source(source)
  config, grid = opened.config, _grid(opened)
  if 'video' in config:
    t, h, w, c = config['video']
    return t, h, w, c
  if grid is not None:
    module = modules.build(opened, 'encoder', None)
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
  """Returns stride and frames per second of the training clips.

  For our own files they are read from the config (0 and 0.0: unknown). For
  other models they are the values that the authors trained with.
  """
  opened = source_lib.open_source(source)
  if 'clip' in opened.config:
    return int(opened.config['clip'][0]), float(opened.config['clip'][1])
  if opened.layout is None:
    return 0, 0.0
  return TIMING[opened.layout.family]


def load_published(
  source: str | os.PathLike[str],
  *,
  part: str = 'encoder',
  trained: bool = False,
  num_heads: int | None = None,
  grid: tubelets.Grid | None = None,
  allow_missing: Iterable[str] = (),
  allow_unused: Iterable[str] = (),
  **fields: Any,
) -> tuple[Module, dict[str, Any], convert.Report]:
  """Loads published weights.

  Args:
    source: a folder with `config.json` and safetensors files, or with one
      `.npz` file; a single `.safetensors`, `.npz`, `.pth` or `.pt` file; or a
      hub id.
    part: `encoder`, or `head` for the predictor or decoder in the same file.
    trained: if the file contains a network and its average, load the trained
      network, to continue training, and not the average.
    num_heads: attention heads, for a file without a config whose width does
      not determine them.
    grid: token grid (t, h, w) to resize learned positions to (first stage for
      Hiera); None for the grid of the file. Image models have one table for all
      frames.
    allow_missing: patterns of our names that may be missing in the file.
    allow_unused: patterns of published keys that may stay unused, in addition
      to those of other parts of the published model.
    **fields: replace fields of the module, such as `dtype` and `remat`, or
      `every` and `cell` of image models.

  Returns:
    The module, its float32 parameters, and a report on all keys.

  Raises:
    WeightsError: the source does not exist, its layout is unknown, or its keys
      do not match the module.
  """
  opened = source_lib.open_source(source)
  opened = dataclasses.replace(opened, trained=trained)
  module = modules.build(opened, part, num_heads).clone(**fields)
  named = opened.tensors(part)
  if opened.layout and opened.layout.family == hiera_lib.FAMILY:
    named = hiera_files.tensors(opened, part)
  family = opened.layout.family if opened.layout else ''
  if family == 'videomae' and part == 'encoder':
    video_positions.log(opened)
    named = _with_grid(opened, named)
  shapes = _shapes(module, named, grid or _grid(opened, part))
  try:
    rows, elsewhere = _rows(opened, part, module, named)
  except tensors.WeightsError as e:
    raise tensors.WeightsError(f'{opened.source}: {e}') from e
  others = opened.layout.others if opened.layout else ()
  keys = {name: key for name, (key, _) in named.items()}
  params, report = convert.to_ours(
    {name: x for name, (_, x) in named.items()},
    rows,
    shapes,
    source=opened.source,
    layout=opened.layout.name if opened.layout else source_lib.OURS,
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
) -> tuple[tuple[rules.Row, ...], tuple[str, ...]]:
  """Returns the table, and names that other parts or formulas account for."""
  if found.layout is None:
    return tuple(rules.Row(n, n) for n in named), ()
  tokens = getattr(module, 'num_mask_tokens', 1)
  rows = found.layout.parts[part].rows(module.depth, tokens)
  others: list[str] = []
  for name, other in found.layout.parts.items():
    if name != part:
      others += [row.theirs for row in other.rows(other.depth(named), tokens)]
  network = getattr(module, 'image', module)
  if isinstance(network, vit.Vit) and network.positions in positions.TABLES:
    # The table is recomputed by its formula, for any grid.
    others += [r.theirs for r in rows if r.ours == 'positions']
  return rows, tuple(others)


def _with_grid(
  found: source_lib.Found, named: Mapping[str, tuple[str, tensors.Tensor]]
) -> dict[str, tuple[str, tensors.Tensor]]:
  """Reshapes learned positions [1, N, D] to [t, h, w, D]."""
  position, named = video_positions.of(found), dict(named)
  if position.kind == 'learned':
    key, x = named[video_positions.STORED]
    table = np.asarray(x).reshape(*position.grid, x.shape[2])
    named[video_positions.STORED] = key, table
  return named


def _grid(
  found: source_lib.Found, part: str = 'encoder'
) -> tubelets.Grid | None:
  """Returns the token grid (t, h, w) of learned positions; None if fixed."""
  if found.layout is None and 'hiera' in found.config:
    return hiera_files.grid(found)
  if found.layout is not None and found.layout.family == hiera_lib.FAMILY:
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
  if len(table.shape) == 3:  # row of a class token, then a square
    side = math.isqrt(table.shape[1] - 1)
    return 1, side, side
  t, h, w, _ = table.shape
  return t, h, w


def _pixels(grid: tubelets.Grid, module: Any) -> tubelets.Grid:
  """Converts the token grid of learned positions to (T, H, W) of a clip."""
  cell = getattr(module, 'image', module)
  cell = cell.stride if isinstance(cell, encoder.Hiera) else module.patch
  t, h, w = (n * p for n, p in zip(grid, cell, strict=True))
  return t, h, w


def _shapes(
  module: Any, named: Mapping[str, Any], grid: tubelets.Grid | None
) -> Any:
  """Returns the shapes of the module's parameters."""
  key = jax.random.key(0)
  if isinstance(module, framewise.Framewise):
    module, grid = module.image, (1, *(grid or (1, 1, 1))[1:])
  if isinstance(module, vit.Vit | encoder.Hiera):
    size = _pixels(grid or (1, 1, 1), module)
    clip = jax.ShapeDtypeStruct((1, *size, len(module.mean)), jnp.uint8)
    return jax.eval_shape(module.init, key, clip)['params']
  index = jnp.zeros((1, 1), jnp.int32)
  mask = sampling.Mask(index, index)
  if isinstance(module, decoder.Decoder):
    ends, grid = hiera_files.ends(named), (grid[0], grid[1] // 2, grid[2] // 2)
    return jax.eval_shape(lambda: module.init(key, ends, mask, grid))['params']
  width = _in_width(module, named)
  return jax.eval_shape(
    lambda: module.init(key, jnp.zeros((1, 1, width)), mask, (1, 1, 1))
  )['params']


def _in_width(module: Any, named: Mapping[str, Any]) -> int:
  """Returns the encoder width that a head expects as input."""
  for name in ('predictor.embeddings.predictor_embeddings', 'predictor_embed',
               'encoder_to_decoder'):  # fmt: skip
    if f'{name}.weight' in named:
      return named[f'{name}.weight'][1].shape[1]
  raise tensors.WeightsError('the file has no predictor and no decoder')
