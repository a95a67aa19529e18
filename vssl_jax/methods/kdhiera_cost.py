"""Cost of a KDHiera train step, in closed form."""

from typing import Any

from vssl_jax import flops
from vssl_jax.masks import hiera_units, tubelets
from vssl_jax.methods import distillation_teachers
from vssl_jax.methods import phase as phase_lib
from vssl_jax.models.hiera import stage_heads


def cost(phase: Any, video: tuple[int, ...]) -> phase_lib.Cost:
  """Returns FLOPs per clip of a `kdhiera.Distil`, from actual token counts.

  Args:
    phase: the phase.
    video: (T, H, W, C) of a clip.
  """
  encoder, side = phase.encoder, hiera_units.SIDE
  units = encoder.unit_grid((1, *video))
  grid = tubelets.grid_of((1, *video), encoder.patch)
  trained = activations = 0.0
  for spec in phase.masks:
    counts = spec.counts(units)
    visible, masked = (side**2 * n for n in counts)
    trained += flops.train(encoder, grid, visible)
    activations += flops.activations(encoder, visible)
    for head in phase.heads.values():
      if isinstance(head, stage_heads.StageHeads):
        trained += 3 * head.flops(encoder, counts[0])
        activations += head.kept(encoder, counts[0])
      else:
        tokens = (visible, masked)
        trained += flops.train(head, grid, tokens, in_width=encoder.width)
        activations += flops.activations(head, visible + masked)
  return phase_lib.Cost(
    trained, distillation_teachers.cost(phase.teachers, video), activations
  )
