"""Config keys and builder of SALT."""

from collections.abc import Callable
from typing import Any

import ml_collections

from vssl_jax import losses
from vssl_jax.masks import specs, tubelets
from vssl_jax.methods import config_checks, masked_pixels, salt
from vssl_jax.methods import phase as phase_lib
from vssl_jax.models import Module, vit
from vssl_jax.models import decoder as decoder_lib
from vssl_jax.models import predictor as predictor_lib
from vssl_jax.utils import colours, ranges

PHASES = ('pixel_teacher', 'latent_student', 'latent_student_2')
# A second student is configured as the first, which is its teacher.
SECOND = 'latent_student_2'


def _pixel_section() -> ranges.Section:
  return ranges.Section(
    # paper: 80k in the main table; 40k is the best split
    steps=(40_000, config_checks.STEPS),
    encoder=config_checks.encoder(),
    # The paper does not describe the decoder; the predictor's shape with pixel
    # outputs reproduces the paper's FLOPs. 'videomae': decoder of VideoMAE.
    decoder=ranges.Section(
      kind=('predictor', ranges.Choice(('predictor', 'videomae'))),
      **config_checks.head(width=384, depth=12, num_heads=16),
    ),
    masks=('short_long', config_checks.MASKS),  # see specs.parse
    # 'raster_truncate': as in the published collator
    mask_select=('random_k', config_checks.MASK_SELECT),
    # one per mask type; 1: shared by all masks
    mask_tokens=(2, config_checks.MASK_TOKENS),
    # 'patch', 'none'
    pixel_norm=('patch_channel', ranges.Choice(tuple(losses.PIXEL_NORMS))),
    pixel_loss=('mse', ranges.Choice(tuple(losses.DISTANCES))),  # 'l1'
    # run folder or published model that initialises parameters
    init_from=('', ranges.Text()),
    # roles to initialise: the encoder, optionally also the decoder
    init_roles=(('encoder',), config_checks.roles('encoder', 'decoder')),
  )


def _latent_section() -> ranges.Section:
  return ranges.Section(
    steps=(200_000, config_checks.STEPS),
    encoder=config_checks.encoder(),
    predictor=config_checks.head(width=384, depth=12, num_heads=16),
    # @<earlier phase>, @ema/encoder (V-JEPA), a run folder, or a published
    # model (local folder or hub id)
    teacher=('@pixel_teacher', ranges.Text()),
    # 'float32'; 'float8' on GPUs with support
    teacher_dtype=('bfloat16', ranges.Choice(phase_lib.TEACHER_DTYPES)),
    # momentum of @ema/encoder, linear from the first to the last step
    ema=((0.99925, 0.99925), config_checks.EMA),
    # > 0: momentum of an additional EMA of the student's encoder
    polyak=(0.0, ranges.Real(0, below=1)),
    masks=('short_long', config_checks.MASKS),
    mask_select=('random_k', config_checks.MASK_SELECT),
    mask_tokens=(2, config_checks.MASK_TOKENS),
    # 'smooth_l1', 'l2'
    latent_loss=('l1', ranges.Choice(tuple(losses.DISTANCES))),
    target_norm=('ln', ranges.Choice(tuple(losses.TARGET_NORMS))),  # 'none'
    init_from=('', ranges.Text()),
    # roles to initialise: the encoder, optionally also the predictor; from
    # files of V-JEPA 2 the trained encoder is used, not its average
    init_roles=(('encoder',), config_checks.roles('encoder', 'predictor')),
  )


KEYS = ranges.Section(  # the paper's values, ViT-L, at its best split of steps
  name=('salt', ranges.Choice(('salt',))),
  # Phases, in order. 'latent_student_2' may follow 'latent_student': a second
  # student with the same options, whose teacher is the first.
  phases=(
    ('pixel_teacher', 'latent_student'),
    ranges.Tuple(ranges.Choice(PHASES), unique=True),
  ),
  # Shared by all encoders; see models/vit.py for each field.
  vit=config_checks.network(
    patch=(2, 16, 16),
    positions='rope_3d',
    # 'vjepa2' is the rotation of the released code and is needed to load its
    # weights; the paper does not state which rotation it used.
    rope_pairing='paired',
    qkv_bias='full',
    # 1e-12 for weights of VideoMAE and MAE from `transformers`
    norm_eps=1e-6,
    init='vjepa',
    drop_path=0.0,
    dtype='bfloat16',
    remat='none',
    attention='auto',
  ),
  pixel_teacher=_pixel_section(),
  latent_student=_latent_section(),
)

default = KEYS.defaults


def build(
  config: ml_collections.ConfigDict,
  video: tuple[int, ...],
  resolve: Callable[[str], Module],
  pixels: colours.Colours,
) -> tuple[phase_lib.Phase, ...]:
  """Builds the phases from the method's section of the config.

  Args:
    config: `config.method`.
    video: (T, H, W, C) of a clip.
    resolve: source of an outside teacher -> its module.
    pixels: mean and standard deviation of the pixels.

  Raises:
    ValueError: a value is out of range, or a teacher has no source.
  """
  KEYS.check(config, 'method')
  phases: list[phase_lib.Phase] = []
  for name in config.phases:
    section = config[name if name != SECOND else 'latent_student']
    encoder = make_encoder(section.encoder, config.vit, **pixels._asdict())
    masks = specs.parse(section.masks, select=section.mask_select)
    grid = tubelets.grid_of((1, *video), encoder.patch)
    for spec in masks:
      spec.counts(grid)  # raises if the grid is too small for a mask
    common = dict(
      name=name,
      steps=section.steps,
      encoder=encoder,
      masks=masks,
      carry=(),
      init_from=(
        dict.fromkeys(
          section.init_roles, phase_lib.parse_source(section.init_from)
        )
        if section.init_from
        else {}
      ),
    )
    if name == 'pixel_teacher':
      phases.append(_pixel_phase(section, encoder, video, common))
    else:
      phases.append(_latent_phase(section, encoder, phases, resolve, common))
  return tuple(phases)


def make_encoder(
  section: ml_collections.ConfigDict,
  shared: ml_collections.ConfigDict | dict[str, Any],
  **fields: Any,
) -> vit.Vit:
  """Returns the encoder of a config section.

  Args:
    section: `size`, and fields that override the size where they are not 0.
    shared: fields that all encoders share.
    **fields: further fields.
  """
  shape = {k: v for k, v in section.items() if k != 'size' and v}
  return vit.make(section.size, **shape, **shared, **fields)


def _pixel_phase(
  section: ml_collections.ConfigDict,
  encoder: vit.Vit,
  video: tuple[int, ...],
  common: dict[str, Any],
) -> masked_pixels.PixelPhase:
  pt, py, px = encoder.patch
  shape = dict(section.decoder)
  kind = shape.pop('kind')
  shape['out_width'] = pt * py * px * video[-1]
  if kind == 'predictor':
    decoder = make_predictor(shape, section, encoder)
  else:
    decoder = decoder_lib.VideoMaeDecoder(
      **shape, dtype=encoder.dtype, remat=encoder.remat
    )
  return masked_pixels.PixelPhase(
    **common,
    decoder=decoder,
    pixel_norm=section.pixel_norm,
    pixel_loss=section.pixel_loss,
  )


def _latent_phase(
  section: ml_collections.ConfigDict,
  encoder: vit.Vit,
  before: list[phase_lib.Phase],
  resolve: Callable[[str], Module],
  common: dict[str, Any],
) -> salt.LatentPhase:
  teacher = section.teacher
  if common['name'] == SECOND:
    teacher = '@latent_student'
  if not teacher:
    raise ValueError(
      f'method.{common["name"]}.teacher: found nothing; it needs a source, '
      'or it would be a random model'
    )
  source, ema = phase_lib.parse_source(teacher), {}
  networks = {str(phase_lib.FromPhase(p.name)): p.encoder for p in before}
  networks['@ema/encoder'] = encoder
  if isinstance(source, phase_lib.FromWeights):
    module = resolve(source.path)
  elif str(source) in networks:
    module = networks[str(source)]
  else:
    raise ValueError(
      f'method.{common["name"]}.teacher: found {teacher!r}; wanted one '
      f'of {[*networks]} (a phase that runs before, an average of the '
      'student), the folder of a finished run or a published model'
    )
  if isinstance(source, phase_lib.FromEma):
    ema['encoder'] = phase_lib.Ema('encoder', section.ema)
  if section.polyak:
    ema['polyak'] = phase_lib.Ema('encoder', (section.polyak,) * 2)
  # Teachers run in evaluation mode, without drop path.
  module = module.clone(drop_path=0.0)
  shape = dict(section.predictor, out_width=module.width)
  return salt.LatentPhase(
    **common,
    predictor=make_predictor(shape, section, encoder),
    teachers={
      'target': phase_lib.Teacher(module, source, dtype=section.teacher_dtype)
    },
    ema=ema,
    latent_loss=section.latent_loss,
    target_norm=section.target_norm,
  )


def make_predictor(
  shape: dict[str, Any], section: ml_collections.ConfigDict, encoder: vit.Vit
) -> predictor_lib.Predictor:
  """Returns a predictor with the positions, init and dtype of its encoder.

  Args:
    shape: fields of the predictor, such as `width`, `depth` and `out_width`.
    section: config section with the key `mask_tokens`.
    encoder: encoder whose tokens are the input.
  """
  return predictor_lib.Predictor(
    **shape,
    num_mask_tokens=section.mask_tokens,
    positions=encoder.positions,
    rope_pairing=encoder.rope_pairing,
    init_family=encoder.init_family,
    dtype=encoder.dtype,
    remat=encoder.remat,
    attention=encoder.attention,
  )
