"""FLOPs of matrix products and activation memory of Hiera, in closed form.

For conventions see `flops`. Tokens are counted at the last stage.
"""

import math

from vssl_jax.models.hiera import encoder as encoder_lib
from vssl_jax.models.hiera import stages


def units(encoder: encoder_lib.Hiera, tokens: int) -> int:
  """Returns the number of mask units with `tokens` tokens at the last stage.

  Raises:
    ValueError: `tokens` is not a multiple of the tokens per unit.
  """
  size = encoder.plan()[-1].left
  if tokens % size:
    raise ValueError(
      f'found {tokens} tokens of Hiera, wanted a multiple of the {size} that '
      f'q_pool={encoder.q_pool} leaves of a unit'
    )
  return tokens // size


def embedding(encoder: encoder_lib.Hiera, count: int) -> float:
  """Returns the forward FLOPs of the convolution.

  Args:
    encoder: the network.
    count: number of visible units. (The released code runs the convolution
      over hidden units too, and published figures include this.)
  """
  pixels = math.prod(encoder.kernel) * len(encoder.mean)
  return 2.0 * count * stages.SIDE**2 * pixels * encoder.channels


def block(step: stages.Step, count: int) -> float:
  """Returns the forward FLOPs of one block.

  Args:
    step: options of the block.
    count: number of visible units.
  """
  tokens_in, tokens_out, width = (
    count * step.tokens,
    count * step.left,
    step.width,
  )
  weights = 3 * tokens_in * step.in_width * width + 9 * tokens_out * width**2
  if step.in_width != width:
    weights += tokens_in * step.in_width * width
  sources = step.tokens if step.windowed else tokens_in
  return 2.0 * (weights + 2 * tokens_out * sources * width)


def kept(step: stages.Step, remat: str) -> tuple[int, int]:
  """Returns values per unit stored for the backward pass of one block.

  The estimate is that of other blocks, see `flops.activations`. Attention
  within units also stores its weights, because it uses no fused kernel.

  Args:
    step: options of the block.
    remat: `none`, `dots` or `full`.

  Returns:
    The number of values without rematerialisation, and with `remat`.
  """
  tokens_in, tokens_out, width = step.tokens, step.left, step.width
  # Input and output of the first norm, k and v; queries, output of attention,
  # input and output of the second norm, and two arrays of the MLP.
  full = 2 * tokens_in * (step.in_width + width) + 12 * tokens_out * width
  if step.windowed:
    full += tokens_out * tokens_in * step.num_heads
  dots = 2 * tokens_in * width + 8 * tokens_out * width
  stored = {'none': full, 'dots': dots, 'full': tokens_in * step.in_width}[
    remat
  ]
  return full, stored


def fusion(tokens: int, in_width: int) -> float:
  """Returns the forward FLOPs of the multi-scale fusion in the decoder.

  Args:
    tokens: number of visible tokens, for a Hiera with two poolings.
    in_width: channels of the last stage. The first stage has an eighth of them
      and 16 times as many tokens, the second a quarter and 4 times as many.
  """
  return 2.0 * tokens * in_width * (16 * in_width // 8 + 4 * in_width // 4)
