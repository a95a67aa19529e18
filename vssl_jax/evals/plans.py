"""What a probe or a depth readout will do and need, from shapes alone."""

import contextlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from vssl_jax import encoders, flops, trees
from vssl_jax.data import options
from vssl_jax.evals import clips, heads, lists
from vssl_jax.evals import depth as depth_job
from vssl_jax.evals import job as job_lib
from vssl_jax.evals import probe as probe_lib
from vssl_jax.models import hiera, layers, vit
from vssl_jax.train import plan

# Of a head: parameters, gradients and two moments, in float32.
BYTES = 4 * 4
# Where the videos are not at hand.
CLASSES = 400


def probe(config: ml_collections.ConfigDict, detail: str = 'shapes') -> str:
  """Returns the plan of the job `probe`.

  Args:
    config: a resolved config.
    detail: `shapes` is all there is.

  Raises:
    ValueError: another detail, or no encoder.
  """
  wanted = config.probe
  lines, tokens, grid, clip = _encoder(config, detail)
  counts, classes = _videos(config)
  lines += counts
  if wanted.protocol == 'knn':
    return '\n'.join([*lines, 'nearest neighbours: nothing is trained'])
  network = probe_lib.network(classes, wanted, grid, clip[0])
  return '\n'.join([*lines, _heads(config, network, tokens)])


def depth(config: ml_collections.ConfigDict, detail: str = 'shapes') -> str:
  """Returns the plan of the job `depth`; arguments and errors as `probe`."""
  lines, tokens, grid, clip = _encoder(config, detail)
  counts, _ = _videos(config)
  network = depth_job.network(config.probe, grid, clip)
  return '\n'.join([*lines, *counts, _heads(config, network, tokens)])


def _encoder(
  config: ml_collections.ConfigDict, detail: str
) -> tuple[list[str], tuple[int, ...], layers.Grid, tuple[int, ...]]:
  """Returns lines on the encoder, its tokens' shape and grid, and the clip."""
  if plan.check(detail) != 'shapes':
    raise ValueError(
      f'--plan: found {detail!r}, wanted --plan alone: nothing of the job '
      f'{config.job!r} is compiled ahead'
    )
  if not config.encoder:
    raise ValueError(
      f'--plan: the job {config.job!r} works on the tokens of an encoder, and '
      'config.encoder is empty; give --config.encoder=<run folder, folder with '
      'published weights, or hub id>'
    )
  module = encoders.module_of(config.encoder)
  own = encoders.clip_of(config.encoder)
  config = clips.follow(config, own)
  clips.check_patches(config, module.patch)
  clip = options.spec(config.data.to_dict()).shape
  video = jax.ShapeDtypeStruct((1, *clip), jnp.uint8)
  params = jax.eval_shape(module.init, jax.random.key(0), video)

  def encode(params: Any, video: Any) -> Any:
    return module.apply(params, video, depth=config.probe.depth or None)

  tokens = jax.eval_shape(encode, params, video).shape[1:]
  grid = layers.grid_of(video.shape, module.patch)
  line = (
    f'job {config.job}: {config.encoder}, {trees.count(params) / 1e6:.2f} M '
    f'parameters, frozen, tapped {job_lib.tap(module, config.probe.depth)}: '
    f'{tokens[0]} tokens of {tokens[1]} a clip of {"x".join(map(str, clip))}'
  )
  found = clips.describe(clips.report(config.data.to_dict(), own))
  if isinstance(module, vit.Vit | hiera.Hiera):
    cost = flops.forward(module, grid)
    line += f', {cost / 1e12:.3f} TF forward'
  return [line, f'clips: {found}'], tokens, grid, clip


def _videos(config: ml_collections.ConfigDict) -> tuple[list[str], int]:
  """Returns lines on the videos, and how many classes they have."""
  wanted, classes = config.probe, CLASSES
  lines = []
  for which in ('train', 'test'):
    data = lists.of(config, 'probe', which)
    line, count = f'{which}: {lists.name(data) or "not set"}', 0
    with contextlib.suppress(OSError, ValueError):
      found = options.find(data)
      count = len(found)
      if which == 'train' and found.classes:
        classes = len(found.classes)
    line += f', {count:,} videos' if count else ', not at hand'
    if which == 'train':
      steps = max(count // wanted.batch_size, 1)
      line += f', {wanted.epochs} epochs' + (
        f' of {steps} steps of {wanted.batch_size}' if count else ''
      )
    else:
      line += f', {wanted.segments * wanted.clips} clips x {wanted.views} crops'
    lines.append(line)
  return lines, classes


def _heads(
  config: ml_collections.ConfigDict,
  network: heads.Readout,
  tokens: tuple[int, ...],
) -> str:
  """Returns a line on what is trained."""
  wanted = config.probe
  rows, width = tokens[0] * wanted.segments, tokens[1]
  variables = jax.eval_shape(
    lambda key, x: network.init(key, x, jnp.ones(1)),
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, rows, width), jnp.float32),
  )
  size = trees.count(variables['params'])
  count = len(probe_lib.Settings.of(wanted).spec(network, 1000).pairs)
  return (
    f'heads: {count} ({len(wanted.lrs)} learning rates x {len(wanted.wds)} '
    f'weight decays) of {size:,} parameters each; '
    f'{math.prod((count, size, BYTES)) / 2**30:.2f} GiB for parameters, '
    'gradients and moments of all'
  )
