"""LayerLock's knobs, and the method that they describe."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import ml_collections
import numpy as np

from vssl_jax import colours, losses, mask_specs, ranges, sharding
from vssl_jax.methods import (
  base,
  knobs,
  layerlock,
  salt,
  salt_config,
  schedules,
)
from vssl_jax.models import layers, positions, vit

AUTO = ('schedule',)  # what a short run may decide


def _readable(schedule: str) -> None:
  if schedule not in ('', 'auto'):
    schedules.parse(schedule)


STRETCH = ranges.Real(0, ranges.MANY)  # below 1 a fraction, else a number

KEYS = ranges.Section(  # our defaults, ViT-L
  name=('layerlock', ranges.Choice(('layerlock',))),
  # 'vjepa': locks under V-JEPA's masks, predictor and average
  base=('mae', ranges.Choice(('mae', 'vjepa'))),
  encoder=knobs.encoder(),
  vit=knobs.network(
    patch=(2, 16, 16),
    # 'both' adds a learned table, 'learned' is 4DS, 'rope_3d' V-JEPA.
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
  # the last blocks, which decode and are never locked
  decoder_blocks=(4, knobs.BLOCKS),
  # 'loops': a sixth less to compile, and a fifth of it from the cache.
  layout=('unrolled', ranges.Choice(('unrolled', 'loops'))),
  total=(100_000, knobs.STEPS),  # steps of the run
  # Lock a layer, or `jump` of them, every `interval` steps from `start` on,
  # until `last` are locked. Values below 1 are fractions, of the run's steps
  # and of the layers; interval=0 divides what is left evenly.
  start=(1 / 3, STRETCH),
  interval=(0.0, STRETCH),
  jump=(1, ranges.Whole(1, 2**10)),
  last=(2 / 3, STRETCH),
  # Instead: '((0, 600), (1, 200), ...)', lock depth and steps of each phase;
  # 'auto': a short run proposes it before the first step.
  schedule=('', ranges.Text(_readable)),
  # that run's length: a fraction of the run's steps, or steps
  trial=(0.05, ranges.Real(high=ranges.MANY, above=0)),
  # share of each lock's steps, and the first factor
  rewarm=(
    (0.1, 0.1),
    ranges.Record((knobs.SHARE, ranges.Real(high=1, above=0))),
  ),
  # 'pixels': freezing only
  target=('latent', ranges.Choice(('latent', 'pixels'))),
  # 'all': every locked layer, a head for each
  targets=('single', ranges.Choice(('single', 'all'))),
  positions=('all', ranges.Choice(('all', 'subset', 'masked'))),
  subset=(0.05, ranges.Real(high=1, above=0)),
  subset_context=('subset', ranges.Choice(('subset', 'full'))),
  masks=('random:0.95', knobs.MASKS),
  mask_select=('random_k', knobs.MASK_SELECT),
  # 'patch', 'none'
  pixel_norm=('patch_channel', ranges.Choice(tuple(losses.PIXEL_NORMS))),
  target_norm=('ln', ranges.Choice(tuple(losses.TARGET_NORMS))),  # 'none'
  # 'bfloat16' stores locked matrices in half
  frozen_dtype=('float32', knobs.DTYPE),
  # False is the control: nothing is locked, pixel and latent terms are added.
  freeze=(True, ranges.Flag()),
  latent_weight=('constant', ranges.Choice(('constant', 'cosine'))),
  # base='vjepa' only.
  predictor=knobs.head(width=384, depth=12, num_heads=16),
  mask_tokens=(2, knobs.MASK_TOKENS),
  latent_loss=('l1', ranges.Choice(tuple(losses.DISTANCES))),
  ema=((0.99925, 0.99925), knobs.EMA),  # first and last step of the run
  # layers above the newest locked one
  target_offset=(1, knobs.BLOCKS),
)

default = KEYS.defaults


def build(
  config: ml_collections.ConfigDict,
  video: tuple[int, ...],
  resolve: Callable[[str], nn.Module],
  pixels: colours.Colours,
) -> base.Method:
  """Builds the method from its section of the config.

  Args:
    config: `config.method`.
    video: (T, H, W, C) of a clip.
    resolve: not used; no module comes from outside.
    pixels: mean and deviation of the clips.

  Raises:
    ValueError: a value outside of its range, or a schedule that does not fit.
  """
  del resolve
  KEYS.check(config, 'method')
  encoder = _encoder(config, pixels)
  make = _vjepa if config.base == 'vjepa' else _mae
  return make(config, encoder, _schedule(config, encoder), video)


def mae_steps(config: ml_collections.ConfigDict, video: tuple[int, ...]) -> int:
  """Returns how many steps without locks cost what a run with them costs.

  Args:
    config: `config.method` of the run with locks, pixels first.
    video: (T, H, W, C) of a clip.
  """
  encoder = _encoder(config, colours.of(video[-1]))
  method = _mae(config, encoder, _schedule(config, encoder), video)
  costs = [(p.steps, method.cost(p, video).total) for p in method.plan]
  return round(sum(n * flops for n, flops in costs) / costs[0][1])


def trial(
  config: ml_collections.ConfigDict,
) -> tuple[ml_collections.ConfigDict, int, int]:
  """Returns a short run that locks nothing, its steps and the whole run's."""
  share = config.trial
  steps = max(round(config.total * share if share < 1 else share), 1)
  short = config.copy_and_resolve_references()
  short.total, short.schedule = steps, f'((0, {steps}),)'
  return short, steps, config.total


def decide(
  config: ml_collections.ConfigDict,
  steps: Sequence[int],
  drift: Sequence[Mapping[int, float]],
) -> dict[str, Any]:
  """Returns the schedule that the drift of a short run proposes.

  Args:
    config: of the whole run.
    steps: at which the short run was looked at.
    drift: at each look, block -> relative change since the look before.
  """
  plain = config.copy_and_resolve_references()
  plain.schedule = ''
  deepest = _schedule(plain, _encoder(config))[-1][0]
  found = schedules.suggest(drift, steps, config.total, limit=deepest)
  return {'schedule': repr(found)}


def _encoder(
  config: ml_collections.ConfigDict,
  pixels: colours.Colours = colours.DEFAULTS[3],
) -> vit.Vit:
  alone = config.base == 'vjepa'
  return salt_config.make_encoder(
    config.encoder,
    config.vit,
    **pixels._asdict(),
    final_norm=alone,
    decoder_blocks=0 if alone else config.decoder_blocks,
  )


def most_locked(config: ml_collections.ConfigDict) -> int:
  """Returns how many layers may be locked at most."""
  encoder = _encoder(config)
  return encoder.depth - max(encoder.decoder_blocks, 1)


def _schedule(
  config: ml_collections.ConfigDict, encoder: vit.Vit
) -> schedules.Schedule:
  """Returns (lock depth, steps) of every phase."""
  limit = most_locked(config)
  if config.schedule == 'auto':
    raise ValueError(
      "method.schedule: 'auto' is found by a short run when training starts; "
      "elsewhere write a schedule, or '' for start, interval, jump and last"
    )
  if config.schedule:
    found = schedules.parse(config.schedule)
    return schedules.check(found, config.total, limit)
  return schedules.lock_schedule(
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
  """Returns what the phases of both bases have in common."""
  share, factor = config.rewarm
  loops: tuple[int, ...] = ()
  if config.layout == 'loops':
    loops = tuple(sorted({0, depth, encoder.encoder_depth} - {encoder.depth}))
  return dict(
    name=f'lock_{depth:02d}' if depth else 'pixels',
    steps=steps,
    encoder=encoder.clone(loops=loops),
    init='carry',
    opt='carry',
    horizon='run',
    rewarm=(round(share * steps), factor) if depth else (0, 1.0),
    frozen_dtype=config.frozen_dtype,
  )


def _frozen(encoder: vit.Vit, depth: int) -> tuple[str, ...]:
  """Returns the patterns of what makes the outputs of the first blocks."""
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
  schedule: schedules.Schedule,
  video: tuple[int, ...],
) -> layerlock.LayerLock:
  mask, *more = mask_specs.parse(config.masks, select=config.mask_select)
  if more:
    raise ValueError(
      f'method.masks: found {config.masks!r}, wanted one mask such as '
      "'random:0.95' or 'short'"
    )
  mask.counts(layers.grid_of((1, *video), encoder.patch))  # refuses small grids
  pt, py, px = encoder.patch
  heads: tuple[str, ...] = ('latent_head',)
  if config.targets == 'all':
    deepest = max(schedule[-1][0], 1)
    heads = tuple(f'latent_head_{k:02d}' for k in range(1, deepest + 1))
  taken = ('pixel_norm', 'target_norm', 'targets', 'positions', 'subset')
  taken += ('subset_context', 'latent_weight')
  return layerlock.LayerLock(
    plan=tuple(_lock(config, encoder, k, n, heads) for k, n in schedule),
    mask=mask,
    pixel_head=_head(encoder, pt * py * px * video[-1]),
    latent_head=_head(encoder, encoder.width),
    latent_heads=heads,
    **{name: config[name] for name in taken},
  )


def _head(encoder: vit.Vit, width: int) -> nn.Dense:
  return nn.Dense(
    width,
    dtype=jnp.dtype(encoder.dtype),
    kernel_init=layers.kernel_init(encoder.init_family, 'head'),
    dot_general=sharding.dot_general,
  )


def _lock(
  config: ml_collections.ConfigDict,
  encoder: vit.Vit,
  depth: int,
  steps: int,
  heads: tuple[str, ...],
) -> layerlock.Lock:
  terms: tuple[str, ...] = ('pixel',)
  if depth and config.target == 'latent':
    terms = ('latent',) if config.freeze else ('pixel', 'latent')
  used = set()
  if 'pixel' in terms:
    used.add('pixel_head')
  if 'latent' in terms:
    used |= set(heads[:depth] if config.targets == 'all' else heads)
  frozen_depth = depth if config.freeze else 0
  idle = [name for name in ('pixel_head', *heads) if name not in used]
  return layerlock.Lock(
    **_shared(config, encoder, depth, steps),
    frozen=(*_frozen(encoder, frozen_depth), *(f'{n}/' for n in idle)),
    lock_depth=depth,
    frozen_depth=frozen_depth,
    terms=terms,
  )


def _vjepa(
  config: ml_collections.ConfigDict,
  encoder: vit.Vit,
  schedule: schedules.Schedule,
  video: tuple[int, ...],
) -> salt.Salt:
  """Returns V-JEPA's loss with locks: a target that moves up an average."""
  masks = mask_specs.parse(config.masks, select=config.mask_select)
  for spec in masks:
    spec.counts(layers.grid_of((1, *video), encoder.patch))
  shape = dict(config.predictor, out_width=encoder.width)
  predictor = salt_config.make_predictor(shape, config, encoder)
  plan, done = [], 0
  for depth, steps in schedule:
    shared = _shared(config, encoder, depth, steps)
    teacher = shared['encoder'].clone(drop_path=0.0)
    ends = (done, done + steps)
    momentum = tuple(
      float(np.interp(x, (0, config.total), config.ema)) for x in ends
    )
    done += steps
    shared['name'] = f'lock_{depth:02d}'
    frozen = depth if config.freeze else 0
    plan.append(
      salt.LatentStudent(
        **shared,
        frozen=_frozen(encoder, frozen),
        frozen_depth=frozen,
        predictor=predictor,
        masks=masks,
        teachers={'target': base.Teacher(teacher, '@ema/encoder')},
        ema={'encoder': base.Ema('encoder', momentum)},
        latent_loss=config.latent_loss,
        target_norm=config.target_norm,
        target_layer=min(depth + config.target_offset, encoder.depth),
      )
    )
  return salt.Salt(tuple(plan))
