"""Masked pixel reconstruction, for training a teacher from scratch.

Used for SALT's teacher, VideoMAE, V-Pixel, and PMD's image and video teachers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vssl_jax import flops, losses, rngs
from vssl_jax.masks import sampling, tubelets
from vssl_jax.methods import phase as phase_lib
from vssl_jax.models import framewise
from vssl_jax.models.hiera import decoder as decoder_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelTeacher(phase_lib.Phase):
  """A phase of masked pixel reconstruction.

  Attributes:
    decoder: (visible latents, mask, grid, token) -> pixels of masked patches.
    masks: all drawn every step; their losses are averaged.
    pixel_norm: normalisation of target patches, see `losses.pixel_targets`.
    pixel_loss: `mse` (paper: "identical to VideoMAE") or `l1`.
  """

  decoder: nn.Module
  masks: tuple[Any, ...]
  pixel_norm: str = 'patch_channel'
  pixel_loss: str = 'mse'


@dataclasses.dataclass(frozen=True)
class Pixels(phase_lib.Method):
  """Method whose phases are masked pixel reconstruction.

  Attributes:
    plan: the phases, in order.
  """

  plan: tuple[PixelTeacher, ...]

  def phases(self) -> tuple[phase_lib.Phase, ...]:
    """Returns the phases, in order."""
    return self.plan

  def init(
    self, rng: Array, video: phase_lib.Video, phase: phase_lib.Phase
  ) -> phase_lib.Params:
    """Returns random parameters of the encoder and the decoder."""
    encoder_key = rngs.stream(rng, 'init/encoder')
    return {
      'encoder': phase.encoder.init(encoder_key, video)['params'],
      'decoder': init_head(rng, video, phase, 'decoder', phase.decoder),
    }

  def loss(
    self,
    params: phase_lib.Params,
    teachers: Mapping[str, Any],
    batch: Mapping[str, Any],
    rng: rngs.Rng,
    phase: phase_lib.Phase,
  ) -> tuple[Float[Array, ''], phase_lib.Aux]:
    """Returns the distance to the masked pixels, averaged over masks."""
    del teachers
    targets = _targets(batch['video'], phase)
    distance = losses.DISTANCES[phase.pixel_loss]
    terms, metrics = [], {}
    for spec, mask, mask_metrics, predicted in _predicted(
      params, batch, rng, phase
    ):
      terms.append(distance(predicted, sampling.gather(targets, mask.masked)))
      metrics[f'loss/pixel/{spec.name}'] = terms[-1]
      metrics |= {f'mask/{spec.name}/{n}': x for n, x in mask_metrics.items()}
    metrics['prediction/std'] = jnp.std(predicted.astype(jnp.float32))
    return jnp.mean(jnp.stack(terms)), phase_lib.Aux(metrics)

  def reconstruct(
    self,
    params: phase_lib.Params,
    batch: Mapping[str, Any],
    rng: rngs.Rng,
    phase: phase_lib.Phase,
  ) -> Mapping[str, phase_lib.Reconstruction]:
    """Returns the decoder's predictions by mask."""
    encoder, norm, every = phase.encoder, phase.pixel_norm, 1
    reconstructions = {}
    for spec, mask, _, predicted in _predicted(
      params, batch, rng, phase, deterministic=True
    ):
      pixels = predicted
      if isinstance(encoder, framewise.Framewise):
        every, video = encoder.every, batch['video']
        pixels = decoder_lib.as_raw(pixels, mask.masked, video, encoder, norm)
      reconstructions[spec.name] = phase_lib.Reconstruction(
        mask, pixels, norm, every
      )
    return reconstructions

  def cost(
    self, phase: phase_lib.Phase, video: tuple[int, ...]
  ) -> phase_lib.Cost:
    """Returns FLOPs per clip from the actual token counts."""
    grid = tubelets.grid_of((1, *video), phase.encoder.patch)
    cost = masked_cost(phase.encoder, phase.decoder, phase.masks, grid)
    return cost._replace(tokens=masked_tokens(phase.masks, grid, 'decoder'))


def init_head(
  rng: Array, video: phase_lib.Video, phase: Any, role: str, head: nn.Module
) -> Any:
  """Returns random parameters of a decoder or predictor.

  Args:
    rng: random key of the phase.
    video: clips [B, T, H, W, C].
    phase: a phase with fields `encoder` and `masks`.
    role: role of the head, which names the random stream.
    head: (visible latents, mask, grid) -> predictions.
  """
  grid = tubelets.grid_of(video.shape, phase.encoder.patch)
  visible, masked = phase.masks[0].counts(grid)
  mask = sampling.Mask(
    jnp.zeros((len(video), visible), jnp.int32),
    jnp.zeros((len(video), masked), jnp.int32),
  )
  tokens = jnp.zeros((len(video), visible, phase.encoder.width))
  key = rngs.stream(rng, f'init/{role}')
  return head.init(key, tokens, mask, grid)['params']


def _targets(
  video: phase_lib.Video, phase: PixelTeacher
) -> Float[Array, 'B N PC']:
  """Returns target pixels per token.

  For an image model: patches of its frames, normalised by its pixel mean and
  standard deviation, as in MAE. For a video model: tubelets of pixels in
  [0, 1], as in VideoMAE. Then `pixel_norm` is applied to each patch.
  """
  if isinstance(phase.encoder, framewise.Framewise):
    return decoder_lib.targets(video, phase.encoder, phase.pixel_norm)
  pixels = tubelets.to_unit(video)
  return losses.pixel_targets(pixels, phase.encoder.patch, phase.pixel_norm)


def _predicted(
  params: phase_lib.Params,
  batch: Mapping[str, Any],
  rng: rngs.Rng,
  phase: PixelTeacher,
  deterministic: bool = False,
) -> Any:
  """Yields (spec, mask, mask metrics, predictions) for each mask."""
  video = batch['video']
  grid = tubelets.grid_of(video.shape, phase.encoder.patch)
  for token, spec in enumerate(phase.masks):
    mask, metrics = spec.draw(rng, batch, grid)
    tokens = phase.encoder.apply(
      {'params': params['encoder']},
      video,
      mask.visible,
      deterministic=deterministic,
      rngs={'dropout': rng.per_batch(f'dropout/{spec.name}')},
    )
    predicted = phase.decoder.apply(
      {'params': params['decoder']}, tokens, mask, grid, token=token
    )
    yield spec, mask, metrics, predicted


def masked_cost(
  encoder: nn.Module,
  head: nn.Module,
  masks: tuple[Any, ...],
  grid: tubelets.Grid,
  locked: int = 0,
) -> phase_lib.Cost:
  """Returns the training cost per clip of an encoder and its head with masks.

  Args:
    encoder: encoder of the visible tokens.
    head: its decoder or predictor.
    masks: masks of a step; all of them are used in every step.
    grid: tokens along (time, height, width).
    locked: number of first blocks of the encoder that are frozen.
  """
  trained = activations = 0.0
  for spec in masks:
    visible, masked = spec.counts(grid)
    trained += flops.train(encoder, grid, visible, frozen=locked)
    trained += flops.train(
      head, grid, (visible, masked), in_width=encoder.width
    )
    activations += flops.activations(encoder, visible, encoder.depth - locked)
    activations += flops.activations(head, visible + masked)
  return phase_lib.Cost(trained, 0.0, activations)


def masked_tokens(
  masks: tuple[Any, ...], grid: tubelets.Grid, *heads: str
) -> dict[str, float]:
  """Returns the tokens per clip and step that an encoder and its heads process.

  Args:
    masks: masks of a step; all of them are used in every step.
    grid: tokens along (time, height, width).
    *heads: roles of decoders or predictors, which process visible tokens and
      mask tokens.

  Returns:
    Role -> number of tokens, summed over masks.
  """
  counts = [spec.counts(grid) for spec in masks]
  total = float(sum(visible + masked for visible, masked in counts))
  visible = float(sum(visible for visible, _ in counts))
  return {'encoder': visible} | dict.fromkeys(heads, total)
