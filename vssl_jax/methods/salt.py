"""SALT: a frozen pixel teacher, then students that predict its latents.

Phase `pixel_teacher` trains an encoder by masked pixel reconstruction under
multi-block masks. Phase `latent_student` freezes it and trains an encoder of
any size to predict its latents at masked positions (arXiv 2509.24317). With
other knobs the same two losses are VideoMAE, V-Pixel and V-JEPA: see
`methods/README.md` for the table, and for what the paper leaves open.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float

from vssl_jax import flops, losses, mask_specs, masking, rngs
from vssl_jax.methods import base
from vssl_jax.models import decoder as decoder_lib
from vssl_jax.models import layers, vit
from vssl_jax.models import predictor as predictor_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelTeacher(base.Phase):
  """Stage 1: masked pixel reconstruction.

  Attributes:
    decoder: (visible latents, mask, grid, token) -> pixels of masked patches.
    masks: all drawn every step; their losses are averaged.
    pixel_norm: what a target patch is normalised over, `losses.pixel_targets`.
    pixel_loss: `mse` (paper: "identical to VideoMAE") or `l1`.
  """

  decoder: nn.Module
  masks: tuple[Any, ...]
  pixel_norm: str = 'patch_channel'
  pixel_loss: str = 'mse'


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentStudent(base.Phase):
  """Stage 2: prediction of the frozen teacher's latents.

  Attributes:
    predictor: (visible latents, mask, grid, token) -> latents at masked
      positions, as wide as the teacher.
    masks: all drawn every step, under one pass of the teacher.
    latent_loss: `l1` (Eq. 2.1), `smooth_l1` or `l2`.
    target_norm: `ln` or `none`. Both V-JEPA codes normalise targets without
      parameters, and SALT says that it uses their objective; `none` is the
      literal reading of Eq. 2.1.
  """

  predictor: nn.Module
  masks: tuple[Any, ...]
  latent_loss: str = 'l1'
  target_norm: str = 'ln'


@dataclasses.dataclass(frozen=True)
class Salt(base.Method):
  """The two losses and the chain of phases that uses them.

  Attributes:
    plan: pixel and latent phases in the order they run.
  """

  plan: tuple[PixelTeacher | LatentStudent, ...]

  def phases(self) -> tuple[base.Phase, ...]:
    """Returns the plan, checked."""
    return base.check(self.plan)

  def init(
    self, rng: Array, video: base.Video, phase: base.Phase
  ) -> base.Params:
    """Returns random encoder and predictor (or decoder) parameters."""
    grid = layers.grid_of(video.shape, phase.encoder.patch)
    head_name, head = _head(phase)
    visible, masked = phase.masks[0].counts(grid)
    mask = masking.Mask(
      jnp.zeros((len(video), visible), jnp.int32),
      jnp.zeros((len(video), masked), jnp.int32),
    )
    tokens = jnp.zeros((len(video), visible, phase.encoder.width))
    encoder_key = rngs.stream(rng, 'init/encoder')
    head_key = rngs.stream(rng, f'init/{head_name}')
    return {
      'encoder': phase.encoder.init(encoder_key, video)['params'],
      head_name: head.init(head_key, tokens, mask, grid)['params'],
    }

  def loss(
    self,
    params: base.Params,
    teachers: Mapping[str, Any],
    batch: Mapping[str, Any],
    rng: rngs.Rng,
    phase: base.Phase,
  ) -> tuple[Float[Array, ''], base.Aux]:
    """Returns the mean of the phase's loss over its masks."""
    video = batch['video']
    grid = layers.grid_of(video.shape, phase.encoder.patch)
    # Targets do not depend on the mask: one teacher pass serves all masks.
    if isinstance(phase, PixelTeacher):
      kind = 'pixel'
      targets = losses.pixel_targets(
        layers.to_unit(video), phase.encoder.patch, phase.pixel_norm
      )
      distance = losses.DISTANCES[phase.pixel_loss]
      metrics = {}
    else:
      kind = 'latent'
      raw = phase.teachers['target'](teachers['target'], video)
      _check_grid(raw, grid, phase)
      targets = losses.TARGET_NORMS[phase.target_norm](raw)
      distance = losses.DISTANCES[phase.latent_loss]
      metrics = {'target/std': jnp.std(raw.astype(jnp.float32))}
    head_name, head = _head(phase)
    terms = []
    for token, spec in enumerate(phase.masks):
      mask, drawn = spec.draw(rng, batch, grid)
      tokens = phase.encoder.apply(
        {'params': params['encoder']},
        video,
        mask.visible,
        deterministic=False,
        rngs={'dropout': rng.stream(f'dropout/{spec.name}')},
      )
      predicted = head.apply(
        {'params': params[head_name]}, tokens, mask, grid, token=token
      )
      terms.append(distance(predicted, masking.gather(targets, mask.masked)))
      metrics[f'loss/{kind}/{spec.name}'] = terms[-1]
      metrics |= {f'mask/{spec.name}/{n}': x for n, x in drawn.items()}
    metrics['prediction/std'] = jnp.std(predicted.astype(jnp.float32))
    return jnp.mean(jnp.stack(terms)), base.Aux(metrics)

  def reconstruct(
    self,
    params: base.Params,
    batch: Mapping[str, Any],
    rng: rngs.Rng,
    phase: base.Phase,
  ) -> Mapping[str, base.Reconstruction]:
    """Returns what the pixel teacher's decoder predicts, by mask."""
    if not isinstance(phase, PixelTeacher):
      return {}
    video, out = batch['video'], {}
    grid = layers.grid_of(video.shape, phase.encoder.patch)
    for token, spec in enumerate(phase.masks):
      mask, _ = spec.draw(rng, batch, grid)
      tokens = phase.encoder.apply(
        {'params': params['encoder']}, video, mask.visible
      )
      predicted = phase.decoder.apply(
        {'params': params['decoder']}, tokens, mask, grid, token=token
      )
      out[spec.name] = base.Reconstruction(mask, predicted, phase.pixel_norm)
    return out

  def cost(self, phase: base.Phase, video: tuple[int, ...]) -> base.Cost:
    """Returns FLOPs per clip from true token counts."""
    grid = layers.grid_of((1, *video), phase.encoder.patch)
    _, head = _head(phase)
    trained = kept = 0.0
    for spec in phase.masks:
      visible, masked = spec.counts(grid)
      trained += flops.train(phase.encoder, grid, visible)
      trained += flops.train(
        head, grid, (visible, masked), in_width=phase.encoder.width
      )
      kept += flops.activations(phase.encoder, visible)
      kept += flops.activations(head, visible + masked)
    frozen = sum(
      flops.forward(t.module, layers.grid_of((1, *video), t.module.patch))
      for t in phase.teachers.values()
    )
    return base.Cost(trained, float(frozen), kept)


def _head(phase: base.Phase) -> tuple[str, nn.Module]:
  """Returns the role and the module that follows the encoder."""
  if isinstance(phase, PixelTeacher):
    return 'decoder', phase.decoder
  return 'predictor', phase.predictor


def _check_grid(
  target: Array, grid: tuple[int, ...], phase: base.Phase
) -> None:
  tokens = grid[0] * grid[1] * grid[2]
  if target.shape[1] != tokens:
    raise ValueError(
      f'phase {phase.name!r}: the teacher gives {target.shape[1]} tokens '
      f'(patch {phase.teachers["target"].module.patch}) and the student has a '
      f'grid of {grid} = {tokens} (patch {phase.encoder.patch}); teacher and '
      'student must cut the clip into the same grid'
    )


def default() -> ml_collections.ConfigDict:
  """Returns every knob of SALT at the values of the paper, ViT-L."""
  c = ml_collections.ConfigDict()
  c.name = 'salt'
  # Run in this order. Names start with pixel_teacher or latent_student and
  # name the section below that describes the phase.
  c.phases = ('pixel_teacher', 'latent_student')
  # What all encoders share; models/vit.py explains each field.
  c.vit = ml_collections.ConfigDict(
    dict(
      patch=(2, 16, 16),
      positions='rope_3d',
      # 'vjepa2' is the rotation of the released code, needed to load its
      # weights; the paper does not say which one it trained with.
      rope_pairing='paired',
      qkv_bias='full',
      init='vjepa',
      drop_path=0.0,
      dtype='bfloat16',
      remat='none',
      attention='auto',
    )
  )
  c.pixel_teacher = _pixel_section()
  c.latent_student = _latent_section('@pixel_teacher')
  c.latent_student_2 = _latent_section('@latent_student')
  return c


def _encoder_section() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(
      size='L',  # a row of models/vit.py:SIZES
      # Other shapes: 0 takes the value of the size.
      width=0,
      depth=0,
      num_heads=0,
      mlp_width=0,
    )
  )


def _pixel_section() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(
      steps=40_000,  # paper: 80k in the main table, 40k is its best split
      encoder=_encoder_section(),
      # The paper does not describe its decoder; the predictor's shape with
      # pixels as output reproduces its FLOPs. 'videomae' is VideoMAE's.
      decoder=dict(kind='predictor', width=384, depth=12, num_heads=16),
      masks='short_long',  # mask_specs.parse
      mask_select='random_k',  # 'raster_truncate' is the published collator
      mask_tokens=2,  # one per mask type; 1 shares it
      pixel_norm='patch_channel',  # 'patch', 'none'
      pixel_loss='mse',  # 'l1'
      init_from='',  # run folder or published model for the encoder
    )
  )


def _latent_section(teacher: str) -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    dict(
      steps=200_000,
      encoder=_encoder_section(),
      predictor=dict(width=384, depth=12, num_heads=16),
      # @<earlier phase>, @ema/encoder (V-JEPA), a run folder, or a published
      # model (local folder or hub id).
      teacher=teacher,
      teacher_dtype='bfloat16',
      # Momentum of @ema/encoder, linear from the first to the last step.
      ema=(0.99925, 0.99925),
      polyak=0.0,  # > 0: also keep this average of the student
      masks='short_long',
      mask_select='random_k',
      mask_tokens=2,
      latent_loss='l1',  # 'smooth_l1', 'l2'
      target_norm='ln',  # 'none'
      init_from='',
    )
  )


def build(
  config: ml_collections.ConfigDict,
  video: tuple[int, ...],
  resolve: Callable[[str], nn.Module],
) -> Salt:
  """Builds the method from its section of the config.

  Args:
    config: `config.method`.
    video: (T, H, W, C) of a clip.
    resolve: source of an outside teacher -> its module.

  Raises:
    ValueError: a phase without a section, or a mask that does not exist.
  """
  plan: list[Any] = []
  for name in config.phases:
    if name not in config or name == 'vit':
      raise ValueError(
        f'method.phases: found {name!r}, wanted names of sections of '
        'config.method such as pixel_teacher, latent_student, latent_student_2'
      )
    section = config[name]
    encoder = _encoder(section.encoder, config.vit)
    masks = mask_specs.parse(section.masks, select=section.mask_select)
    grid = layers.grid_of((1, *video), encoder.patch)
    for spec in masks:
      spec.counts(grid)  # refuses a grid too small for its masks, by name
    common = dict(
      name=name,
      steps=section.steps,
      encoder=encoder,
      masks=masks,
      init='fresh',
      opt='fresh',
      rows='fresh',
      init_from={'encoder': section.init_from} if section.init_from else {},
    )
    if name.startswith('pixel_teacher'):
      plan.append(_pixel_phase(section, encoder, video, common))
    else:
      plan.append(_latent_phase(section, encoder, plan, resolve, common))
  return Salt(tuple(plan))


def _known(name: str, value: str, table: Mapping[str, Any]) -> str:
  """Returns a knob's value if the table has it."""
  if value not in table:
    raise ValueError(f'{name}: found {value!r}, wanted one of {sorted(table)}')
  return value


def _encoder(
  section: ml_collections.ConfigDict, shared: ml_collections.ConfigDict
) -> vit.Vit:
  shape = {k: v for k, v in section.items() if k != 'size' and v}
  return vit.make(section.size, **shape, **shared)


def _pixel_phase(
  section: ml_collections.ConfigDict,
  encoder: vit.Vit,
  video: tuple[int, ...],
  common: dict[str, Any],
) -> PixelTeacher:
  pt, py, px = encoder.patch
  shape = dict(section.decoder)
  kind = shape.pop('kind')
  shape['out_width'] = pt * py * px * video[-1]
  if kind == 'predictor':
    decoder = _predictor(shape, section, encoder)
  elif kind == 'videomae':
    decoder = decoder_lib.VideoMaeDecoder(
      **shape, dtype=encoder.dtype, remat=encoder.remat
    )
  else:
    raise ValueError(
      f'method.{common["name"]}.decoder.kind: found {kind!r}, wanted '
      "'predictor' or 'videomae'"
    )
  return PixelTeacher(
    **common,
    decoder=decoder,
    pixel_norm=_known('pixel_norm', section.pixel_norm, losses.PIXEL_NORMS),
    pixel_loss=_known('pixel_loss', section.pixel_loss, losses.DISTANCES),
  )


def _latent_phase(
  section: ml_collections.ConfigDict,
  encoder: vit.Vit,
  before: list[Any],
  resolve: Callable[[str], nn.Module],
  common: dict[str, Any],
) -> LatentStudent:
  source, ema = section.teacher, {}
  if not source:
    raise ValueError(
      f'method.{common["name"]}.teacher: found nothing; it needs a source, '
      'or it would be a random model'
    )
  if source.startswith('@ema/'):
    module = encoder
    ema[source.removeprefix('@ema/')] = base.Ema('encoder', section.ema)
  elif source.startswith('@'):
    by_name = {p.name: p.encoder for p in before}
    if source[1:] not in by_name:
      raise ValueError(
        f'method.{common["name"]}.teacher: found {source!r}, wanted one of '
        f'{["@" + n for n in by_name]} (a phase that runs before), '
        '@ema/encoder, the folder of a finished run or a published model'
      )
    module = by_name[source[1:]]
  else:
    module = resolve(source)
  if section.polyak:
    ema['polyak'] = base.Ema('encoder', (section.polyak,) * 2)
  # Targets come from evaluation mode: no drop path in a teacher.
  module = module.clone(drop_path=0.0)
  shape = dict(section.predictor, out_width=module.width)
  return LatentStudent(
    **common,
    predictor=_predictor(shape, section, encoder),
    teachers={
      'target': base.Teacher(module, source, dtype=section.teacher_dtype)
    },
    ema=ema,
    latent_loss=_known('latent_loss', section.latent_loss, losses.DISTANCES),
    target_norm=_known('target_norm', section.target_norm, losses.TARGET_NORMS),
  )


def _predictor(
  shape: dict[str, Any], section: ml_collections.ConfigDict, encoder: vit.Vit
) -> predictor_lib.Predictor:
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
