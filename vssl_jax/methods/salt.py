"""SALT: students that predict the latents of a frozen pixel teacher.

Phase `pixel_teacher` (`masked_pixels.py`) trains an encoder by masked pixel
reconstruction with multi-block masks. Phase `latent_student` (this module)
freezes it and trains an encoder of any size to predict its latents at masked
positions (arXiv 2509.24317). With other options the same two losses give
VideoMAE, V-Pixel and V-JEPA. See `methods/README.md` for the table, and for
details that the paper leaves open.
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
from vssl_jax.methods import masked_pixels
from vssl_jax.methods import phase as phase_lib
from vssl_jax.models import Module


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentPhase(phase_lib.Phase):
  """A phase that predicts the frozen teacher's latents (stage 2 of SALT).

  Attributes:
    predictor: (visible latents, mask, grid, token) -> latents at masked
      positions, of the teacher's width.
    masks: all drawn every step; the teacher runs once for all of them.
    latent_loss: `l1` (Eq. 2.1), `smooth_l1` or `l2`.
    target_norm: `ln` (our choice) or `none` (Eq. 2.1 as written in the paper).
      Both V-JEPA codes normalise targets without parameters, and SALT states
      that it uses their objective.
    target_layer: number of the teacher's blocks whose output is the target;
      None for all blocks and the final norm.
    frozen_depth: number of first blocks of the encoder that `frozen` matches.
  """

  predictor: Module
  latent_loss: str = 'l1'
  target_norm: str = 'ln'
  target_layer: int | None = None
  frozen_depth: int = 0

  def init(self, key: Array, video: phase_lib.Video) -> phase_lib.Params:
    """Returns random parameters of the encoder and the predictor."""
    part_key = rngs.stream(key, 'init/encoder')
    head = self.predictor
    return {
      'encoder': self.encoder.init(part_key, video)['params'],
      'predictor': masked_pixels.init_head(key, video, self, 'predictor', head),
    }

  def targets(
    self,
    teachers: Mapping[str, Any],
    video: phase_lib.Video,
  ) -> Mapping[str, Float[Array, 'B ...']]:
    """Returns the teacher's tokens, before normalisation."""
    options = {} if self.target_layer is None else {'upto': self.target_layer}
    teacher = self.teachers['target']
    return {'target': teacher(teachers['target'], video, **options)}

  def loss(
    self,
    params: phase_lib.Params,
    teachers: Mapping[str, Any],
    batch: batch_lib.Batch,
    rng: rngs.Rng,
  ) -> tuple[Float[Array, ''], phase_lib.Aux]:
    """Returns the latent loss, averaged over masks."""
    video = batch.video
    grid = tubelets.grid_of(video.shape, self.encoder.patch)
    del teachers  # their outputs are in batch.targets, once for all masks
    features = batch.targets['target']
    _check_grid(features, grid, self)
    targets = losses.TARGET_NORMS[self.target_norm](features)
    distance = losses.DISTANCES[self.latent_loss]
    metrics = {'target/std': jnp.std(features.astype(jnp.float32))}
    terms = []
    for token, spec in enumerate(self.masks):
      mask, mask_metrics = spec.draw(rng, batch, grid)
      tokens = self.encoder.apply(
        {'params': params['encoder']},
        video,
        mask.visible,
        deterministic=False,
        rngs={'dropout': rng.per_batch(f'dropout/{spec.name}')},
      )
      predicted = self.predictor.apply(
        {'params': params['predictor']}, tokens, mask, grid, token=token
      )
      terms.append(distance(predicted, sampling.gather(targets, mask.masked)))
      metrics[f'loss/latent/{spec.name}'] = terms[-1]
      metrics |= {f'mask/{spec.name}/{n}': x for n, x in mask_metrics.items()}
    metrics['prediction/std'] = jnp.std(predicted.astype(jnp.float32))
    return jnp.mean(jnp.stack(terms)), phase_lib.Aux(metrics)

  def cost(self, video: tuple[int, ...]) -> cost_lib.Cost:
    """Returns FLOPs per clip from the actual token counts."""
    return cost_lib.latents(self, video)


def _check_grid(
  target: Array, grid: tuple[int, ...], phase: phase_lib.Phase
) -> None:
  tokens = grid[0] * grid[1] * grid[2]
  if target.shape[1] != tokens:
    raise ValueError(
      f'phase {phase.name!r}: the teacher gives {target.shape[1]} tokens '
      f'(patch {phase.teachers["target"].module.patch}) and the student has a '
      f'grid of {grid} = {tokens} (patch {phase.encoder.patch}); teacher and '
      'student must cut the clip into the same grid'
    )
