"""MVD's student: an encoder, and a decoder for every teacher."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from vssl_jax import masking
from vssl_jax.models import layers


class Output(NamedTuple):
  """What a student makes of a clip under a mask.

  Attributes:
    features: residual stream of the visible tokens, [B, V, D] each: embedded,
      then after every block; no final norm.
    predicted: teacher -> float32 [B, K, D_t].
  """

  features: tuple[Array, ...]
  predicted: dict[str, Array]


class Student(nn.Module):
  """One encoder over the visible tokens, and decoders beside each other.

  Parameters are `encoder` and `decoder_<teacher>`.

  Attributes:
    encoder: (video, visible) -> tokens.
    decoder: teacher -> (tokens, mask, grid) -> its features.
  """

  encoder: nn.Module
  decoder: Mapping[str, nn.Module]

  def __call__(
    self,
    video: Num[Array | np.ndarray, 'B T H W C'],
    mask: masking.Mask | None = None,
    *,
    at: Int[Array, 'B K'] | None = None,
    deterministic: bool = True,
  ) -> Output:
    """Predicts the features of every teacher.

    Args:
      video: uint8, or floats in [0, 1].
      mask: what is visible, and what is predicted; None: all of both.
      at: flat indices of the tokens to predict instead.
      deterministic: no drop path.
    """
    grid = layers.grid_of(video.shape, self.encoder.patch)
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
  batch: int, grid: layers.Grid
) -> tuple[masking.Mask, Int[Array, 'B N']]:
  n = grid[0] * grid[1] * grid[2]
  tokens = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (batch, n))
  return masking.Mask(tokens, tokens[:, :0]), tokens


class Alignment(nn.Module):
  """A linear map of its own for each layer of the student, to one teacher.

  Attributes:
    out_width: channels of the teacher.
    dtype: of the matrix products.
  """

  out_width: int
  dtype: str = 'bfloat16'

  @nn.compact
  def __call__(
    self, features: Mapping[int, Float[Array, 'B V D']]
  ) -> dict[int, Any]:
    """Returns layer -> float32 [B, V, out_width], of the layers given.

    Args:
      features: layer (from 1) -> what that block made.
    """
    kernel = layers.kernel_init('videomae', 'head')
    return {
      layer: layers.dense(
        self.out_width, f'layer_{layer:02d}', kernel=kernel, dtype=self.dtype
      )(x).astype(jnp.float32)
      for layer, x in features.items()
    }
