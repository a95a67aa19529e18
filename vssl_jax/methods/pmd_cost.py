"""Cost of a PMD train step, in closed form."""

from typing import Any

from vssl_jax import flops
from vssl_jax.masks import tubelets
from vssl_jax.methods import distillation_teachers, pmd_terms
from vssl_jax.methods import phase as phase_lib
from vssl_jax.models import mvd_student as mvd_student_lib


def cost(phase: Any, video: tuple[int, ...]) -> phase_lib.Cost:
  """Returns FLOPs per clip of a `pmd.Distil`, from actual token counts.

  Args:
    phase: the phase.
    video: (T, H, W, C) of a clip.
  """
  student = phase.student
  encoder, width = student.encoder, student.encoder.width
  grid = tubelets.grid_of((1, *video), encoder.patch)
  trained = activations = frozen = 0.0
  for spec in phase.masks:
    visible, masked = spec.counts(grid)
    trained += flops.train(encoder, grid, visible)
    activations += flops.activations(encoder, visible)
    for head in student.decoder.values():
      trained += flops.train(head, grid, (visible, masked), in_width=width)
      activations += flops.activations(head, visible + masked)
    for align in phase.align.values():
      maps = len(pmd_terms.aligned(encoder.depth))
      trained += 3 * 2.0 * visible * width * align.out_width * maps
  for spec, current in zip(phase.previous_masks, phase.masks, strict=False):
    frozen += _guide(student, spec.counts(grid), current.counts(grid), grid)
  teachers = {n: t for n, t in phase.teachers.items() if n != 'previous'}
  frozen += distillation_teachers.cost(teachers, video)
  return phase_lib.Cost(trained, frozen, activations)


def _guide(
  student: mvd_student_lib.Student,
  before: tuple[int, int],
  now: tuple[int, int],
  grid: tubelets.Grid,
) -> float:
  """Returns the FLOPs of the previous student under its own mask."""
  width = student.encoder.width
  total = flops.forward(student.encoder, grid, before[0])
  for head in student.decoder.values():
    total += flops.forward(head, grid, before, in_width=width)
    # Its heads predict the patches masked for the current student.
    total += 2.0 * (now[1] - before[1]) * head.out_width * head.width
  return total
