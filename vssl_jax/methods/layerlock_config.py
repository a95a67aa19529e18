"""Config keys and builder of LayerLock."""

from collections.abc import Callable
from typing import Any

import ml_collections
import numpy as np

from vssl_jax import losses
from vssl_jax.masks import specs, tubelets
from vssl_jax.methods import (
  config_checks,
  layerlock,
  lock_schedule,
  phase,
  salt,
  salt_config,
)
from vssl_jax.models import Module, layers, positions, vit
from vssl_jax.utils import colours, ranges


def _readable(schedule: str) -> None:
  if schedule:
    lock_schedule.parse(schedule)


STRETCH = ranges.Real(0, ranges.MANY)  # below 1 a fraction, else a count

KEYS = ranges.Section(  # defaults are our choice, ViT-L
  name=('layerlock', ranges.Choice(('layerlock',))),
  # 'vjepa': locks with the masks, predictor and EMA of V-JEPA
  base=('mae', ranges.Choice(('mae', 'vjepa'))),
  encoder=config_checks.encoder(),
  vit=config_checks.network(
    patch=(2, 16, 16),
    # 'both' adds a learned table; 'learned' is 4DS, 'rope_3d' V-JEPA.
    positions='rope_post_norm',
    rope_pairing='paired',  # of 'rope_3d'
    qkv_bias='full',
    init='vjepa',
    gelu='tanh',
    drop_path=0.0,
    dtype='bfloat16',
    remat='none',
    attention='auto',
  ),
  # number of last blocks that decode; they are never locked
  decoder_blocks=(4, config_checks.BLOCKS),
  # 'loops': a sixth less compile time; from the cache, a fifth of that.
  layout=('unrolled', ranges.Choice(('unrolled', 'loops'))),
  total=(100_000, config_checks.STEPS),  # steps of the run
  # Lock a layer, or `jump` of them, every `interval` steps from `start` on,
  # until `last` are locked. Values below 1 are fractions, of the run's steps
  # and of the layers; interval=0 divides the steps after `start` evenly.
  start=(1 / 3, STRETCH),
  interval=(0.0, STRETCH),
  jump=(1, ranges.Whole(1, 2**10)),
  last=(2 / 3, STRETCH),
  # Overrides the four keys above: '((0, 600), (1, 200), ...)', lock depth and
  # steps of each phase; vssl_jax/planning/suggest_locks.py proposes one.
  schedule=('', ranges.Text(_readable)),
  # fraction of each lock's steps, and initial learning-rate factor
  rewarm=(
    (0.1, 0.1),
    ranges.Record((config_checks.SHARE, ranges.Real(high=1, above=0))),
  ),
  # 'pixels': freezing without latent targets
  target=('latent', ranges.Choice(('latent', 'pixels'))),
  # 'all': every locked layer, with a head per layer
  target_layers=('newest', ranges.Choice(('newest', 'all'))),
  positions=('all', ranges.Choice(('all', 'subset', 'masked'))),
  subset=(0.05, ranges.Real(high=1, above=0)),
  subset_context=('subset', ranges.Choice(('subset', 'full'))),
  masks=('random:0.95', config_checks.MASKS),
  mask_select=('random_k', config_checks.MASK_SELECT),
  # 'patch', 'none'
  pixel_norm=('patch_channel', ranges.Choice(tuple(losses.PIXEL_NORMS))),
  target_norm=('ln', ranges.Choice(tuple(losses.TARGET_NORMS))),  # 'none'
  # 'bfloat16' stores locked matrices in half the memory
  frozen_dtype=('float32', config_checks.DTYPE),
  # False: control without freezing; pixel and latent terms are summed.
  freeze=(True, ranges.Flag()),
  latent_weight=('constant', ranges.Choice(('constant', 'cosine'))),
  # base='vjepa' only.
  predictor=config_checks.head(width=384, depth=12, num_heads=16),
  mask_tokens=(2, config_checks.MASK_TOKENS),
  latent_loss=('l1', ranges.Choice(tuple(losses.DISTANCES))),
  ema=((0.99925, 0.99925), config_checks.EMA),  # first and last step of the run
  # layers above the newest locked one
  target_offset=(1, config_checks.BLOCKS),
)

default = KEYS.defaults


def build(
  config: ml_collections.ConfigDict,
  video: tuple[int, ...],
  resolve: Callable[[str], Module],
  pixels: colours.Colours,
) -> tuple[phase.Phase, ...]:
  """Builds the phases from the method's section of the config.

  Args:
    config: `config.method`.
    video: (T, H, W, C) of a clip.
    resolve: not used; there are no outside teachers.
    pixels: mean and standard deviation of the pixels.

  Raises:
    ValueError: a value is out of range, or the schedule does not fit the run.
  """
  del resolve
  KEYS.check(config, 'method')
  encoder = _encoder(config, pixels)
  make = _vjepa if config.base == 'vjepa' else _mae
  return make(config, encoder, _schedule(config, encoder), video)


def mae_steps(config: ml_collections.ConfigDict, video: tuple[int, ...]) -> int:
  """Returns the steps of an MAE without locks that cost as much as the run.

  Args:
    config: `config.method` of the run with locks, whose first phase has a pixel
      target and no locks.
    video: (T, H, W, C) of a clip.
  """
  encoder = _encoder(config, colours.of(video[-1]))
  phases = _mae(config, encoder, _schedule(config, encoder), video)
  costs = [(p.steps, p.cost(video).total) for p in phases]
  return round(sum(n * flops for n, flops in costs) / costs[0][1])


def _encoder(
  config: ml_collections.ConfigDict,
  pixels: colours.Colours = colours.DEFAULTS[3],
) -> vit.Vit:
  separate_predictor = config.base == 'vjepa'
  return salt_config.make_encoder(
    config.encoder,
    config.vit,
    **pixels._asdict(),
    final_norm=separate_predictor,
    decoder_blocks=0 if separate_predictor else config.decoder_blocks,
  )


def most_locked(config: ml_collections.ConfigDict) -> int:
  """Returns the largest number of layers that can be locked."""
  encoder = _encoder(config)
  return encoder.depth - max(encoder.decoder_blocks, 1)


def deepest_lock(config: ml_collections.ConfigDict) -> int:
  """Returns the last lock depth of the schedule by start, interval and last."""
  unscheduled = config.copy_and_resolve_references()
  unscheduled.schedule = ''
  return _schedule(unscheduled, _encoder(config))[-1][0]


def _schedule(
  config: ml_collections.ConfigDict, encoder: vit.Vit
) -> lock_schedule.Schedule:
  """Returns (lock depth, steps) of every phase."""
  limit = most_locked(config)
  if config.schedule:
    schedule = lock_schedule.parse(config.schedule)
    return lock_schedule.check(schedule, config.total, limit)
  return lock_schedule.lock_schedule(
    config.total,
    encoder.depth,
    start=config.start,
    interval=config.interval,
    jump=config.jump,
    last=config.last,
    limit=limit,
  )


def _shared(
  config: ml_collections.ConfigDict, encoder: vit.Vit, depth: int, steps: int
) -> dict[str, Any]:
  """Returns the fields of a phase that are shared by both bases."""
  share, factor = config.rewarm
  loops: tuple[int, ...] = ()
  if config.layout == 'loops':
    loops = tuple(sorted({0, depth, encoder.encoder_depth} - {encoder.depth}))
  return dict(
    name=f'lock_{depth:02d}' if depth else 'pixels',
    steps=steps,
    encoder=encoder.clone(loops=loops),
    horizon='run',
    rewarm=(round(share * steps), factor) if depth else (0, 1.0),
    frozen_dtype=config.frozen_dtype,
  )


def _frozen(encoder: vit.Vit, depth: int) -> tuple[str, ...]:
  """Returns name patterns of the embedding and the first `depth` blocks."""
  if not depth:
    return ()
  learned = encoder.positions in positions.LEARNED
  return (
    'encoder/embed',
    *(('encoder/positions',) if learned else ()),
    *(f'encoder/block_{i:02d}' for i in range(depth)),
  )


def _mae(
  config: ml_collections.ConfigDict,
  encoder: vit.Vit,
  schedule: lock_schedule.Schedule,
  video: tuple[int, ...],
) -> tuple[layerlock.LockPhase, ...]:
  mask, *others = specs.parse(config.masks, select=config.mask_select)
  if others:
    raise ValueError(
      f'method.masks: found {config.masks!r}, wanted one mask such as '
      "'random:0.95' or 'short'"
    )
  mask.counts(
    tubelets.grid_of((1, *video), encoder.patch)
  )  # raises if the grid is too small
  pt, py, px = encoder.patch
  heads: tuple[str, ...] = ('latent_head',)
  if config.target_layers == 'all':
    deepest = max(schedule[-1][0], 1)
    heads = tuple(f'latent_head_{k:02d}' for k in range(1, deepest + 1))
  fields = ('pixel_norm', 'target_norm', 'target_layers', 'positions')
  fields += ('subset', 'subset_context', 'latent_weight')
  head = encoder.dtype, encoder.init_family
  shared = dict(
    masks=(mask,),
    pixel_head=layers.head(pt * py * px * video[-1], *head),
    latent_head=layers.head(encoder.width, *head),
    latent_heads=heads,
    **{name: config[name] for name in fields},
  )
  return tuple(_lock(config, encoder, k, n, shared) for k, n in schedule)


def _lock(
  config: ml_collections.ConfigDict,
  encoder: vit.Vit,
  depth: int,
  steps: int,
  shared: dict[str, Any],
) -> layerlock.LockPhase:
  heads = shared['latent_heads']
  terms: tuple[str, ...] = ('pixel',)
  if depth and config.target == 'latent':
    terms = ('latent',) if config.freeze else ('pixel', 'latent')
  used = set()
  if 'pixel' in terms:
    used.add('pixel_head')
  if 'latent' in terms:
    used |= set(heads[:depth] if config.target_layers == 'all' else heads)
  frozen_depth = depth if config.freeze else 0
  idle = [name for name in ('pixel_head', *heads) if name not in used]
  return layerlock.LockPhase(
    **_shared(config, encoder, depth, steps),
    **shared,
    frozen=(*_frozen(encoder, frozen_depth), *(f'{n}/' for n in idle)),
    lock_depth=depth,
    frozen_depth=frozen_depth,
    terms=terms,
  )


def _vjepa(
  config: ml_collections.ConfigDict,
  encoder: vit.Vit,
  schedule: lock_schedule.Schedule,
  video: tuple[int, ...],
) -> tuple[salt.LatentPhase, ...]:
  """Returns V-JEPA with locks; the EMA's target layer rises with lock depth."""
  masks = specs.parse(config.masks, select=config.mask_select)
  for spec in masks:
    spec.counts(tubelets.grid_of((1, *video), encoder.patch))
  shape = dict(config.predictor, out_width=encoder.width)
  predictor = salt_config.make_predictor(shape, config, encoder)
  phases, start_step = [], 0
  for depth, steps in schedule:
    shared = _shared(config, encoder, depth, steps)
    teacher = shared['encoder'].clone(drop_path=0.0)
    ends = (start_step, start_step + steps)
    momentum = tuple(
      float(np.interp(x, (0, config.total), config.ema)) for x in ends
    )
    start_step += steps
    shared['name'] = f'lock_{depth:02d}'
    frozen = depth if config.freeze else 0
    phases.append(
      salt.LatentPhase(
        **shared,
        frozen=_frozen(encoder, frozen),
        frozen_depth=frozen,
        predictor=predictor,
        masks=masks,
        teachers={'target': phase.Teacher(teacher, phase.FromEma('encoder'))},
        ema={'encoder': phase.Ema('encoder', momentum)},
        latent_loss=config.latent_loss,
        target_norm=config.target_norm,
        target_layer=min(depth + config.target_offset, encoder.depth),
      )
    )
  return tuple(phases)
