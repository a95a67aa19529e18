"""Masked pixel reconstruction, for training a teacher from scratch.

Used for SALT's teacher, VideoMAE, V-Pixel, and PMD's image and video teachers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from vssl_jax import losses, rngs
from vssl_jax.data import batch as batch_lib
from vssl_jax.masks import sampling, tubelets
from vssl_jax.methods import cost as cost_lib
from vssl_jax.methods import phase as phase_lib
from vssl_jax.models import Module, framewise
from vssl_jax.models.hiera import decoder as decoder_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelPhase(phase_lib.Phase):
  """A phase of masked pixel reconstruction.

  Attributes:
    decoder: (visible latents, mask, grid, token) -> pixels of masked patches.
    masks: all drawn every step; their losses are averaged.
    pixel_norm: normalisation of target patches, see `losses.pixel_targets`.
    pixel_loss: `mse` (paper: "identical to VideoMAE") or `l1`.
  """

  decoder: Module
  pixel_norm: str = 'patch_channel'
  pixel_loss: str = 'mse'

  def init(self, key: Array, video: phase_lib.Video) -> phase_lib.Params:
    """Returns random parameters of the encoder and the decoder."""
    encoder_key = rngs.stream(key, 'init/encoder')
    return {
      'encoder': self.encoder.init(encoder_key, video)['params'],
      'decoder': init_head(key, video, self, 'decoder', self.decoder),
    }

  def loss(
    self,
    params: phase_lib.Params,
    teachers: Mapping[str, Any],
    batch: batch_lib.Batch,
    rng: rngs.Rng,
  ) -> tuple[Float[Array, ''], phase_lib.Aux]:
    """Returns the distance to the masked pixels, averaged over masks."""
    del teachers
    targets = self._pixel_targets(batch.video)
    distance = losses.DISTANCES[self.pixel_loss]
    terms, metrics = [], {}
    for spec, mask, mask_metrics, predicted in self._predicted(
      params, batch, rng
    ):
      terms.append(distance(predicted, sampling.gather(targets, mask.masked)))
      metrics[f'loss/pixel/{spec.name}'] = terms[-1]
      metrics |= {f'mask/{spec.name}/{n}': x for n, x in mask_metrics.items()}
    metrics['prediction/std'] = jnp.std(predicted.astype(jnp.float32))
    return jnp.mean(jnp.stack(terms)), phase_lib.Aux(metrics)

  def reconstruct(
    self,
    params: phase_lib.Params,
    batch: batch_lib.Batch,
    rng: rngs.Rng,
  ) -> Mapping[str, phase_lib.Reconstruction]:
    """Returns the decoder's predictions by mask."""
    encoder, norm, every = self.encoder, self.pixel_norm, 1
    reconstructions = {}
    for spec, mask, _, predicted in self._predicted(
      params, batch, rng, deterministic=True
    ):
      pixels = predicted
      if isinstance(encoder, framewise.Framewise):
        every, video = encoder.every, batch.video
        pixels = decoder_lib.as_raw(pixels, mask.masked, video, encoder, norm)
      reconstructions[spec.name] = phase_lib.Reconstruction(
        mask, pixels, norm, every
      )
    return reconstructions

  def cost(self, video: tuple[int, ...]) -> cost_lib.Cost:
    """Returns FLOPs per clip from the actual token counts."""
    return cost_lib.pixels(self, video)

  def _pixel_targets(self, video: phase_lib.Video) -> Float[Array, 'B N PC']:
    """Returns target pixels per token.

    For an image model: patches of its frames, normalised by its pixel mean and
    standard deviation, as in MAE. For a video model: tubelets of pixels in
    [0, 1], as in VideoMAE. Then `pixel_norm` is applied to each patch.
    """
    if isinstance(self.encoder, framewise.Framewise):
      return decoder_lib.targets(video, self.encoder, self.pixel_norm)
    pixels = tubelets.to_unit(video)
    return losses.pixel_targets(pixels, self.encoder.patch, self.pixel_norm)

  def _predicted(
    self,
    params: phase_lib.Params,
    batch: batch_lib.Batch,
    rng: rngs.Rng,
    deterministic: bool = False,
  ) -> Any:
    """Yields (spec, mask, mask metrics, predictions) for each mask."""
    video = batch.video
    grid = tubelets.grid_of(video.shape, self.encoder.patch)
    for token, spec in enumerate(self.masks):
      mask, metrics = spec.draw(rng, batch, grid)
      tokens = self.encoder.apply(
        {'params': params['encoder']},
        video,
        mask.visible,
        deterministic=deterministic,
        rngs={'dropout': rng.per_batch(f'dropout/{spec.name}')},
      )
      predicted = self.decoder.apply(
        {'params': params['decoder']}, tokens, mask, grid, token=token
      )
      yield spec, mask, metrics, predicted


def init_head(
  key: Array, video: phase_lib.Video, phase: Any, role: str, head: Module
) -> Any:
  """Returns random parameters of a decoder or predictor.

  Args:
    key: key of the phase.
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
  part_key = rngs.stream(key, f'init/{role}')
  return head.init(part_key, tokens, mask, grid)['params']
