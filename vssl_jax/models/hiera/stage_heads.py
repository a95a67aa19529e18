"""Heads that map the outputs of Hiera's stages to the tokens of a teacher.

Each head reduces the output of a stage for a mask unit to the 2 x 2 tokens that
the teacher has in this unit. It is a convolution with stride equal to its
kernel, so units do not mix; a neighbouring unit can be hidden.
"""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from vssl_jax.masks import hiera_units, sampling, tubelets
from vssl_jax.models import layers, positions
from vssl_jax.models.hiera import encoder as encoder_lib
from vssl_jax.models.hiera import token_order

POSITIONS = 'sincos_3d_mvd'  # table of `head_pos`


class StageHeads(nn.Module):
  """Heads of one teacher: P = LN(Proj(LN(S))).

  Attributes:
    stages: name of a head -> stage of its input, from 1.
    out_width: channels of the teacher.
    head_pos: whether fixed positions are added to the normed tokens of a
      stage.
    norm_eps: added to variances in layer norms.
    dtype: dtype of matrix products.
  """

  stages: Mapping[str, int]
  out_width: int
  head_pos: bool = False
  norm_eps: float = 1e-6
  dtype: str = 'bfloat16'

  @nn.nowrap
  def flops(self, encoder: encoder_lib.Hiera, units: int) -> float:
    """Returns the forward FLOPs of one clip's heads.

    Args:
      encoder: encoder of the stages.
      units: number of visible units.
    """
    # Each stage maps to its last block.
    steps = {step.stage: step for step in encoder.plan()}
    sizes = [steps[stage - 1] for stage in self.stages.values()]
    values = sum(step.left * step.width for step in sizes)
    return 2.0 * units * values * self.out_width

  def kept(self, encoder: encoder_lib.Hiera, units: int) -> float:
    """Estimates the bytes of activations stored for a clip's backward pass.

    For each head these are the normed tokens of its stage and their
    projection, in the dtype of activations, and the float32 output. Arguments
    as in `flops`.
    """
    steps = {step.stage: step for step in encoder.plan()}
    size = 2 if self.dtype == 'bfloat16' else 4
    total = 0
    for stage in self.stages.values():
      step = steps[stage - 1]
      total += size * step.left * step.width
      total += (size + 4) * hiera_units.SIDE**2 * self.out_width
    return float(units * total)

  @nn.compact
  def __call__(
    self,
    ends: Sequence[Float[Array, 'B K 1 _ _ _']],
    mask: sampling.Mask,
    unit_grid: tubelets.Grid,
  ) -> dict[str, Float[Array, 'B 4*K D']]:
    """Returns name of a head -> float32 tokens, ordered as `expand_units`.

    Args:
      ends: outputs of the four stages, for the visible units.
      mask: mask with the indices of these units.
      unit_grid: units of the whole clip along (time, height, width).
    """
    outputs = {}
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
      )(token_order.cells(x, hiera_units.SIDE))
      outputs[name] = layers.layer_norm(f'{name}_out', self.norm_eps)(x)
    return outputs


def _positions(
  shape: tuple[int, ...], units: Int32[Array, 'B K'], unit_grid: tubelets.Grid
) -> Float[Array, 'B K 1 h w C']:
  """Returns the position embeddings of the tokens of a stage."""
  t, rows, columns = unit_grid
  h, w, channels = shape[3:]
  table = positions.TABLES[POSITIONS]((t, rows * h, columns * w), channels)
  table = table.reshape(t, rows, h, columns, w, channels)
  table = table.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 1, h, w, channels)
  return jnp.asarray(table)[units]
