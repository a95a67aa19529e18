"""What a step of KDHiera costs, by closed forms."""

from typing import Any

from vssl_jax import flops, unit_masks
from vssl_jax.methods import base, teachers
from vssl_jax.models import layers, stage_heads


def cost(phase: Any, video: tuple[int, ...]) -> base.Cost:
  """Returns FLOPs per clip of a `kdhiera.Distil`, from true token counts.

  Args:
    phase: the phase.
    video: (T, H, W, C) of a clip.
  """
  encoder, side = phase.encoder, unit_masks.SIDE
  units = encoder.unit_grid((1, *video))
  grid = layers.grid_of((1, *video), encoder.patch)
  trained = kept = 0.0
  for spec in phase.masks:
    counts = spec.counts(units)
    visible, masked = (side**2 * n for n in counts)
    trained += flops.train(encoder, grid, visible)
    kept += flops.activations(encoder, visible)
    for head in phase.heads.values():
      if isinstance(head, stage_heads.StageHeads):
        trained += 3 * head.flops(encoder, counts[0])
        kept += head.kept(encoder, counts[0])
      else:
        tokens = (visible, masked)
        trained += flops.train(head, grid, tokens, in_width=encoder.width)
        kept += flops.activations(head, visible + masked)
  return base.Cost(trained, teachers.cost(phase.teachers, video), kept)
