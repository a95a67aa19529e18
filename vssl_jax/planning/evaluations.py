"""Plans of evaluation jobs (`--plan`), from shapes alone."""

import contextlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from vssl_jax import encoder as encoder_lib
from vssl_jax import flops, trees
from vssl_jax.data import options
from vssl_jax.evals import clips, splits
from vssl_jax.evals.depth import job as depth_job
from vssl_jax.evals.finetune import job as finetune_job
from vssl_jax.evals.finetune import setup as finetune_setup
from vssl_jax.evals.finetune import videos as videos_lib
from vssl_jax.evals.probe import head_grid
from vssl_jax.evals.probe import setup as setup_lib
from vssl_jax.evals.probe import train_heads as train_heads_lib
from vssl_jax.masks import tubelets
from vssl_jax.models import vit
from vssl_jax.models.hiera import encoder as hiera_encoder
from vssl_jax.planning import report

# Per parameter of a head: parameter, gradient and two moments, in float32.
BYTES = 4 * 4
# Assumed number of classes if the videos are not available.
CLASSES = 400


def probe(config: ml_collections.ConfigDict, detail: str = 'shapes') -> str:
  """Returns the plan of the job `probe` as text.

  Args:
    config: a resolved config.
    detail: `shapes`; nothing else is supported.

  Raises:
    ValueError: another detail, or no encoder.
  """
  settings = config.probe
  lines, tokens, grid, clip = _encoder(config, detail)
  video_lines, classes = _videos(config)
  lines += video_lines
  if settings.protocol == 'knn':
    return '\n'.join([*lines, 'nearest neighbours: nothing is trained'])
  network = train_heads_lib.network(classes, settings, grid, clip[0])
  return '\n'.join([*lines, _heads(config, network, tokens)])


def depth(config: ml_collections.ConfigDict, detail: str = 'shapes') -> str:
  """Returns the plan of the job `depth`; arguments and errors as `probe`."""
  lines, tokens, grid, clip = _encoder(config, detail)
  video_lines, _ = _videos(config)
  network = depth_job.network(config.probe, grid, clip)
  return '\n'.join([*lines, *video_lines, _heads(config, network, tokens)])


def finetune(config: ml_collections.ConfigDict, detail: str = 'shapes') -> str:
  """Returns the plan of the job `finetune` as text.

  Args:
    config: a resolved config.
    detail: see `report.describe`.

  Raises:
    ValueError: the encoder or a list of videos cannot be read.
  """
  c, note = clips.follow(config, finetune_setup.clip_of(config, None)), ''
  if any(c.finetune.train) or c.data.source:
    videos = videos_lib.find(c)
    c = finetune_setup.fill(c, videos)
    note = finetune_job.describe(c, videos)
  else:
    finetune_setup.set_steps(c, 100)
    c.method.classes = c.method.classes or 400
    note = (
      f'clips: {clips.describe(finetune_job.resolved_clips(c))}\n'
      'finetune.train is not set: an epoch is shown as 100 steps, with '
      f'{c.method.classes} classes\n{finetune_setup.describe_lr(c)}'
    )
  if c.encoder:
    module = encoder_lib.module_of(c.encoder)
    clips.check_patches(c, module.patch)
    finetune_setup.set_encoder(c, module)
  return f'{note}\n{report.describe(c, detail)}'


def _encoder(
  config: ml_collections.ConfigDict, detail: str
) -> tuple[list[str], tuple[int, ...], tubelets.Grid, tuple[int, ...]]:
  """Returns lines on the encoder, its token shape and grid, and the clip."""
  if report.check(detail) != 'shapes':
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
  module = encoder_lib.module_of(config.encoder)
  encoder_clip = encoder_lib.clip_of(config.encoder)
  config = clips.follow(config, encoder_clip)
  clips.check_patches(config, module.patch)
  clip = options.spec(config.data.to_dict()).shape
  video = jax.ShapeDtypeStruct((1, *clip), jnp.uint8)
  params = jax.eval_shape(module.init, jax.random.key(0), video)

  def encode(params: Any, video: Any) -> Any:
    return module.apply(params, video, depth=config.probe.depth or None)

  tokens = jax.eval_shape(encode, params, video).shape[1:]
  grid = tubelets.grid_of(video.shape, module.patch)
  line = (
    f'job {config.job}: {config.encoder}, {trees.count(params) / 1e6:.2f} M '
    f'parameters, frozen, tapped {setup_lib.tap(module, config.probe.depth)}: '
    f'{tokens[0]} tokens of {tokens[1]} a clip of {"x".join(map(str, clip))}'
  )
  clips_text = clips.describe(clips.report(config.data.to_dict(), encoder_clip))
  if isinstance(module, vit.Vit | hiera_encoder.Hiera):
    cost = flops.forward(module, grid)
    line += f', {cost / 1e12:.3f} TF forward'
  return [line, f'clips: {clips_text}'], tokens, grid, clip


def _videos(config: ml_collections.ConfigDict) -> tuple[list[str], int]:
  """Returns lines on the videos, and the number of classes."""
  settings, classes = config.probe, CLASSES
  lines = []
  for which in ('train', 'test'):
    data = splits.of(config, 'probe', which)
    line, count = f'{which}: {splits.name(data) or "not set"}', 0
    with contextlib.suppress(OSError, ValueError):
      videos = options.find(data)
      count = len(videos)
      if which == 'train' and videos.classes:
        classes = len(videos.classes)
    line += f', {count:,} videos' if count else ', not available'
    if which == 'train':
      steps = max(count // settings.batch_size, 1)
      line += f', {settings.epochs} epochs' + (
        f' of {steps} steps of {settings.batch_size}' if count else ''
      )
    else:
      line += (
        f', {settings.segments * settings.clips} clips x {settings.views} crops'
      )
    lines.append(line)
  return lines, classes


def _heads(
  config: ml_collections.ConfigDict,
  network: head_grid.Readout,
  tokens: tuple[int, ...],
) -> str:
  """Returns a line on the trained heads: number, sizes and memory."""
  settings = config.probe
  num_tokens, width = tokens[0] * settings.segments, tokens[1]
  variables = jax.eval_shape(
    lambda key, x: network.init(key, x, jnp.ones(1)),
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, num_tokens, width), jnp.float32),
  )
  size = trees.count(variables['params'])
  count = len(train_heads_lib.Settings.of(settings).spec(network, 1000).pairs)
  return (
    f'heads: {count} ({len(settings.lrs)} learning rates x {len(settings.wds)} '
    f'weight decays) of {size:,} parameters each; '
    f'{math.prod((count, size, BYTES)) / 2**30:.2f} GiB for parameters, '
    'gradients and moments of all'
  )
