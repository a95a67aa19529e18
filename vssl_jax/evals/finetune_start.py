"""What fine-tuning fills into a config: encoder, classes, steps, rule of lr."""

import dataclasses
import pathlib
from typing import Any

import jax
import ml_collections
from jax.experimental import multihost_utils

from vssl_jax import config as config_lib
from vssl_jax import encoders, trees, weights
from vssl_jax.data import options
from vssl_jax.evals import clips, finetune_videos
from vssl_jax.evals import unused as unused_keys
from vssl_jax.models import hiera, vit
from vssl_jax.train import manifests, optimizer

# Fields of an encoder that fine-tuning decides and weights do not.
OURS = ('drop_path', 'remat', 'attention', 'final_norm', 'loops', 'q_pool')
LR_BATCH = 256  # videos that optim.lr is for
# Keys that fine-tuning computes, and those that they are computed from.
DERIVED = {
  'batch_size': 'use finetune.batch_size (and data.repeats)',
  'optim.warmup': 'use finetune.warmup_epochs',
  'optim.lr_batch': 'the rule is optim.lr * finetune.batch_size / 256',
  'optim.lr_power': 'the rule is optim.lr * finetune.batch_size / 256',
  'method.steps': 'use finetune.epochs',
  'method.classes': 'classes are those of finetune.train (data.classes)',
  'method.source': 'use config.encoder',
}


def clip_of(
  config: ml_collections.ConfigDict, encoder: encoders.Encoder | None
) -> encoders.Clip:
  """Returns the clips that open keys of `config.data` are filled from.

  Args:
    config: with `encoder`, `method` and `workdir`.
    encoder: taken in place of `config.encoder`.
  """
  if encoder is not None:
    return encoder.clip
  if config.encoder:
    begun = _begun(config)
    return encoders.clip_of(str(begun) if begun else config.encoder)
  frames, stride, side = config.method.clip
  return encoders.Clip((frames, side, side, config.data.channels or 3), stride)


def _begun(config: ml_collections.ConfigDict) -> pathlib.Path | None:
  """Returns the folder of the weights that a run has started from."""
  folder = pathlib.Path(config.workdir) / 'start'
  if folder.exists() and manifests.listing(config.workdir, ('checkpoints',)):
    return folder
  return None


def unused(config: ml_collections.ConfigDict) -> dict[str, str]:
  """Returns patterns of keys that fine-tuning does not read.

  Args:
    config: a resolved config.

  Returns:
    Pattern -> the key to use instead, or the reason.
  """
  wanted = config.finetune
  out = {
    **DERIVED,
    'data.holdout': 'use finetune.holdout',
    'data.examples': 'videos are counted',
    'cache_targets': 'there are no teachers',
    'probe.*': 'it is of the jobs probe and depth',
    'data.depth_units': unused_keys.DEPTH,
    **unused_keys.of_data(config.data, config.data.repeats),
  }
  if any(wanted.valid) or wanted.valid_where:
    out['finetune.holdout'] = (
      'the best checkpoint is chosen by finetune.valid; leave one of them out'
    )
  for name, suffix in (('source', ''), ('where', '_where')):
    keys = [f'{which}{suffix}' for which in ('train', 'test')]
    if all(any(wanted[key]) for key in keys):
      out[f'data.{name}'] = f'use finetune.{keys[0]} and finetune.{keys[1]}'
  if config.encoder:
    reason = (
      'it is ignored: the encoder and its shape come with the weights of '
      'config.encoder; leave one of the two out'
    )
    names = ('family', 'clip', 'encoder.*', 'vit.*', 'hiera.*')
    return out | {f'method.{name}': reason for name in names}
  data = config.data
  if data.frames and (data.stride or data.fps) and any(data.size):
    out['method.clip'] = 'use data.frames, data.stride and data.size'
  if config.method.family == 'vit':
    reason = "method.family is 'vit'"
    return out | {'method.hiera.*': reason, 'method.q_pool': reason}
  reason = "method.family is 'hiera'"
  return out | {'method.vit.*': reason, 'method.encoder.*': reason}


def _refuse_derived(c: ml_collections.ConfigDict) -> None:
  """Refuses keys with values of their own that fine-tuning would overwrite."""
  default = dict(config_lib.flatten(config_lib.default(c.method.name)))
  for key, value in config_lib.flatten(c):
    if key in DERIVED and value != default[key]:
      raise ValueError(
        f'{key}: found {value!r}, which fine-tuning would overwrite; '
        f'{DERIVED[key]}'
      )


def fill(
  config: ml_collections.ConfigDict, videos: finetune_videos.Videos
) -> ml_collections.ConfigDict:
  """Returns the config with what follows from the videos.

  Args:
    config: with `finetune`, `optim`, `data` and `method`.
    videos: from `finetune_videos.find`.

  Raises:
    ValueError: a batch larger than the data, a warm-up longer than the
      training, or keys that would be overwritten.
  """
  c = config.copy_and_resolve_references()
  wanted = c.finetune
  _refuse_derived(c)
  if not 0 <= wanted.warmup_epochs < wanted.epochs:
    raise ValueError(
      f'finetune.warmup_epochs: found {wanted.warmup_epochs:g}, wanted 0 or '
      f'more and less than the {wanted.epochs} of finetune.epochs'
    )
  steps = videos.count // wanted.batch_size
  if not steps:
    raise ValueError(
      f'finetune.batch_size: found {wanted.batch_size}, wanted at most the '
      f'{videos.count} videos to train on'
    )
  set_steps(c, steps)
  c.method.classes = len(videos.classes)
  c.data.update({n: videos.train[n] for n in ('source', 'where', 'holdout')})
  c.data.classes = videos.classes
  return c


def set_steps(c: ml_collections.ConfigDict, steps: int) -> None:
  """Writes what follows from the steps of an epoch into a config."""
  c.method.steps = c.finetune.epochs * steps
  c.batch_size = c.finetune.batch_size * c.data.repeats
  c.optim.warmup = round(c.finetune.warmup_epochs * steps)
  # Clips of the same video count once: both sides of the rule have them all.
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
  """Writes an encoder's shape into a config.

  Raises:
    ValueError: it is no ViT and no Hiera of ours, or has other colours.
  """
  _check(module, 'config.encoder')
  options.check_colours(c.data, module)
  fields = {
    f.name: getattr(module, f.name)
    for f in dataclasses.fields(module)
    if f.name not in ('parent', 'name', *OURS)
  }
  is_hiera = isinstance(module, hiera.Hiera)
  # Weights have no type to compute in; the config's section does.
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
  if not isinstance(module, vit.Vit | hiera.Hiera):
    raise ValueError(
      f'{name}: found a {type(module).__name__}, wanted a Vit or a Hiera'
    )


def write(
  c: ml_collections.ConfigDict, encoder: encoders.Encoder | None
) -> None:
  """Puts the encoder's weights where the run starts from, and says so.

  They are written into the run's folder once: without a final norm and
  without blocks that decode, and with learned positions of the clip's grid.
  So a run that is started again begins from the same, wherever its source is.

  Args:
    c: its `encoder` is read, its `method` is filled in.
    encoder: taken in place of `config.encoder`.
  """
  if encoder is None and not c.encoder:
    return
  folder = pathlib.Path(c.workdir) / 'start'
  if _begun(c):
    module = encoders.module_of(str(folder))
  else:
    encoder = encoder or encoders.load(c.encoder)
    clips.check_patches(c, encoder.module.patch)
    video = options.spec(c.data.to_dict()).shape
    module = _write(encoder, video, folder, c.method.q_pool)
  if encoder is not None:
    c.encoder = encoder.name
  set_encoder(c, module)
  c.method.source = str(folder)


def _write(
  encoder: encoders.Encoder,
  video: tuple[int, ...],
  folder: pathlib.Path,
  q_pool: int,
) -> vit.Vit | hiera.Hiera:
  """Writes an encoder's part that is fine-tuned and returns its module.

  Args:
    encoder: the weights.
    video: (T, H, W, C) of a clip.
    folder: where to.
    q_pool: of a Hiera, while it is fine-tuned; its parameters fit any.
  """
  full = encoder.module
  _check(full, encoder.name)
  if isinstance(full, hiera.Hiera):
    module = full.clone(final_norm=False, q_pool=q_pool)
  else:
    module = full.clone(
      depth=full.encoder_depth, decoder_blocks=0, final_norm=False, loops=()
    )
  clip = jax.ShapeDtypeStruct((1, *video), 'uint8')
  shapes = jax.eval_shape(module.init, jax.random.key(0), clip)['params']
  found = dict(trees.named_leaves(encoder.at(video).params))
  params = trees.nest(
    {name: found[name] for name, _ in trees.named_leaves(shapes)}
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
