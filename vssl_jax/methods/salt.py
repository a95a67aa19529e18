"""SALT: a frozen pixel teacher, then students that predict its latents.

Phase `pixel_teacher` (`pixel_phase.py`) trains an encoder by masked pixel
reconstruction under multi-block masks. Phase `latent_student`, here, freezes it
and trains an encoder of any size to predict its latents at masked positions
(arXiv 2509.24317). With other knobs the same two losses are VideoMAE, V-Pixel
and V-JEPA: see `methods/README.md` for the table, and for what the paper leaves
open.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vssl_jax import flops, losses, masking, rngs
from vssl_jax.methods import base, pixel_phase
from vssl_jax.models import layers


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
    target_layer: the target is the output of so many of the teacher's blocks;
      None for all of them and the final norm.
    frozen_depth: first blocks of the encoder that `frozen` names.
  """

  predictor: nn.Module
  masks: tuple[Any, ...]
  latent_loss: str = 'l1'
  target_norm: str = 'ln'
  target_layer: int | None = None
  frozen_depth: int = 0


@dataclasses.dataclass(frozen=True)
class Salt(base.Method):
  """The latent loss, and the phases that use it.

  Attributes:
    plan: in the order they run.
  """

  plan: tuple[LatentStudent, ...]

  def phases(self) -> tuple[base.Phase, ...]:
    """Returns the plan."""
    return self.plan

  def init(
    self, rng: Array, video: base.Video, phase: base.Phase
  ) -> base.Params:
    """Returns random encoder and predictor parameters."""
    key = rngs.stream(rng, 'init/encoder')
    head = phase.predictor
    return {
      'encoder': phase.encoder.init(key, video)['params'],
      'predictor': pixel_phase.init_head(rng, video, phase, 'predictor', head),
    }

  def targets(
    self, teachers: Mapping[str, Any], video: base.Video, phase: base.Phase
  ) -> Mapping[str, Float[Array, 'B ...']]:
    """Returns the teacher's tokens, before they are normed."""
    part = {} if phase.target_layer is None else {'upto': phase.target_layer}
    teach = phase.teachers['target']
    return {'target': teach(teachers['target'], video, **part)}

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
    # One pass of the teacher serves all masks.
    raw = self.targets_of(teachers, batch, phase)['target']
    _check_grid(raw, grid, phase)
    targets = losses.TARGET_NORMS[phase.target_norm](raw)
    distance = losses.DISTANCES[phase.latent_loss]
    metrics = {'target/std': jnp.std(raw.astype(jnp.float32))}
    terms = []
    for token, spec in enumerate(phase.masks):
      mask, drawn = spec.draw(rng, batch, grid)
      tokens = phase.encoder.apply(
        {'params': params['encoder']},
        video,
        mask.visible,
        deterministic=False,
        rngs={'dropout': rng.per_batch(f'dropout/{spec.name}')},
      )
      predicted = phase.predictor.apply(
        {'params': params['predictor']}, tokens, mask, grid, token=token
      )
      terms.append(distance(predicted, masking.gather(targets, mask.masked)))
      metrics[f'loss/latent/{spec.name}'] = terms[-1]
      metrics |= {f'mask/{spec.name}/{n}': x for n, x in drawn.items()}
    metrics['prediction/std'] = jnp.std(predicted.astype(jnp.float32))
    return jnp.mean(jnp.stack(terms)), base.Aux(metrics)

  def cost(self, phase: base.Phase, video: tuple[int, ...]) -> base.Cost:
    """Returns FLOPs per clip from true token counts."""
    grid = layers.grid_of((1, *video), phase.encoder.patch)
    trained = pixel_phase.masked_cost(
      phase.encoder, phase.predictor, phase.masks, grid, phase.frozen_depth
    )
    frozen = sum(
      flops.forward(
        t.module,
        layers.grid_of((1, *video), t.module.patch),
        depth=phase.target_layer,
      )
      for t in phase.teachers.values()
    )
    tokens = pixel_phase.masked_tokens(phase.masks, grid, 'predictor')
    tokens |= dict.fromkeys(phase.teachers, float(math.prod(grid)))
    # With locks, or a target from part of the teacher, N is not all of it.
    whole = not phase.frozen_depth and phase.target_layer is None
    return trained._replace(
      frozen=float(frozen), tokens=tokens if whole else {}
    )


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
