"""Image and video teachers of a distillation, for every method that has them.

They come from outside, or phases of the same run make them from nothing,
before the method's own.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import ml_collections

from vssl_jax import colours, flops, losses, mask_specs, ranges
from vssl_jax.methods import base, knobs, pixel_phase, salt_config
from vssl_jax.models import decoder as decoder_lib
from vssl_jax.models import framewise, hiera, layers, vit

NAMES = ('image', 'video')


def keys(**more: Any) -> ranges.Section:
  """Returns the keys of teachers, those of their own phases among them.

  Args:
    **more: further keys of the sections `image` and `video`.
  """
  source = ranges.Section(
    teacher=('', ranges.Text()),
    dtype=('bfloat16', ranges.Choice(base.TEACHER_DTYPES)),
    **more,
  )
  return ranges.Section(
    # What they share where this run makes them; `patch` is also how teachers
    # from outside cut a clip.
    vit=knobs.network(
      patch=(2, 16, 16),
      qkv_bias='qv',
      init='videomae',
      dtype='bfloat16',
      remat='none',
      attention='auto',
    ),
    # The teachers; a list of one distils that one only.
    teachers=(NAMES, ranges.Tuple(ranges.Choice(NAMES), unique=True)),
    # @image_teacher and @video_teacher are trained first, by phases of this
    # run; else a run folder, or published weights (folder, file, hub id).
    # A file of MVD that looks like VideoMAE: x.pth#mvd.
    # dtype: 'float32' computes in it; or 'float8' on GPUs that have it.
    image=source,
    video=source,
    image_teacher=_section(
      masks='frames:0.75',
      pixel_norm='patch',
      decoder=knobs.head(width=512, depth=8, num_heads=16),
    ),
    video_teacher=_section(
      masks='tube:0.9',
      pixel_norm='patch_channel',
      decoder=knobs.head(width=384, depth=4, num_heads=6),
    ),
  )


def _section(
  masks: str, pixel_norm: str, decoder: ranges.Section
) -> ranges.Section:
  return ranges.Section(
    steps=(100_000, knobs.STEPS),
    encoder=knobs.encoder('B'),
    masks=(masks, knobs.MASKS),
    pixel_norm=(pixel_norm, ranges.Choice(tuple(losses.PIXEL_NORMS))),
    decoder=decoder,
  )


def find(
  config: ml_collections.ConfigDict,
  names: Iterable[str],
  video: tuple[int, ...],
  resolve: Callable[[str], nn.Module],
  pixels: colours.Colours,
) -> tuple[tuple[pixel_phase.PixelTeacher, ...], dict[str, nn.Module]]:
  """Returns the phases that make teachers, and all teachers' networks.

  Args:
    config: `config.method`.
    names: of the teachers.
    video: (T, H, W, C) of a clip.
    resolve: source of an outside teacher -> its module.
    pixels: mean and deviation of the clips.

  Raises:
    ValueError: a teacher without a source.
  """
  own, modules = [], {}
  for name in names:
    source, phase = config[name].teacher, f'{name}_teacher'
    if source == f'@{phase}':
      own.append(MAKERS[name](phase, config, video, pixels))
      modules[name] = own[-1].encoder
    elif not source or source.startswith('@'):
      raise ValueError(
        f'method.{name}.teacher: found {source!r}; wanted a run folder, '
        'published weights (folder, file or hub id), or '
        f'@{phase} to train it first. Without one it would be a random model'
      )
    else:
      modules[name] = _fitted(resolve(source), config.vit.patch)
      if isinstance(
        getattr(modules[name], 'image', modules[name]), hiera.Hiera
      ):
        raise ValueError(
          f'method.{name}.teacher: found a Hiera ({source}), wanted a ViT, '
          'whose layers have the grid of the clip'
        )
  return tuple(own), modules


def frozen(
  config: ml_collections.ConfigDict, modules: Mapping[str, nn.Module]
) -> dict[str, base.Teacher]:
  """Returns teachers whose targets come from evaluation: no drop path."""
  return {
    name: base.Teacher(
      module.clone(drop_path=0.0),
      config[name].teacher,
      dtype=config[name].dtype,
    )
    for name, module in modules.items()
  }


def stream(
  phase: base.Phase, name: str, params: Any, video: base.Video, **options: Any
) -> Any:
  """Returns a teacher's residual stream over the whole clip, by depth.

  Args:
    phase: has the teacher, and an encoder whose grid it must share.
    name: of the teacher.
    params: of its module.
    video: a batch of clips.
    **options: others of its module; with `attention_to` a pair is returned.

  Raises:
    ValueError: teacher and student cut the clip differently.
  """
  teacher = phase.teachers[name]
  found = teacher(params, video, features=True, **options)
  last = (found[0] if 'attention_to' in options else found)[-1]
  own, grid = (
    layers.grid_of(video.shape, patch)
    for patch in (teacher.module.patch, phase.encoder.patch)
  )
  tokens = grid[0] * grid[1] * grid[2]
  if own != grid or last.shape[1] != tokens:
    raise ValueError(
      f'phase {phase.name!r}: teacher {name!r} gives {last.shape[1]} tokens '
      f'(patch {teacher.module.patch}, grid {own}) and the student has a grid '
      f'of {grid} = {tokens} (patch {phase.encoder.patch}); teachers and '
      'student must cut the clip into the same grid'
    )
  return found


def cost(teachers: Mapping[str, base.Teacher], video: tuple[int, ...]) -> float:
  """Returns the forward FLOPs of some teachers over one whole clip."""
  return float(
    sum(
      flops.forward(
        teacher.module, layers.grid_of((1, *video), teacher.module.patch)
      )
      for teacher in teachers.values()
    )
  )


def _fitted(module: nn.Module, patch: layers.Grid) -> nn.Module:
  """Returns a teacher that cuts a clip as the student does, if it is of images.

  It then looks at the first frame of each of the student's patches, resized
  where its own patches have another side.
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
) -> pixel_phase.PixelTeacher:
  """Returns MAE's phase, on the first frame of every tubelet.

  Args:
    name: of the phase and of its section.
    config: `config.method`.
    video: (T, H, W, C) of a clip.
    pixels: mean and deviation of the clips.
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
) -> pixel_phase.PixelTeacher:
  """Returns VideoMAE's phase; arguments as in `image_teacher`."""
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
  encoder: nn.Module,
  decoder: nn.Module,
) -> pixel_phase.PixelTeacher:
  return pixel_phase.PixelTeacher(
    name=name,
    steps=section.steps,
    encoder=encoder,
    decoder=decoder,
    masks=mask_specs.parse(section.masks),
    pixel_norm=section.pixel_norm,
    init='fresh',
    opt='fresh',
    rows='fresh',
  )


MAKERS = {'image': image_teacher, 'video': video_teacher}
