"""From the ends of Hiera's stages to the tokens of a teacher, unit by unit.

Each head cuts what a stage made of a mask unit into the 2 x 2 tokens that a
teacher has there: a convolution whose stride is its kernel, so that nothing
of one unit, which may be beside a hidden one, enters another.
"""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from vssl_jax import masking, unit_masks
from vssl_jax.models import hiera, layers, positions, unrolled

POSITIONS = 'sincos_3d_mvd'  # of `head_pos`


class StageHeads(nn.Module):
  """Heads of one teacher: P = LN(Proj(LN(S))).

  Attributes:
    stages: name of a head -> the stage that it reads, from 1.
    out_width: channels of the teacher.
    head_pos: fixed positions are added to the normed tokens of a stage.
    norm_eps: added to variances in layer norms.
    dtype: of matrix products.
  """

  stages: Mapping[str, int]
  out_width: int
  head_pos: bool = False
  norm_eps: float = 1e-6
  dtype: str = 'bfloat16'

  @nn.nowrap
  def flops(self, encoder: hiera.Hiera, units: int) -> float:
    """Returns the forward FLOPs of one clip's heads.

    Args:
      encoder: whose stages they read.
      units: visible ones.
    """
    steps = {step.stage: step for step in encoder.plan()}  # the last of each
    sizes = [steps[stage - 1] for stage in self.stages.values()]
    values = sum(step.left * step.width for step in sizes)
    return 2.0 * units * values * self.out_width

  def kept(self, encoder: hiera.Hiera, units: int) -> float:
    """Returns an estimate of the bytes that a clip's backward pass keeps.

    The normed tokens of a stage and what becomes of them, in the type of
    activations, and the float32 output. Arguments as in `flops`.
    """
    steps = {step.stage: step for step in encoder.plan()}
    size = 2 if self.dtype == 'bfloat16' else 4
    total = 0
    for stage in self.stages.values():
      step = steps[stage - 1]
      total += size * step.left * step.width
      total += (size + 4) * unit_masks.SIDE**2 * self.out_width
    return float(units * total)

  @nn.compact
  def __call__(
    self,
    ends: Sequence[Float[Array, 'B K 1 _ _ _']],
    mask: masking.Mask,
    unit_grid: layers.Grid,
  ) -> dict[str, Float[Array, 'B 4*K D']]:
    """Returns name of a head -> float32 tokens, as `expand_units` has them.

    Args:
      ends: of the four stages, of the visible units.
      mask: which these are.
      unit_grid: units of the whole clip along (time, height, width).
    """
    found = {}
    for name, stage in self.stages.items():
      x = ends[stage - 1]
      x = layers.layer_norm(f'{name}_in', self.norm_eps, self.dtype)(x)
      if self.head_pos:
        x = x + _positions(x.shape, mask.visible, unit_grid).astype(x.dtype)
      x = layers.dense(
        self.out_width,
        name,
        kernel=layers.kernel_init('mae', 'head'),
        dtype=self.dtype,
      )(unrolled.cells(x, unit_masks.SIDE))
      found[name] = layers.layer_norm(f'{name}_out', self.norm_eps)(x)
    return found


def _positions(
  shape: tuple[int, ...], units: Int32[Array, 'B K'], unit_grid: layers.Grid
) -> Float[Array, 'B K 1 h w C']:
  """Returns where each token of a stage stands in the clip."""
  t, rows, columns = unit_grid
  h, w, channels = shape[3:]
  table = positions.TABLES[POSITIONS]((t, rows * h, columns * w), channels)
  table = table.reshape(t, rows, h, columns, w, channels)
  table = table.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 1, h, w, channels)
  return jnp.asarray(table)[units]
