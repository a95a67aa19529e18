"""What a step of PMD costs, by closed forms."""

from typing import Any

from vssl_jax import flops
from vssl_jax.methods import base, difficulty, teachers
from vssl_jax.models import layers
from vssl_jax.models import student as student_lib


def cost(phase: Any, video: tuple[int, ...]) -> base.Cost:
  """Returns FLOPs per clip of a `pmd.Distil`, from true token counts.

  Args:
    phase: the phase.
    video: (T, H, W, C) of a clip.
  """
  student = phase.student
  encoder, width = student.encoder, student.encoder.width
  grid = layers.grid_of((1, *video), encoder.patch)
  trained = kept = frozen = 0.0
  for spec in phase.masks:
    visible, masked = spec.counts(grid)
    trained += flops.train(encoder, grid, visible)
    kept += flops.activations(encoder, visible)
    for head in student.decoder.values():
      trained += flops.train(head, grid, (visible, masked), in_width=width)
      kept += flops.activations(head, visible + masked)
    for align in phase.align.values():
      maps = len(difficulty.aligned(encoder.depth))
      trained += 3 * 2.0 * visible * width * align.out_width * maps
  for spec, now in zip(phase.previous_masks, phase.masks, strict=False):
    frozen += _guide(student, spec.counts(grid), now.counts(grid), grid)
  outside = {n: t for n, t in phase.teachers.items() if n != 'previous'}
  frozen += teachers.cost(outside, video)
  return base.Cost(trained, frozen, kept)


def _guide(
  student: student_lib.Student,
  before: tuple[int, int],
  now: tuple[int, int],
  grid: layers.Grid,
) -> float:
  """Returns the FLOPs of the previous student under its own mask."""
  width = student.encoder.width
  total = flops.forward(student.encoder, grid, before[0])
  for head in student.decoder.values():
    total += flops.forward(head, grid, before, in_width=width)
    # Its heads predict what is masked now.
    total += 2.0 * (now[1] - before[1]) * head.out_width * head.width
  return total
