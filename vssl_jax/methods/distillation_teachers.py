"""Image and video teachers for distillation, shared by several methods.

Teachers are loaded from a run folder or a published model, or trained from
scratch by earlier phases of the same run.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_collections

from vssl_jax import losses
from vssl_jax.masks import specs, tubelets
from vssl_jax.methods import config_checks, masked_pixels, salt_config
from vssl_jax.methods import phase as phase_lib
from vssl_jax.models import Module, framewise, vit
from vssl_jax.models import decoder as decoder_lib
from vssl_jax.models.hiera import encoder as encoder_lib
from vssl_jax.utils import colours, ranges

NAMES = ('image', 'video')


def keys(**more: Any) -> ranges.Section:
  """Returns the config keys of the teachers and of their training phases.

  Args:
    **more: further keys of the sections `image` and `video`.
  """
  source = ranges.Section(
    teacher=('', ranges.Text()),
    dtype=('bfloat16', ranges.Choice(phase_lib.TEACHER_DTYPES)),
    **more,
  )
  return ranges.Section(
    # Shared by teachers that this run trains; `patch` also applies to image
    # teachers from outside.
    vit=config_checks.network(
      patch=(2, 16, 16),
      qkv_bias='qv',
      init='videomae',
      dtype='bfloat16',
      remat='none',
      attention='auto',
    ),
    # Teachers to distil from: both or one.
    teachers=(NAMES, ranges.Tuple(ranges.Choice(NAMES), unique=True)),
    # @image_teacher and @video_teacher are trained first, by phases of this
    # run; else a run folder, or published weights (folder, file, hub id).
    # For a file of MVD that has the layout of VideoMAE write x.pth#mvd.
    # dtype: 'float32' also computes in float32; 'float8' on GPUs with support.
    image=source,
    video=source,
    image_teacher=_section(
      masks='frames:0.75',
      pixel_norm='patch',
      decoder=config_checks.head(width=512, depth=8, num_heads=16),
    ),
    video_teacher=_section(
      masks='tube:0.9',
      pixel_norm='patch_channel',
      decoder=config_checks.head(width=384, depth=4, num_heads=6),
    ),
  )


def _section(
  masks: str, pixel_norm: str, decoder: ranges.Section
) -> ranges.Section:
  return ranges.Section(
    steps=(100_000, config_checks.STEPS),
    encoder=config_checks.encoder('B'),
    masks=(masks, config_checks.MASKS),
    pixel_norm=(pixel_norm, ranges.Choice(tuple(losses.PIXEL_NORMS))),
    decoder=decoder,
  )


def find(
  config: ml_collections.ConfigDict,
  names: Iterable[str],
  video: tuple[int, ...],
  resolve: Callable[[str], Module],
  pixels: colours.Colours,
) -> tuple[tuple[masked_pixels.PixelPhase, ...], dict[str, Module]]:
  """Returns the phases that train teachers, and the networks of all teachers.

  Args:
    config: `config.method`.
    names: names of the teachers.
    video: (T, H, W, C) of a clip.
    resolve: source of an outside teacher -> its module.
    pixels: mean and standard deviation of the pixels.

  Returns:
    The training phases, and name -> network.

  Raises:
    ValueError: a teacher has no source, or is a Hiera.
  """
  phases, modules = [], {}
  for name in names:
    source, phase = config[name].teacher, f'{name}_teacher'
    if source == f'@{phase}':
      phases.append(MAKERS[name](phase, config, video, pixels))
      modules[name] = phases[-1].encoder
    elif not source or source.startswith('@'):
      raise ValueError(
        f'method.{name}.teacher: found {source!r}; wanted a run folder, '
        'published weights (folder, file or hub id), or '
        f'@{phase} to train it first. Without one it would be a random model'
      )
    else:
      modules[name] = _fitted(resolve(source), config.vit.patch)
      if isinstance(
        getattr(modules[name], 'image', modules[name]), encoder_lib.Hiera
      ):
        raise ValueError(
          f'method.{name}.teacher: found a Hiera ({source}), wanted a ViT, '
          'whose layers have the grid of the clip'
        )
  return tuple(phases), modules


def frozen(
  config: ml_collections.ConfigDict, modules: Mapping[str, Module]
) -> dict[str, phase_lib.Teacher]:
  """Returns teachers in evaluation mode, without drop path."""
  return {
    name: phase_lib.Teacher(
      module.clone(drop_path=0.0),
      phase_lib.parse_source(config[name].teacher),
      dtype=config[name].dtype,
    )
    for name, module in modules.items()
  }


def stream(
  phase: phase_lib.Phase,
  name: str,
  params: Any,
  video: phase_lib.Video,
  **options: Any,
) -> Any:
  """Returns a teacher's features (residual stream) of whole clips, by depth.

  Args:
    phase: phase of the teacher; its encoder must have the same token grid.
    name: name of the teacher.
    params: parameters of its module.
    video: clips [B, T, H, W, C].
    **options: further arguments of its module.

  Returns:
    The features; with `attention_to`, a pair of features and token scores.

  Raises:
    ValueError: teacher and student have different token grids.
  """
  teacher = phase.teachers[name]
  features = teacher(params, video, features=True, **options)
  last = (features[0] if 'attention_to' in options else features)[-1]
  teacher_grid, grid = (
    tubelets.grid_of(video.shape, patch)
    for patch in (teacher.module.patch, phase.encoder.patch)
  )
  num_tokens = grid[0] * grid[1] * grid[2]
  if teacher_grid != grid or last.shape[1] != num_tokens:
    raise ValueError(
      f'phase {phase.name!r}: teacher {name!r} gives {last.shape[1]} tokens '
      f'(patch {teacher.module.patch}, grid {teacher_grid}) and the student '
      f'has a grid of {grid} = {num_tokens} (patch {phase.encoder.patch}); '
      'teachers and student must cut the clip into the same grid'
    )
  return features


def _fitted(module: Module, patch: tubelets.Grid) -> Module:
  """Returns a teacher; an image teacher gets the token grid of the student.

  An image teacher reads the first frame of each of the student's patches. The
  frame is resized where the patch sizes differ.
  """
  if not isinstance(module, framewise.Framewise):
    return module
  every, side, _ = patch
  cell = None if side == module.image.patch[1] else side
  return module.clone(every=every, cell=cell)


def image_teacher(
  name: str,
  config: ml_collections.ConfigDict,
  video: tuple[int, ...],
  pixels: colours.Colours,
) -> masked_pixels.PixelPhase:
  """Returns the phase that trains an MAE on the first frame of every tubelet.

  Args:
    name: name of the phase and of its config section.
    config: `config.method`.
    video: (T, H, W, C) of a clip.
    pixels: mean and standard deviation of the pixels.
  """
  section, shared = config[name], dict(config.vit)
  every, py, px = shared['patch']
  shared |= dict(patch=(1, py, px), qkv_bias='full', **pixels._asdict())
  encoder = salt_config.make_encoder(
    section.encoder, shared, positions='sincos_2d'
  )
  head = _pixel_decoder(
    section, encoder, 'sincos_2d', py * px * video[-1]
  ).clone(embed_init='glorot')
  return _pixel_phase(
    name,
    section,
    framewise.Framewise(encoder, every),
    framewise.FramewiseDecoder(head),
  )


def video_teacher(
  name: str,
  config: ml_collections.ConfigDict,
  video: tuple[int, ...],
  pixels: colours.Colours,
) -> masked_pixels.PixelPhase:
  """Returns the phase that trains a VideoMAE; Args as in `image_teacher`."""
  section = config[name]
  encoder = salt_config.make_encoder(
    section.encoder,
    config.vit,
    **pixels._asdict(),
    positions='sinusoid_1d',
  )
  pt, py, px = encoder.patch
  values = pt * py * px * video[-1]
  head = _pixel_decoder(section, encoder, 'sinusoid_1d', values)
  return _pixel_phase(name, section, encoder, head)


def _pixel_decoder(
  section: ml_collections.ConfigDict,
  encoder: vit.Vit,
  positions: str,
  values: int,
) -> decoder_lib.VideoMaeDecoder:
  return decoder_lib.VideoMaeDecoder(
    **section.decoder,
    out_width=values,
    positions=positions,
    dtype=encoder.dtype,
    remat=encoder.remat,
    attention=encoder.attention,
  )


def _pixel_phase(
  name: str,
  section: ml_collections.ConfigDict,
  encoder: Module,
  decoder: Module,
) -> masked_pixels.PixelPhase:
  return masked_pixels.PixelPhase(
    name=name,
    steps=section.steps,
    encoder=encoder,
    decoder=decoder,
    masks=specs.parse(section.masks),
    pixel_norm=section.pixel_norm,
    carry=(),
  )


MAKERS = {'image': image_teacher, 'video': video_teacher}
