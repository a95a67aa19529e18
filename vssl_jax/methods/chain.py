"""Runs several methods one after another in one run."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float

from vssl_jax import rngs
from vssl_jax.methods import phase as phase_lib


@dataclasses.dataclass(frozen=True)
class Chain(phase_lib.Method):
  """A method that concatenates the phases of several methods.

  Calls for a phase are forwarded to the method that the phase belongs to.

  Attributes:
    parts: methods, in order; a teacher `@phase` may refer to a phase of an
      earlier part.
  """

  parts: tuple[phase_lib.Method, ...]

  def phases(self) -> tuple[phase_lib.Phase, ...]:
    """Returns the phases of all parts."""
    return tuple(phase for part in self.parts for phase in part.phases())

  def _of(self, phase: phase_lib.Phase) -> phase_lib.Method:
    """Returns the part of a phase, by its name; names are unique in a run."""
    return next(
      part
      for part in self.parts
      if phase.name in [candidate.name for candidate in part.phases()]
    )

  def init(
    self, rng: Array, video: phase_lib.Video, phase: phase_lib.Phase
  ) -> phase_lib.Params:
    """See `phase.Method`."""
    return self._of(phase).init(rng, video, phase)

  def targets(
    self,
    teachers: Mapping[str, Any],
    video: phase_lib.Video,
    phase: phase_lib.Phase,
  ) -> Mapping[str, Float[Array, 'B ...']]:
    """See `phase.Method`."""
    return self._of(phase).targets(teachers, video, phase)

  def loss(
    self,
    params: phase_lib.Params,
    teachers: Mapping[str, Any],
    batch: Mapping[str, Any],
    rng: rngs.Rng,
    phase: phase_lib.Phase,
  ) -> tuple[Float[Array, ''], phase_lib.Aux]:
    """See `phase.Method`."""
    return self._of(phase).loss(params, teachers, batch, rng, phase)

  def cost(
    self, phase: phase_lib.Phase, video: tuple[int, ...]
  ) -> phase_lib.Cost:
    """See `phase.Method`."""
    return self._of(phase).cost(phase, video)

  def encode(
    self,
    params: phase_lib.Params,
    video: phase_lib.Video,
    depth: float | None = None,
    phase: phase_lib.Phase | None = None,
  ) -> Float[Array, 'B N D']:
    """See `phase.Method`."""
    phase = phase or self.phases()[-1]
    return self._of(phase).encode(params, video, depth, phase)

  def masks(
    self,
    teachers: Mapping[str, Any],
    batch: Mapping[str, Any],
    rng: rngs.Rng,
    phase: phase_lib.Phase,
  ) -> Mapping[str, phase_lib.Seen]:
    """See `phase.Method`."""
    return self._of(phase).masks(teachers, batch, rng, phase)

  def reconstruct(
    self,
    params: phase_lib.Params,
    batch: Mapping[str, Any],
    rng: rngs.Rng,
    phase: phase_lib.Phase,
  ) -> Mapping[str, phase_lib.Reconstruction]:
    """See `phase.Method`."""
    return self._of(phase).reconstruct(params, batch, rng, phase)


def of(*parts: phase_lib.Method) -> phase_lib.Method:
  """Returns the method of a run; parts without phases are left out."""
  parts = tuple(part for part in parts if part.phases())
  return parts[0] if len(parts) == 1 else Chain(parts)
