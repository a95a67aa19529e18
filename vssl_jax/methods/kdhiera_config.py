"""Config keys and builder of KDHiera, interpretation of the abstract.

Hiera-MAE is a special case: no teachers, random units, pixels as targets.
"""

from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from vssl_jax import losses
from vssl_jax.masks import hiera_units
from vssl_jax.methods import config_checks, kdhiera, phase
from vssl_jax.methods import distillation_teachers as teachers_lib
from vssl_jax.models import Module, framewise, vit
from vssl_jax.models.hiera import decoder, stage_heads
from vssl_jax.models.hiera import encoder as encoder_lib
from vssl_jax.utils import colours, ranges

STAGES = 4
# Keys that are fields of a phase, of the same names.
OPTIONS = ('scores', 'feature_loss', 'target_norm', 'pixel_norm')
# Lowest healthy `mask/attention_kept`, as a multiple of its value for random
# masks.
CLEARLY = 1.1


KEYS = ranges.Section(  # student Hiera-B: all values are our choice
  name=('kdhiera', ranges.Choice(('kdhiera',))),
  # 300 epochs of 240k clips at batch 512
  steps=(140_400, config_checks.STEPS),
  # The student: one of hiera.SIZES; () and 0 use the values of the size.
  encoder=ranges.Section(
    size=('B', ranges.Choice(tuple(encoder_lib.SIZES))),
    channels=(0, config_checks.WIDTH),
    depths=((), ranges.Tuple(ranges.Whole(1, 2**10), lengths=(0, STAGES))),
    num_heads=(0, config_checks.HEADS),
  ),
  # See models/hiera/encoder.py for each field.
  hiera=ranges.Section(
    kernel=((3, 7, 7), config_checks.TRIPLE),
    stride=((2, 4, 4), config_checks.TRIPLE),
    padding=((1, 3, 3), ranges.Tuple(ranges.Whole(0, 2**10), lengths=(3,))),
    init=('mae', ranges.Choice(tuple(encoder_lib.INITS))),
    **config_checks.network(dtype='bfloat16', remat='none', attention='auto'),
  ),
  drop_path=(0.1, config_checks.RATE),  # of the student
  **teachers_lib.keys(
    # Blocks of the teacher (from 1) whose outputs are targets.
    layers=(
      (3, 6, 9, 12),
      ranges.Tuple(ranges.Whole(1, 2**10), unique=True),
    ),
    weight=(1.0, config_checks.WEIGHT),
  ),
  # 'visible': visible tokens of all stages regress layers of the teachers;
  # 'masked': a decoder per teacher predicts these layers at masked units;
  # 'pixels': a decoder predicts pixels at masked units.
  objective=('visible', ranges.Choice(('visible', 'masked', kdhiera.PIXELS))),
  # stage that regresses each of `layers`, with objective='visible'
  stages=((1, 2, 3, 4), ranges.Tuple(ranges.Whole(1, STAGES))),
  # of each of `layers`, divided by their sum; (): equal weights
  layer_weights=((), ranges.Tuple(config_checks.WEIGHT)),
  # 'mse', 'smooth_l1'
  feature_loss=(
    'cosine',
    ranges.Choice(('cosine', *losses.TOKEN_DISTANCES)),
  ),
  target_norm=('ln', ranges.Choice(tuple(losses.TARGET_NORMS))),  # 'none'
  # fixed position embeddings at the input of the stage heads
  head_pos=(False, ranges.Flag()),
  decoder=config_checks.head(width=512, depth=2, num_heads=8),
  # 'patch_channel', 'none'
  pixel_norm=('patch', ranges.Choice(tuple(losses.PIXEL_NORMS))),
  # --- masks
  mask_ratio=(0.9, ranges.Real(above=0, below=1)),
  # several masks share one pass of the teachers
  masks_per_clip=(1, config_checks.MASKS_PER_CLIP),
  # 'random': uniform over all units, as in Hiera-MAE
  units=('attention', ranges.Choice(('attention', 'random'))),
  # teacher whose attention is used; it need not be among `teachers`
  mask_teacher=('image', ranges.Choice(teachers_lib.NAMES)),
  # 'cls': attention of the class token; 'column_mean': mean attention of all
  # patches, for teachers without a trained class token (MAE);
  # 'feature_norm': L2 norm of the last features; 'uniform'.
  scores=(
    'cls',
    ranges.Choice((*vit.SCORES, 'feature_norm', 'uniform')),
  ),
  selection=('sample', ranges.Choice(hiera_units.MODES)),
  tube=(False, ranges.Flag()),  # the same units at every time step
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
    resolve: source of an outside teacher -> its module.
    pixels: mean and standard deviation of the pixels.

  Raises:
    ValueError: a value is out of range, a teacher has no source, or layers,
      stages and weights do not match.
  """
  KEYS.check(config, 'method')
  mask_teacher = config.mask_teacher if _by_teacher(config) else ''
  distilled = tuple(config.teachers)
  if config.objective == kdhiera.PIXELS:
    distilled = ()
  elif not distilled:
    raise ValueError(
      f'method.teachers: found (), wanted some of {teachers_lib.NAMES}, or '
      "method.objective='pixels'"
    )
  names = dict.fromkeys((*distilled, *filter(None, (mask_teacher,))))
  teacher_phases, modules = teachers_lib.find(
    config, tuple(names), video, resolve, pixels
  )
  _check_scores(config, mask_teacher, modules)
  encoder = _encoder(config, pixels)
  pairs = {n: _pairs(config, n, modules[n].depth) for n in distilled}
  if config.objective == kdhiera.PIXELS:
    pairs = {kdhiera.PIXELS: (kdhiera.Pair('patch', 0, 1.0),)}
  masks = _masks(config)
  grid = encoder.unit_grid((1, *video))
  visible, masked = masks[0].counts(grid)  # raises if the clip is too small
  distil = kdhiera.DistilPhase(
    name='distill',
    steps=config.steps,
    encoder=encoder,
    heads={
      name: _head(config, name, encoder, modules, pairs[name], video)
      for name in pairs
    },
    pairs=pairs,
    compared='visible' if config.objective == 'visible' else 'masked',
    masks=masks,
    mask_teacher=mask_teacher,
    teachers=teachers_lib.frozen(config, modules),
    carry=(),
    alarms=_alarms(config, mask_teacher, visible / (visible + masked)),
    **{name: config[name] for name in OPTIONS},
  )
  return (*teacher_phases, distil)


def _encoder(
  config: ml_collections.ConfigDict, pixels: colours.Colours
) -> encoder_lib.Hiera:
  """Returns the student; its last stage has 2 x 2 tokens per unit."""
  return encoder_lib.make(
    config_checks.shape(config.encoder, encoder_lib.SIZES),
    **config.hiera,
    **pixels._asdict(),
    q_pool=2,
    drop_path=config.drop_path,
  )


def _by_teacher(config: ml_collections.ConfigDict) -> bool:
  """Returns whether masks depend on the outputs of a teacher."""
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
  """Returns the comparisons with a teacher; weights sum to the teacher's."""
  layers, stages = tuple(config[teacher].layers), tuple(config.stages)
  if not layers or any(not 1 <= n <= depth for n in layers):
    raise ValueError(
      f'method.{teacher}.layers: found {layers}, wanted some of 1 to {depth}, '
      "the teacher's blocks"
    )
  names = [f'layer_{n:02d}' for n in layers]
  if config.objective == 'visible':
    if len(stages) != len(layers):
      raise ValueError(
        f'method.stages: found {stages} for method.{teacher}.layers={layers}; '
        f'wanted one of 1 to {STAGES} for each layer'
      )
    names = [
      f'stage_{stage}' if stages.count(stage) == 1 else f'stage_{stage}_{name}'
      for stage, name in zip(stages, names, strict=True)
    ]
  weights = tuple(config.layer_weights) or (1.0,) * len(layers)
  if len(weights) != len(layers) or not sum(weights):
    raise ValueError(
      f'method.layer_weights: found {weights} for method.{teacher}.layers='
      f'{layers}; wanted a weight of 0 or more for each, and not all 0'
    )
  return tuple(
    kdhiera.Pair(name, layer, config[teacher].weight * weight / sum(weights))
    for name, layer, weight in zip(names, layers, weights, strict=True)
  )


def _masks(
  config: ml_collections.ConfigDict,
) -> tuple[hiera_units.Units, ...]:
  mode = config.selection
  if config.units == 'random':
    mode = 'random'
    if config.tube:
      raise ValueError(
        "method.tube: found True with method.units='random', which draws from "
        "the whole clip; for random tubes set method.units='attention' and "
        "method.selection='uniform'"
      )
  elif config.scores == 'uniform':
    mode = 'uniform'
  names = ['']
  if config.masks_per_clip > 1:
    names = [str(i + 1) for i in range(config.masks_per_clip)]
  return tuple(
    hiera_units.Units(name, config.mask_ratio, mode, config.tube)
    for name in names
  )


def _head(
  config: ml_collections.ConfigDict,
  name: str,
  encoder: encoder_lib.Hiera,
  modules: Mapping[str, Any],
  pairs: tuple[kdhiera.Pair, ...],
  video: tuple[int, ...],
) -> Module:
  """Returns stage heads, or a decoder with the channels of all layers."""
  if config.objective == 'visible':
    stages = dict(zip([p.name for p in pairs], config.stages, strict=True))
    return stage_heads.StageHeads(
      stages,
      modules[name].width,
      head_pos=config.head_pos,
      dtype=encoder.dtype,
    )
  _, py, px = encoder.patch
  width = py * px * video[-1] if name == kdhiera.PIXELS else modules[name].width
  return decoder.Decoder(
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
    f'random masks would show {chance:.3g} of what the {asked} teacher '
    f'attends to, and these hardly show more: its {config.scores} does not '
    'describe the clips. Wanted another method.scores or teacher'
  )
  return {'mask/attention_kept': (min(CLEARLY * chance, 1.0), text)}
