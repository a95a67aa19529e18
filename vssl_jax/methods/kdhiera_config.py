"""The knobs of KDHiera, interpretation of the abstract, and its builder.

Hiera-MAE is one of its cases: no teachers, random units, pixels as targets.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import ml_collections

from vssl_jax import colours, losses, ranges, unit_masks
from vssl_jax.methods import base, chain, kdhiera, knobs, pixel_phase
from vssl_jax.methods import teachers as teachers_lib
from vssl_jax.models import attended, framewise, hiera, hiera_mae, stage_heads

STAGES = 4
# Of what chance would keep, by `mask/attention_kept`.
CLEARLY = 1.1


KEYS = ranges.Section(  # student Hiera-B: all values are ours
  name=('kdhiera', ranges.Choice(('kdhiera',))),
  # 300 epochs of 240k clips at batch 512
  steps=(140_400, knobs.STEPS),
  # The student: a row of hiera.SIZES; () and 0 take the values of the size.
  encoder=ranges.Section(
    size=('B', ranges.Choice(tuple(hiera.SIZES))),
    channels=(0, knobs.WIDTH),
    depths=((), ranges.Tuple(ranges.Whole(1, 2**10), lengths=(0, STAGES))),
    num_heads=(0, knobs.HEADS),
  ),
  # models/hiera.py explains each field.
  hiera=ranges.Section(
    kernel=((3, 7, 7), knobs.TRIPLE),
    stride=((2, 4, 4), knobs.TRIPLE),
    padding=((1, 3, 3), ranges.Tuple(ranges.Whole(0, 2**10), lengths=(3,))),
    init=('mae', ranges.Choice(tuple(hiera.INITS))),
    **knobs.network(dtype='bfloat16', remat='none', attention='auto'),
  ),
  drop_path=(0.1, knobs.RATE),  # of the student
  **teachers_lib.keys(
    # Blocks of the teacher after which its features are followed.
    layers=(
      (3, 6, 9, 12),
      ranges.Tuple(ranges.Whole(1, 2**10), unique=True),
    ),
    weight=(1.0, knobs.WEIGHT),
  ),
  # 'visible': the visible tokens of all stages follow layers of the teachers;
  # 'masked': a decoder for each teacher predicts these layers where the
  # student sees nothing; 'pixels': a decoder predicts pixels there.
  targets=('visible', ranges.Choice(('visible', 'masked', kdhiera.PIXELS))),
  # which follows each of `layers`, under 'visible'
  stages=((1, 2, 3, 4), ranges.Tuple(ranges.Whole(1, STAGES))),
  # of each of `layers`, over their sum; (): all the same
  layer_weights=((), ranges.Tuple(knobs.WEIGHT)),
  # 'mse', 'smooth_l1'
  feature_loss=(
    'cosine',
    ranges.Choice(('cosine', *losses.TOKEN_DISTANCES)),
  ),
  target_norm=('ln', ranges.Choice(tuple(losses.TARGET_NORMS))),  # 'none'
  # fixed positions in front of the heads of stages
  head_pos=(False, ranges.Flag()),
  decoder=knobs.head(width=512, depth=2, num_heads=8),
  # 'patch_channel', 'none'
  pixel_norm=('patch', ranges.Choice(tuple(losses.PIXEL_NORMS))),
  # --- masks
  mask_ratio=(0.9, ranges.Real(above=0, below=1)),
  # more amortise the teachers
  masks_per_clip=(1, knobs.MASKS_PER_CLIP),
  # 'random': all units alike, as Hiera-MAE
  units=('attention', ranges.Choice(('attention', 'random'))),
  # whose attention; it need not be among `teachers`
  mask_teacher=('image', ranges.Choice(teachers_lib.NAMES)),
  # 'cls': of the class token; 'column_mean': of all patches, for teachers
  # without a class token or with one that learned nothing (MAE);
  # 'feature_norm': length of the last features; 'uniform'.
  scores=(
    'cls',
    ranges.Choice((*attended.KINDS, 'feature_norm', 'uniform')),
  ),
  selection=('sample', ranges.Choice(unit_masks.MODES)),
  tube=(False, ranges.Flag()),  # the same units at every time step
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
    resolve: source of an outside teacher -> its module.
    pixels: mean and deviation of the clips.

  Raises:
    ValueError: a value outside of its range, a teacher without a source, or
      layers, stages and weights that do not fit together.
  """
  KEYS.check(config, 'method')
  asked = config.mask_teacher if _by_teacher(config) else ''
  distilled = tuple(config.teachers)
  if config.targets == kdhiera.PIXELS:
    distilled = ()
  elif not distilled:
    raise ValueError(
      f'method.teachers: found (), wanted some of {teachers_lib.NAMES}, or '
      "method.targets='pixels'"
    )
  names = dict.fromkeys((*distilled, *filter(None, (asked,))))
  own, modules = teachers_lib.find(config, tuple(names), video, resolve, pixels)
  _check_scores(config, asked, modules)
  encoder = _encoder(config, pixels)
  pairs = {n: _pairs(config, n, modules[n].depth) for n in distilled}
  if config.targets == kdhiera.PIXELS:
    pairs = {kdhiera.PIXELS: (kdhiera.Pair('patch', 0, 1.0),)}
  masks = _masks(config)
  grid = encoder.unit_grid((1, *video))
  visible, masked = masks[0].counts(grid)  # refuses a clip that is too small
  plan = kdhiera.Distil(
    name='distill',
    steps=config.steps,
    encoder=encoder,
    heads={
      name: _head(config, name, encoder, modules, pairs[name], video)
      for name in pairs
    },
    pairs=pairs,
    compared='visible' if config.targets == 'visible' else 'masked',
    masks=masks,
    mask_teacher=asked,
    teachers=teachers_lib.frozen(config, modules),
    init='fresh',
    opt='fresh',
    rows='fresh',
    alarms=_alarms(config, asked, visible / (visible + masked)),
  )
  taken = {*kdhiera.Kdhiera.__dataclass_fields__} & {*config}
  distil = kdhiera.Kdhiera(
    plan=(plan,), **{name: config[name] for name in taken}
  )
  return chain.of(pixel_phase.Pixels(own), distil)


def _encoder(
  config: ml_collections.ConfigDict, pixels: colours.Colours
) -> hiera.Hiera:
  """Returns the student: it leaves 2 x 2 tokens of a unit."""
  return hiera.make(
    knobs.shape(config.encoder, hiera.SIZES),
    **config.hiera,
    **pixels._asdict(),
    q_pool=2,
    drop_path=config.drop_path,
  )


def _by_teacher(config: ml_collections.ConfigDict) -> bool:
  """Returns whether masks go by what a teacher says."""
  return config.units == 'attention' and 'uniform' not in (
    config.scores,
    config.selection,
  )


def _check_scores(
  config: ml_collections.ConfigDict, name: str, modules: Mapping[str, Any]
) -> None:
  if not name or config.scores != 'cls':
    return
  module = modules[name]
  image = module.image if isinstance(module, framewise.Framewise) else module
  if not image.class_token:
    raise ValueError(
      f"method.scores: found 'cls', and the {name} teacher "
      f"({config[name].teacher}) has no class token; wanted 'column_mean'"
    )


def _pairs(
  config: ml_collections.ConfigDict, teacher: str, depth: int
) -> tuple[kdhiera.Pair, ...]:
  """Returns what is compared with a teacher, the weights summing to its own."""
  taken, stages = tuple(config[teacher].layers), tuple(config.stages)
  if not taken or any(not 1 <= n <= depth for n in taken):
    raise ValueError(
      f'method.{teacher}.layers: found {taken}, wanted some of 1 to {depth}, '
      "the teacher's blocks"
    )
  names = [f'layer_{n:02d}' for n in taken]
  if config.targets == 'visible':
    if len(stages) != len(taken):
      raise ValueError(
        f'method.stages: found {stages} for method.{teacher}.layers={taken}; '
        f'wanted one of 1 to {STAGES} for each layer'
      )
    names = [
      f'stage_{stage}' if stages.count(stage) == 1 else f'stage_{stage}_{name}'
      for stage, name in zip(stages, names, strict=True)
    ]
  weights = tuple(config.layer_weights) or (1.0,) * len(taken)
  if len(weights) != len(taken) or not sum(weights):
    raise ValueError(
      f'method.layer_weights: found {weights} for method.{teacher}.layers='
      f'{taken}; wanted a weight of 0 or more for each, and not all 0'
    )
  return tuple(
    kdhiera.Pair(name, layer, config[teacher].weight * weight / sum(weights))
    for name, layer, weight in zip(names, taken, weights, strict=True)
  )


def _masks(
  config: ml_collections.ConfigDict,
) -> tuple[unit_masks.Units, ...]:
  mode = config.selection
  if config.units == 'random':
    mode = 'random'
    if config.tube:
      raise ValueError(
        "method.tube: found True with method.units='random', which draws from "
        "the whole clip; for tubes by chance set method.units='attention' and "
        "method.selection='uniform'"
      )
  elif config.scores == 'uniform':
    mode = 'uniform'
  names = ['']
  if config.masks_per_clip > 1:
    names = [str(i + 1) for i in range(config.masks_per_clip)]
  return tuple(
    unit_masks.Units(name, config.mask_ratio, mode, config.tube)
    for name in names
  )


def _head(
  config: ml_collections.ConfigDict,
  name: str,
  encoder: hiera.Hiera,
  modules: Mapping[str, Any],
  pairs: tuple[kdhiera.Pair, ...],
  video: tuple[int, ...],
) -> nn.Module:
  """Returns the heads of the stages, or a decoder with all layers' channels."""
  if config.targets == 'visible':
    stages = dict(zip([p.name for p in pairs], config.stages, strict=True))
    return stage_heads.StageHeads(
      stages,
      modules[name].width,
      head_pos=config.head_pos,
      dtype=encoder.dtype,
    )
  _, py, px = encoder.patch
  width = py * px * video[-1] if name == kdhiera.PIXELS else modules[name].width
  return hiera_mae.Decoder(
    out_width=width * len(pairs),
    **config.decoder,
    dtype=encoder.dtype,
    remat=encoder.remat,
    attention=encoder.attention,
  )


def _alarms(
  config: ml_collections.ConfigDict, asked: str, chance: float
) -> dict[str, tuple[float, str]]:
  if not asked or config.selection not in ('sample', 'top'):
    return {}
  text = (
    f'masks drawn by chance would show {chance:.3g} of what the {asked} '
    f'teacher attends to, and these hardly show more: its {config.scores} '
    'says nothing of the clips. Wanted another method.scores or teacher'
  )
  return {'mask/attention_kept': (min(CLEARLY * chance, 1.0), text)}
