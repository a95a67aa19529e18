"""Phases that make PMD's teachers from nothing, before its own."""

import flax.linen as nn
import ml_collections

from vssl_jax import losses, mask_specs
from vssl_jax.methods import pixel_phase, salt_config
from vssl_jax.models import decoder as decoder_lib
from vssl_jax.models import framewise, vit


def image_teacher(
  name: str, config: ml_collections.ConfigDict, video: tuple[int, ...]
) -> pixel_phase.PixelTeacher:
  """Returns MAE's phase, on the first frame of every tubelet.

  Args:
    name: of the phase and of its section.
    config: `config.method`.
    video: (T, H, W, C) of a clip.
  """
  section, shared = config[name], dict(config.vit)
  every, py, px = shared['patch']
  shared |= dict(patch=(1, py, px), qkv_bias='full')
  encoder = salt_config.make_encoder(
    section.encoder, shared, positions='sincos_2d'
  )
  head = _pixel_decoder(section, encoder, 'sincos_2d', py * px * video[-1])
  return _pixel_phase(
    name,
    section,
    framewise.Framewise(encoder, every),
    framewise.FramewiseDecoder(head),
  )


def video_teacher(
  name: str, config: ml_collections.ConfigDict, video: tuple[int, ...]
) -> pixel_phase.PixelTeacher:
  """Returns VideoMAE's phase; arguments as in `image_teacher`."""
  section = config[name]
  encoder = salt_config.make_encoder(
    section.encoder, config.vit, positions='sinusoid_1d'
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
    pixel_norm=salt_config.known(
      f'method.{name}.pixel_norm', section.pixel_norm, losses.PIXEL_NORMS
    ),
    init='fresh',
    opt='fresh',
    rows='fresh',
  )


MAKERS = {'image': image_teacher, 'video': video_teacher}
