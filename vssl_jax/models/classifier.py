"""Fine-tuning head: mean over tokens, layer norm, one linear layer."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vssl_jax.models import layers


class Classifier(nn.Module):
  """Mean over tokens, layer norm, dropout, one linear layer.

  Source: the fine-tuning code of VideoMAE and MVD, `run_class_finetuning.py`.
  Hiera's code has the same layers with other initial values.

  Attributes:
    classes: number of logits.
    dropout: dropout rate of the linear layer's input.
    scale: factor of the linear layer's initial weights and biases.
    init_family: family of initial values, see `layers.kernel_init`.
    norm_eps: added to the variance in the layer norm.
  """

  classes: int
  dropout: float = 0.0
  scale: float = 0.001
  init_family: str = 'vjepa'
  norm_eps: float = 1e-6

  @nn.compact
  def __call__(
    self, tokens: Float[Array, 'B N D'], deterministic: bool = True
  ) -> Float[Array, 'B K']:
    """Returns logits, float32.

    Args:
      tokens: output of the encoder, without a final norm.
      deterministic: no dropout.
    """
    x = jnp.mean(tokens.astype(jnp.float32), axis=1)
    bias = layers.bias_init(self.init_family)
    x = layers.layer_norm('norm', self.norm_eps, bias=bias)(x)
    x = nn.Dropout(self.dropout)(x, deterministic=deterministic)

    def scaled(init: layers.Initializer) -> layers.Initializer:
      return lambda *args: self.scale * init(*args)

    return layers.dense(
      self.classes,
      'head',
      kernel=scaled(layers.kernel_init(self.init_family, 'head')),
      bias=scaled(bias),
      dtype='float32',
    )(x)


def flops(width: int, classes: int) -> float:
  """Returns the FLOPs of the linear layer's forward pass for one clip."""
  return 2.0 * width * classes
