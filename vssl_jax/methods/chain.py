"""Methods one after another in one run: each has phases of its own."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float

from vssl_jax import rngs
from vssl_jax.methods import base


@dataclasses.dataclass(frozen=True)
class Chain(base.Method):
  """A method whose phases are those of its parts, in their order.

  What is asked of a phase is answered by the part that it comes from.

  Attributes:
    parts: methods; a teacher `@phase` may be of an earlier part.
  """

  parts: tuple[base.Method, ...]

  def phases(self) -> tuple[base.Phase, ...]:
    """Returns the phases of all parts."""
    return tuple(phase for part in self.parts for phase in part.phases())

  def _of(self, phase: base.Phase) -> base.Method:
    """Returns the part that a phase comes from; names are unique in a run."""
    return next(
      part
      for part in self.parts
      if phase.name in [own.name for own in part.phases()]
    )

  def init(
    self, rng: Array, video: base.Video, phase: base.Phase
  ) -> base.Params:
    """See `base.Method`."""
    return self._of(phase).init(rng, video, phase)

  def targets(
    self, teachers: Mapping[str, Any], video: base.Video, phase: base.Phase
  ) -> Mapping[str, Float[Array, 'B ...']]:
    """See `base.Method`."""
    return self._of(phase).targets(teachers, video, phase)

  def loss(
    self,
    params: base.Params,
    teachers: Mapping[str, Any],
    batch: Mapping[str, Any],
    rng: rngs.Rng,
    phase: base.Phase,
  ) -> tuple[Float[Array, ''], base.Aux]:
    """See `base.Method`."""
    return self._of(phase).loss(params, teachers, batch, rng, phase)

  def cost(self, phase: base.Phase, video: tuple[int, ...]) -> base.Cost:
    """See `base.Method`."""
    return self._of(phase).cost(phase, video)

  def encode(
    self,
    params: base.Params,
    video: base.Video,
    depth: float | None = None,
    phase: base.Phase | None = None,
  ) -> Float[Array, 'B N D']:
    """See `base.Method`."""
    phase = phase or self.phases()[-1]
    return self._of(phase).encode(params, video, depth, phase)

  def masks(
    self,
    teachers: Mapping[str, Any],
    batch: Mapping[str, Any],
    rng: rngs.Rng,
    phase: base.Phase,
  ) -> Mapping[str, base.Seen]:
    """See `base.Method`."""
    return self._of(phase).masks(teachers, batch, rng, phase)

  def reconstruct(
    self,
    params: base.Params,
    batch: Mapping[str, Any],
    rng: rngs.Rng,
    phase: base.Phase,
  ) -> Mapping[str, base.Reconstruction]:
    """See `base.Method`."""
    return self._of(phase).reconstruct(params, batch, rng, phase)


def of(*parts: base.Method) -> base.Method:
  """Returns a run's method; parts without phases are left out."""
  parts = tuple(part for part in parts if part.phases())
  return parts[0] if len(parts) == 1 else Chain(parts)
