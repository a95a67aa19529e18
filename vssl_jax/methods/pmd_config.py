"""Config keys and builder of PMD; MVD is a special case."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_collections

from vssl_jax import losses
from vssl_jax.masks import specs as specs_lib
from vssl_jax.masks import tubelets
from vssl_jax.methods import (
  config_checks,
  phase,
  pmd,
  pmd_terms,
  salt_config,
)
from vssl_jax.methods import distillation_teachers as teachers_lib
from vssl_jax.models import Module
from vssl_jax.models import decoder as decoder_lib
from vssl_jax.models import mvd_student as mvd_student_lib
from vssl_jax.utils import colours, ranges

# Alarm on the entropy of DARE's weights, relative to uniform weights.
EVENNESS = (
  0.3,
  'a few patches have nearly all the weight, as losses are large relative to '
  'method.tau; raise it, or normalise the targets with method.target_norm=ln',
)


# Keys that are fields of a phase, of the same names.
OPTIONS = ('lambda_base', 'lambda_pg', 'lambda_df', 'lambda_al')
OPTIONS += ('feature_loss', 'target_norm', 'alpha', 'tau', 'dare')
OPTIONS += ('df_extra_mean', 'pg_positions', 'align_norm')
OPTIONS += ('memory_shape', 'memory_frame')

KEYS = ranges.Section(  # published values, student ViT-B
  name=('pmd', ranges.Choice(('pmd',))),
  # One phase for each; the first phase has no previous student.
  mask_ratios=(
    (0.75, 0.8, 0.85, 0.9),
    ranges.Tuple(ranges.Real(above=0, below=1), rising=True, unique=True),
  ),
  # of each phase: 100 epochs of 240k clips at batch 1,024
  steps=((23_400,) * 4, ranges.Tuple(config_checks.STEPS)),
  masks=('tube', ranges.Choice(('tube', 'random'))),
  # several masks share one pass of the teachers
  masks_per_clip=(1, config_checks.MASKS_PER_CLIP),
  encoder=config_checks.encoder('B'),
  decoder=ranges.Section(  # one of decoder.MVD_SIZES
    size=('B', ranges.Choice(tuple(decoder_lib.MVD_SIZES))),
    width=(0, config_checks.WIDTH),
    depth=(0, config_checks.BLOCKS),
    num_heads=(0, config_checks.HEADS),
  ),
  drop_path=(0.1, config_checks.RATE),  # of student and decoders
  # `vit` is shared by the student and the teachers of its run.
  **teachers_lib.keys(),
  lambda_base=(1.0, config_checks.WEIGHT),
  # PSD; 0: no previous student
  lambda_pg=(0.05, config_checks.WEIGHT),
  lambda_df=(
    1.0,
    config_checks.WEIGHT,
  ),  # DARE; 0: no example memory
  lambda_al=(1.0, config_checks.WEIGHT),  # CLFA; 0: no alignment
  # 'smooth_l1' as in MVD's scripts
  feature_loss=('mse', ranges.Choice(tuple(losses.TOKEN_DISTANCES))),
  target_norm=('none', ranges.Choice(tuple(losses.TARGET_NORMS))),  # 'ln'
  # --- PSD
  # 'same': the previous student has the same mask as the student
  previous_mask=('nested', ranges.Choice(('nested', 'same'))),
  previous_dtype=('bfloat16', ranges.Choice(phase.TEACHER_DTYPES[:2])),
  # 'both_masked': patches masked for both students
  pg_positions=('masked', ranges.Choice(('masked', 'both_masked'))),
  # --- DARE
  alpha=(0.95, config_checks.SHARE),  # weight of the new loss
  tau=(0.5, ranges.Real(1e-6, 1e6)),
  # steps between updates of the window memory: 32 epochs
  window=(7500, config_checks.STEPS),
  # 'smooth': uniform weights; 'weights': no smoothing
  dare=('both', ranges.Choice(pmd_terms.PARTS)),
  df_extra_mean=(False, ranges.Flag()),  # True: as written in the paper
  # 'carry': memory is kept across phases
  example_memory=('fresh', ranges.Choice(('fresh', 'carry'))),
  # 'tube': one value for all time steps, 8 times smaller
  memory_shape=('patch', ranges.Choice(('patch', 'tube'))),
  # 'float16' is meant for 100,000 clips and more
  memory_dtype=('float32', ranges.Choice(phase.MEMORY_DTYPES)),
  # 'crop': indexed by position in the full frame instead of in the crop
  memory_frame=('grid', ranges.Choice(('grid', 'crop'))),
  # --- CLFA
  # 'ln' normalises student and teacher layers
  align_norm=('none', ranges.Choice(tuple(losses.TARGET_NORMS))),
  # --- between phases
  # 'carry': one schedule over all phases; 'fresh': one schedule per phase
  opt=('carry', ranges.Choice(('carry', 'fresh'))),
  # warm-up steps of each phase with opt='fresh': 5 epochs
  fresh_warmup=(1170, ranges.Whole(0, ranges.MANY)),
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
    ValueError: a value is out of range, a teacher has no source, or ratios and
      steps do not match.
  """
  KEYS.check(config, 'method')
  _check(config)
  teacher_phases, modules = teachers_lib.find(
    config, config.teachers, video, resolve, pixels
  )
  student = _student(config, modules, pixels)
  return (*teacher_phases, *_distil_phases(config, student, modules, video))


def _check(config: ml_collections.ConfigDict) -> None:
  ratios, steps = config.mask_ratios, config.steps
  if len(ratios) != len(steps):
    raise ValueError(
      f'method.mask_ratios, method.steps: found {ratios} and {steps}; wanted '
      'rising ratios, and as many numbers of steps'
    )
  if not config.teachers:
    raise ValueError(
      f'method.teachers: found (), wanted some of {teachers_lib.NAMES}'
    )


def _student(
  config: ml_collections.ConfigDict,
  teachers: Mapping[str, Any],
  pixels: colours.Colours,
) -> mvd_student_lib.Student:
  encoder = salt_config.make_encoder(
    config.encoder,
    config.vit,
    **pixels._asdict(),
    positions='sincos_3d_mvd',
    drop_path=config.drop_path,
  )
  fields = decoder_lib.MVD | config_checks.shape(
    config.decoder, decoder_lib.MVD_SIZES
  )
  return mvd_student_lib.Student(
    encoder,
    {
      name: decoder_lib.VideoMaeDecoder(
        out_width=teacher.width,
        drop_path=config.drop_path,
        dtype=encoder.dtype,
        remat=encoder.remat,
        attention=encoder.attention,
        **fields,
      )
      for name, teacher in teachers.items()
    },
  )


def _distil_phases(
  config: ml_collections.ConfigDict,
  student: mvd_student_lib.Student,
  modules: Mapping[str, Module],
  video: tuple[int, ...],
) -> list[pmd.DistilPhase]:
  """Returns a phase for each mask ratio."""
  grid = tubelets.grid_of((1, *video), student.encoder.patch)
  encoder, phases = student.encoder, []
  teachers = teachers_lib.frozen(config, modules)
  align = {
    name: mvd_student_lib.Alignment(module.width, encoder.dtype)
    for name, module in modules.items()
    if config.lambda_al
  }
  memory = phase.MemorySpec(
    _memory_shape(config, grid), dtype=config.memory_dtype, window=config.window
  )
  for ratio, steps in zip(config.mask_ratios, config.steps, strict=True):
    name = f'mask_{100 * ratio:g}'
    masks = _masks(config, ratio)
    for spec in masks:
      spec.counts(grid)  # raises if the grid is too small for a mask
    previous_fields = {}
    if phases and config.lambda_pg:
      previous = phases[-1]
      previous_fields = dict(
        teachers=teachers
        | {
          'previous': phase.Teacher(
            _still(student),
            phase.FromPhase(previous.name),
            '',
            config.previous_dtype,
          )
        },
        previous_masks=(
          previous.masks if config.previous_mask == 'nested' else masks
        ),
      )
    phases.append(
      pmd.DistilPhase(
        **dict(teachers=teachers) | previous_fields,
        **{name: config[name] for name in OPTIONS},
        name=name,
        steps=steps,
        encoder=encoder,
        student=student,
        align=align,
        masks=masks,
        carry=_carry(config) if phases else (),
        horizon='run' if config.opt == 'carry' else 'phase',
        memory_specs=dict.fromkeys(modules, memory) if config.lambda_df else {},
        alarms=_alarms(config, modules),
        warmup=config.fresh_warmup if config.opt == 'fresh' else None,
      )
    )
  return phases


def _carry(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """Returns the parts of the train state that a phase takes over."""
  optional = ('opt', 'example_memory')
  return ('params', *(name for name in optional if config[name] == 'carry'))


def _alarms(
  config: ml_collections.ConfigDict, names: Iterable[str]
) -> dict[str, tuple[float, str]]:
  if not config.lambda_df or config.dare == 'smooth':
    return {}
  return {f'dare/entropy/{name}': EVENNESS for name in names}


def _masks(
  config: ml_collections.ConfigDict, ratio: float
) -> tuple[specs_lib.Spec, ...]:
  # Masks of the same name have the same random order at every ratio: patches
  # visible at a higher ratio are also visible at a lower ratio.
  kind, count = config.masks, config.masks_per_clip
  specs = specs_lib.parse('+'.join([f'{kind}:{ratio:g}'] * count))
  # MVD's code rounds both kinds in this way.
  return tuple(dataclasses.replace(s, rule='masked_floor') for s in specs)


def _memory_shape(
  config: ml_collections.ConfigDict, grid: tubelets.Grid
) -> tuple[int]:
  t, h, w = grid
  return (h * w if config.memory_shape == 'tube' else t * h * w,)


def _still(student: mvd_student_lib.Student) -> mvd_student_lib.Student:
  """Returns a student without drop path in encoder and decoders."""
  return student.clone(
    encoder=student.encoder.clone(drop_path=0.0),
    decoder={n: x.clone(drop_path=0.0) for n, x in student.decoder.items()},
  )
