"""MVD's student: an encoder and one decoder per teacher."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from vssl_jax.masks import sampling, tubelets
from vssl_jax.models import layers


class Output(NamedTuple):
  """Features and predictions of a student for masked clips.

  Attributes:
    features: visible tokens [B, V, D] of the residual stream: embedded, then
      after every block; without the final norm.
    predicted: teacher -> predictions, float32 [B, K, D_t].
  """

  features: tuple[Array, ...]
  predicted: dict[str, Array]


class Student(nn.Module):
  """One encoder of the visible tokens, and one decoder per teacher.

  Parameters are `encoder` and `decoder_<teacher>`.

  Attributes:
    encoder: (video, visible) -> tokens.
    decoder: teacher -> decoder: (tokens, mask, grid) -> features of the
      teacher.
  """

  encoder: nn.Module
  decoder: Mapping[str, nn.Module]

  def __call__(
    self,
    video: Num[Array | np.ndarray, 'B T H W C'],
    mask: sampling.Mask | None = None,
    *,
    at: Int[Array, 'B K'] | None = None,
    deterministic: bool = True,
  ) -> Output:
    """Predicts the features of every teacher.

    Args:
      video: uint8, or floats in [0, 1].
      mask: visible tokens and tokens to predict; None: all tokens are visible
        and all are predicted.
      at: flat indices of the tokens to predict, instead of `mask.masked`.
      deterministic: no drop path.
    """
    grid = tubelets.grid_of(video.shape, self.encoder.patch)
    if mask is None:
      mask, at = _everything(len(video), grid)
    *features, tokens = self.encoder(
      video,
      mask.visible,
      features=True,
      normed=True,
      deterministic=deterministic,
    )
    predicted = {
      name: decoder(tokens, mask, grid, at=at, deterministic=deterministic)
      for name, decoder in self.decoder.items()
    }
    return Output(tuple(features), predicted)


def _everything(
  batch: int, grid: tubelets.Grid
) -> tuple[sampling.Mask, Int[Array, 'B N']]:
  n = grid[0] * grid[1] * grid[2]
  tokens = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (batch, n))
  return sampling.Mask(tokens, tokens[:, :0]), tokens


class Alignment(nn.Module):
  """Linear maps to one teacher, one for each layer of the student.

  Attributes:
    out_width: channels of the teacher.
    dtype: dtype of the matrix products.
  """

  out_width: int
  dtype: str = 'bfloat16'

  @nn.compact
  def __call__(
    self, features: Mapping[int, Float[Array, 'B V D']]
  ) -> dict[int, Any]:
    """Returns layer -> float32 [B, V, out_width], for the given layers.

    Args:
      features: layer (from 1) -> output of that block.
    """
    kernel = layers.kernel_init('videomae', 'head')
    return {
      layer: layers.dense(
        self.out_width, f'layer_{layer:02d}', kernel=kernel, dtype=self.dtype
      )(x).astype(jnp.float32)
      for layer, x in features.items()
    }
