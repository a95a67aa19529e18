"""Fills a fine-tuning config: encoder, classes, steps, learning rate rule."""

import dataclasses
import pathlib
from typing import Any

import jax
import ml_collections
from jax.experimental import multihost_utils

from vssl_jax import encoder as encoder_lib
from vssl_jax import methods, trees, weights
from vssl_jax.checkpoint import integrity
from vssl_jax.data import options
from vssl_jax.evals import clips
from vssl_jax.evals.finetune import options as finetune_options
from vssl_jax.evals.finetune import videos as videos_lib
from vssl_jax.models import vit
from vssl_jax.models.hiera import encoder as hiera_encoder
from vssl_jax.train import optimizer
from vssl_jax.utils import config_io

# Fields of an encoder that come from the config and not from weights.
OURS = ('drop_path', 'remat', 'attention', 'final_norm', 'loops', 'q_pool')
LR_BATCH = 256  # batch size, in videos, that optim.lr refers to


def clip_of(
  config: ml_collections.ConfigDict, encoder: encoder_lib.Encoder | None
) -> encoder_lib.Clip:
  """Returns the clips that open keys of `config.data` are filled from.

  Args:
    config: with `encoder`, `method` and `workdir`.
    encoder: used in place of `config.encoder`.
  """
  if encoder is not None:
    return encoder.clip
  if config.encoder:
    start = _begun(config)
    return encoder_lib.clip_of(str(start) if start else config.encoder)
  frames, stride, side = config.method.clip
  return encoder_lib.Clip(
    (frames, side, side, config.data.channels or 3), stride
  )


def _begun(config: ml_collections.ConfigDict) -> pathlib.Path | None:
  """Returns the folder of the initial weights, if the run has started."""
  folder = pathlib.Path(config.workdir) / 'start'
  if folder.exists() and integrity.listing(config.workdir, ('checkpoints',)):
    return folder
  return None


def _refuse_computed(config: ml_collections.ConfigDict) -> None:
  """Refuses keys with values of their own that `fill` would overwrite."""
  defaults = {'batch_size': options.BATCH_SIZE}
  for section, keys in (
    ('optim', optimizer.KEYS),
    ('method', methods.keys(config.method.name)),
  ):
    flat = config_io.flatten(keys.defaults(), f'{section}.')
    defaults.update(flat)
  values = dict(config_io.flatten(config))
  for key, remedy in finetune_options.DERIVED.items():
    if values[key] != defaults[key]:
      raise ValueError(
        f'{key}: found {values[key]!r}, which fine-tuning would overwrite; '
        f'{remedy}'
      )


def fill(
  config: ml_collections.ConfigDict, videos: videos_lib.Videos
) -> ml_collections.ConfigDict:
  """Returns the config with the keys that follow from the videos.

  Args:
    config: with `finetune`, `optim`, `data` and `method`.
    videos: from `videos.find`.

  Raises:
    ValueError: a batch larger than the data, a warm-up that is not shorter
      than the training, or keys that would be overwritten.
  """
  c = config.copy_and_resolve_references()
  _refuse_computed(c)
  settings = c.finetune
  if not 0 <= settings.warmup_epochs < settings.epochs:
    raise ValueError(
      f'finetune.warmup_epochs: found {settings.warmup_epochs:g}, wanted 0 or '
      f'more and less than the {settings.epochs} of finetune.epochs'
    )
  steps = videos.count // settings.batch_size
  if not steps:
    raise ValueError(
      f'finetune.batch_size: found {settings.batch_size}, wanted at most the '
      f'{videos.count} videos to train on'
    )
  set_steps(c, steps)
  c.method.classes = len(videos.classes)
  c.data.update({n: videos.train[n] for n in ('source', 'where', 'holdout')})
  c.data.classes = videos.classes
  return c


def set_steps(c: ml_collections.ConfigDict, steps: int) -> None:
  """Sets the keys that follow from the steps of an epoch, in place."""
  c.method.steps = c.finetune.epochs * steps
  c.batch_size = c.finetune.batch_size * c.data.repeats
  c.optim.warmup = round(c.finetune.warmup_epochs * steps)
  # Clips of the same video count once: both sides of the rule have the factor.
  c.optim.lr_batch, c.optim.lr_power = LR_BATCH * c.data.repeats, 1.0


def describe_lr(config: ml_collections.ConfigDict) -> str:
  """Returns the learning rate as a formula with its result."""
  optim, size = config.optim, config.finetune.batch_size
  peak = optim.lr * optimizer.lr_scale(optim, config.batch_size)
  text = (
    f'lr = base * batch / {LR_BATCH} = {optim.lr:g} * {size} / {LR_BATCH} = '
    f'{peak:g}'
  )
  if config.data.repeats > 1:
    text += (
      f'; each video is in the batch {config.data.repeats} times, which the '
      'rule does not count'
    )
  if optim.layer_decay != 1:
    text += (
      f'; times {optim.layer_decay:g}^(blocks - i) in block i, the head at 1'
    )
  return text


def set_encoder(c: ml_collections.ConfigDict, module: Any) -> None:
  """Sets the keys of an encoder's shape, in place.

  Raises:
    ValueError: it is no `Vit` and no `Hiera`, or has other channels.
  """
  _check(module, 'config.encoder')
  options.check_colours(c.data, module)
  fields = {
    f.name: getattr(module, f.name)
    for f in dataclasses.fields(module)
    if f.name not in ('parent', 'name', *OURS)
  }
  is_hiera = isinstance(module, hiera_encoder.Hiera)
  # The compute dtype comes from the config: weights have none.
  fields['dtype'] = (c.method.hiera if is_hiera else c.method.vit).dtype
  with c.unlocked():
    if is_hiera:
      c.method.family = 'hiera'
      c.method.hiera = ml_collections.ConfigDict(fields)
      return
    fields['depth'], fields['decoder_blocks'] = module.encoder_depth, 0
    fields['mlp_width'] = module.mlp_width or 4 * module.width
    c.method.family = 'vit'
    c.method.encoder.update({n: fields.pop(n) for n in vit.FIELDS})
    c.method.vit = ml_collections.ConfigDict(fields)


def _check(module: Any, name: str) -> None:
  if not isinstance(module, vit.Vit | hiera_encoder.Hiera):
    raise ValueError(
      f'{name}: found a {type(module).__name__}, wanted a Vit or a Hiera'
    )


def write(
  c: ml_collections.ConfigDict, encoder: encoder_lib.Encoder | None
) -> None:
  """Writes the initial weights into the run folder and sets their keys.

  The weights are written once: without a final norm and without blocks that
  decode, and with learned positions of the clip's grid. A restarted run starts
  from the same weights, even if their source has moved.

  Args:
    c: config; its `encoder` is read, its `method` is filled in.
    encoder: used in place of `config.encoder`.
  """
  if encoder is None and not c.encoder:
    return
  folder = pathlib.Path(c.workdir) / 'start'
  if _begun(c):
    module = encoder_lib.module_of(str(folder))
  else:
    encoder = encoder or encoder_lib.load(c.encoder)
    clips.check_patches(c, encoder.module.patch)
    video = options.spec(c.data.to_dict()).shape
    module = _write(encoder, video, folder, c.method.q_pool)
  if encoder is not None:
    c.encoder = encoder.name
  set_encoder(c, module)
  c.method.source = str(folder)


def _write(
  encoder: encoder_lib.Encoder,
  video: tuple[int, ...],
  folder: pathlib.Path,
  q_pool: int,
) -> vit.Vit | hiera_encoder.Hiera:
  """Writes the part of an encoder that is fine-tuned; returns its module.

  Args:
    encoder: the weights.
    video: (T, H, W, C) of a clip.
    folder: output folder.
    q_pool: `q_pool` of a Hiera in fine-tuning; its parameters fit any value.
  """
  full = encoder.module
  _check(full, encoder.name)
  if isinstance(full, hiera_encoder.Hiera):
    module = full.clone(final_norm=False, q_pool=q_pool)
  else:
    module = full.clone(
      depth=full.encoder_depth, decoder_blocks=0, final_norm=False, loops=()
    )
  clip = jax.ShapeDtypeStruct((1, *video), 'uint8')
  shapes = jax.eval_shape(module.init, jax.random.key(0), clip)['params']
  leaves = dict(trees.named_leaves(encoder.at(video).params))
  params = trees.nest(
    {name: leaves[name] for name, _ in trees.named_leaves(shapes)}
  )
  if jax.process_index() == 0:
    weights.export(
      module,
      params,
      folder,
      video=encoder.video,
      timing=(encoder.stride, encoder.fps),
      layout='vssl_vit',
    )
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('weights to start from')
  return module
