"""PMD's knobs, and the method that they describe; MVD is one of its cases."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import ml_collections

from vssl_jax import colours, losses, mask_specs, ranges
from vssl_jax.methods import (
  base,
  chain,
  difficulty,
  knobs,
  pixel_phase,
  pmd,
  salt_config,
)
from vssl_jax.methods import teachers as teachers_lib
from vssl_jax.models import decoder as decoder_lib
from vssl_jax.models import layers
from vssl_jax.models import student as student_lib

# Of DARE's weights: entropy over that of uniform ones.
EVENNESS = (
  0.3,
  'a few patches have nearly all the weight, as losses are large beside '
  'method.tau; raise it, or norm the targets with method.target_norm=ln',
)


KEYS = ranges.Section(  # published values, student ViT-B
  name=('pmd', ranges.Choice(('pmd',))),
  # One phase for each; the first has no student before it.
  mask_ratios=(
    (0.75, 0.8, 0.85, 0.9),
    ranges.Tuple(ranges.Real(above=0, below=1), rising=True, unique=True),
  ),
  # of each: 100 epochs of 240k clips at batch 1,024
  steps=((23_400,) * 4, ranges.Tuple(knobs.STEPS)),
  masks=('tube', ranges.Choice(('tube', 'random'))),
  # more amortise the teachers
  masks_per_clip=(1, knobs.MASKS_PER_CLIP),
  encoder=knobs.encoder('B'),
  decoder=ranges.Section(  # a row of decoder.MVD_SIZES
    size=('B', ranges.Choice(tuple(decoder_lib.MVD_SIZES))),
    width=(0, knobs.WIDTH),
    depth=(0, knobs.BLOCKS),
    num_heads=(0, knobs.HEADS),
  ),
  drop_path=(0.1, knobs.RATE),  # of student and decoders
  # `vit` is shared by the student and the teachers of its run.
  **teachers_lib.keys(),
  lambda_base=(1.0, knobs.WEIGHT),
  # PSD; 0: no guidance by the previous student
  lambda_pg=(0.05, knobs.WEIGHT),
  lambda_df=(1.0, knobs.WEIGHT),  # DARE; 0: no memory of patches is kept
  lambda_al=(1.0, knobs.WEIGHT),  # CLFA; 0: no maps between layers
  # 'smooth_l1' is MVD's scripts'
  feature_loss=('mse', ranges.Choice(tuple(losses.TOKEN_DISTANCES))),
  target_norm=('none', ranges.Choice(tuple(losses.TARGET_NORMS))),  # 'ln'
  # --- PSD
  # 'same': the previous student sees no more
  previous_mask=('nested', ranges.Choice(('nested', 'same'))),
  previous_dtype=('bfloat16', ranges.Choice(base.TEACHER_DTYPES[:2])),
  # 'both_masked': hidden from both students
  pg_positions=('masked', ranges.Choice(('masked', 'both_masked'))),
  # --- DARE
  alpha=(0.95, knobs.SHARE),  # weight of the new loss
  tau=(0.5, ranges.Real(1e-6, 1e6)),
  # steps between looks at the memory: 32 epochs
  window=(7500, knobs.STEPS),
  # 'smooth': uniform weights; 'weights': nothing smoothed
  dare=('both', ranges.Choice(difficulty.PARTS)),
  df_extra_mean=(False, ranges.Flag()),  # True is the letter of the paper
  # 'carry': memory goes on from phase to phase
  rows=('fresh', ranges.Choice(('fresh', 'carry'))),
  # 'tube': one for all time steps, 8 times smaller
  rows_shape=('patch', ranges.Choice(('patch', 'tube'))),
  # 'float16' is meant for 100,000 clips and more
  rows_dtype=('float32', ranges.Choice(base.ROW_DTYPES)),
  # 'crop': follows the picture that clips are cut from
  rows_frame=('grid', ranges.Choice(('grid', 'crop'))),
  # --- CLFA
  # 'ln' on both sides
  align_norm=('none', ranges.Choice(tuple(losses.TARGET_NORMS))),
  # --- between phases
  # one schedule over all phases; 'fresh': one for each,
  opt=('carry', ranges.Choice(('carry', 'fresh'))),
  # each with so many warm-up steps: 5 epochs
  fresh_warmup=(1170, ranges.Whole(0, ranges.MANY)),
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
      ratios and steps that do not fit together.
  """
  KEYS.check(config, 'method')
  _check(config)
  own, modules = teachers_lib.find(
    config, config.teachers, video, resolve, pixels
  )
  student = _student(config, modules, pixels)
  # Fields of the method and keys of its config have the same names.
  taken = set(pmd.Pmd.__dataclass_fields__) & set(config)
  distil = pmd.Pmd(
    plan=tuple(_distil(config, student, modules, video)),
    **{name: config[name] for name in taken},
  )
  return chain.of(pixel_phase.Pixels(own), distil)


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
) -> student_lib.Student:
  encoder = salt_config.make_encoder(
    config.encoder,
    config.vit,
    **pixels._asdict(),
    positions='sincos_3d_mvd',
    drop_path=config.drop_path,
  )
  fields = decoder_lib.MVD | knobs.shape(config.decoder, decoder_lib.MVD_SIZES)
  return student_lib.Student(
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


def _distil(
  config: ml_collections.ConfigDict,
  student: student_lib.Student,
  modules: Mapping[str, nn.Module],
  video: tuple[int, ...],
) -> list[pmd.Distil]:
  """Returns a phase for each mask ratio."""
  grid = layers.grid_of((1, *video), student.encoder.patch)
  encoder, done = student.encoder, []
  teachers = teachers_lib.frozen(config, modules)
  align = {
    name: student_lib.Alignment(module.width, encoder.dtype)
    for name, module in modules.items()
    if config.lambda_al
  }
  rows = base.RowSpec(
    _row_shape(config, grid), dtype=config.rows_dtype, window=config.window
  )
  for ratio, steps in zip(config.mask_ratios, config.steps, strict=True):
    name = f'mask_{100 * ratio:g}'
    masks = _masks(config, ratio)
    for spec in masks:
      spec.counts(grid)  # refuses a grid too small for its masks, by name
    guided = {}
    if done and config.lambda_pg:
      before = done[-1]
      guided = dict(
        teachers=teachers
        | {
          'previous': base.Teacher(
            _still(student), f'@{before.name}', '', config.previous_dtype
          )
        },
        previous_masks=(
          before.masks if config.previous_mask == 'nested' else masks
        ),
      )
    done.append(
      pmd.Distil(
        **dict(teachers=teachers) | guided,
        name=name,
        steps=steps,
        encoder=encoder,
        student=student,
        align=align,
        masks=masks,
        init='carry' if done else 'fresh',
        opt=config.opt if done else 'fresh',
        rows=config.rows if done else 'fresh',
        horizon='run' if config.opt == 'carry' else 'phase',
        row_specs=dict.fromkeys(modules, rows) if config.lambda_df else {},
        alarms=_alarms(config, modules),
        warmup=config.fresh_warmup if config.opt == 'fresh' else None,
      )
    )
  return done


def _alarms(
  config: ml_collections.ConfigDict, names: Iterable[str]
) -> dict[str, tuple[float, str]]:
  if not config.lambda_df or config.dare == 'smooth':
    return {}
  return {f'dare/entropy/{name}': EVENNESS for name in names}


def _masks(
  config: ml_collections.ConfigDict, ratio: float
) -> tuple[mask_specs.Spec, ...]:
  # A mask of the same name has the same random order at every ratio: what a
  # higher one shows, the lower one shows too.
  kind, count = config.masks, config.masks_per_clip
  specs = mask_specs.parse('+'.join([f'{kind}:{ratio:g}'] * count))
  # MVD's code rounds both kinds so.
  return tuple(dataclasses.replace(s, rule='masked_floor') for s in specs)


def _row_shape(
  config: ml_collections.ConfigDict, grid: layers.Grid
) -> tuple[int]:
  t, h, w = grid
  return (h * w if config.rows_shape == 'tube' else t * h * w,)


def _still(student: student_lib.Student) -> student_lib.Student:
  """Returns a student without drop path anywhere."""
  return student.clone(
    encoder=student.encoder.clone(drop_path=0.0),
    decoder={n: x.clone(drop_path=0.0) for n, x in student.decoder.items()},
  )
