"""Masked pixel reconstruction: the phase that makes a teacher from nothing.

SALT's teacher, VideoMAE, V-Pixel, and image and video teachers of PMD.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vssl_jax import flops, losses, masking, rngs
from vssl_jax.methods import base
from vssl_jax.models import framewise, hiera_mae, layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelTeacher(base.Phase):
  """Masked pixel reconstruction.

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


@dataclasses.dataclass(frozen=True)
class Pixels(base.Method):
  """Phases of masked pixel reconstruction.

  Attributes:
    plan: in the order they run.
  """

  plan: tuple[PixelTeacher, ...]

  def phases(self) -> tuple[base.Phase, ...]:
    """Returns the plan."""
    return self.plan

  def init(
    self, rng: Array, video: base.Video, phase: base.Phase
  ) -> base.Params:
    """Returns random parameters of encoder and decoder."""
    encoder_key = rngs.stream(rng, 'init/encoder')
    return {
      'encoder': phase.encoder.init(encoder_key, video)['params'],
      'decoder': init_head(rng, video, phase, 'decoder', phase.decoder),
    }

  def loss(
    self,
    params: base.Params,
    teachers: Mapping[str, Any],
    batch: Mapping[str, Any],
    rng: rngs.Rng,
    phase: base.Phase,
  ) -> tuple[Float[Array, ''], base.Aux]:
    """Returns the mean over masks of the distance to hidden pixels."""
    del teachers
    targets = _targets(batch['video'], phase)
    distance = losses.DISTANCES[phase.pixel_loss]
    terms, metrics = [], {}
    for spec, mask, drawn, predicted in _predicted(params, batch, rng, phase):
      terms.append(distance(predicted, masking.gather(targets, mask.masked)))
      metrics[f'loss/pixel/{spec.name}'] = terms[-1]
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
    """Returns what the decoder predicts, by mask."""
    encoder, norm, every = phase.encoder, phase.pixel_norm, 1
    out = {}
    for spec, mask, _, predicted in _predicted(
      params, batch, rng, phase, deterministic=True
    ):
      pixels = predicted
      if isinstance(encoder, framewise.Framewise):
        every, video = encoder.every, batch['video']
        pixels = hiera_mae.as_raw(pixels, mask.masked, video, encoder, norm)
      out[spec.name] = base.Reconstruction(mask, pixels, norm, every)
    return out

  def cost(self, phase: base.Phase, video: tuple[int, ...]) -> base.Cost:
    """Returns FLOPs per clip from true token counts."""
    grid = layers.grid_of((1, *video), phase.encoder.patch)
    cost = masked_cost(phase.encoder, phase.decoder, phase.masks, grid)
    return cost._replace(tokens=masked_tokens(phase.masks, grid, 'decoder'))


def init_head(
  rng: Array, video: base.Video, phase: Any, role: str, head: nn.Module
) -> Any:
  """Returns random parameters of what follows a masked encoder.

  Args:
    rng: of the phase.
    video: a clip.
    phase: has `encoder` and `masks`.
    role: names the random stream.
    head: (visible latents, mask, grid) -> predictions.
  """
  grid = layers.grid_of(video.shape, phase.encoder.patch)
  visible, masked = phase.masks[0].counts(grid)
  mask = masking.Mask(
    jnp.zeros((len(video), visible), jnp.int32),
    jnp.zeros((len(video), masked), jnp.int32),
  )
  tokens = jnp.zeros((len(video), visible, phase.encoder.width))
  key = rngs.stream(rng, f'init/{role}')
  return head.init(key, tokens, mask, grid)['params']


def _targets(video: base.Video, phase: PixelTeacher) -> Float[Array, 'B N PC']:
  """Returns pixels per token: of a tubelet, or of an image model's frames.

  Those of an image model have its mean and deviation of colours, as in MAE;
  those of a video model are in [0, 1], as in VideoMAE.
  """
  if isinstance(phase.encoder, framewise.Framewise):
    return hiera_mae.targets(video, phase.encoder, phase.pixel_norm)
  pixels = layers.to_unit(video)
  return losses.pixel_targets(pixels, phase.encoder.patch, phase.pixel_norm)


def _predicted(
  params: base.Params,
  batch: Mapping[str, Any],
  rng: rngs.Rng,
  phase: PixelTeacher,
  deterministic: bool = False,
) -> Any:
  """Yields each mask, what drawing it told, and what is predicted under it."""
  video = batch['video']
  grid = layers.grid_of(video.shape, phase.encoder.patch)
  for token, spec in enumerate(phase.masks):
    mask, drawn = spec.draw(rng, batch, grid)
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
    yield spec, mask, drawn, predicted


def masked_cost(
  encoder: nn.Module,
  head: nn.Module,
  masks: tuple[Any, ...],
  grid: layers.Grid,
  locked: int = 0,
) -> base.Cost:
  """Returns what training an encoder and its head costs under some masks.

  Args:
    encoder: of visible tokens.
    head: its decoder or predictor.
    masks: all of them every step.
    grid: tokens along (time, height, width).
    locked: first blocks of the encoder that are frozen.
  """
  trained = kept = 0.0
  for spec in masks:
    visible, masked = spec.counts(grid)
    trained += flops.train(encoder, grid, visible, frozen=locked)
    trained += flops.train(
      head, grid, (visible, masked), in_width=encoder.width
    )
    kept += flops.activations(encoder, visible, encoder.depth - locked)
    kept += flops.activations(head, visible + masked)
  return base.Cost(trained, 0.0, kept)


def masked_tokens(
  masks: tuple[Any, ...], grid: layers.Grid, *heads: str
) -> dict[str, float]:
  """Returns the tokens of a clip that an encoder and its heads see in a step.

  Args:
    masks: all of them every step.
    grid: tokens along (time, height, width).
    *heads: roles of decoders or predictors, of visible and mask tokens.
  """
  counts = [spec.counts(grid) for spec in masks]
  both = float(sum(visible + masked for visible, masked in counts))
  visible = float(sum(visible for visible, _ in counts))
  return {'encoder': visible} | dict.fromkeys(heads, both)
