"""Matrix FLOPs of Hiera and what its backward pass keeps, by closed form.

`flops` says what is counted. Tokens are those of the last stage.
"""

import math

from vssl_jax.models import hiera, hiera_plan


def units(encoder: hiera.Hiera, tokens: int) -> int:
  """Returns how many mask units have so many tokens.

  Raises:
    ValueError: no whole number of them.
  """
  left = encoder.plan()[-1].left
  if tokens % left:
    raise ValueError(
      f'found {tokens} tokens of Hiera, wanted a multiple of the {left} that '
      f'q_pool={encoder.q_pool} leaves of a unit'
    )
  return tokens // left


def embedding(encoder: hiera.Hiera, count: int) -> float:
  """Returns the forward FLOPs of the convolution.

  Args:
    encoder: the network.
    count: units that it sees. (The released code runs it over hidden ones
      too, and published figures count that.)
  """
  pixels = math.prod(encoder.kernel) * len(encoder.mean)
  return 2.0 * count * hiera_plan.SIDE**2 * pixels * encoder.channels


def block(step: hiera_plan.Step, count: int) -> float:
  """Returns the forward FLOPs of one block.

  Args:
    step: which one.
    count: units that it sees.
  """
  before, after, width = count * step.tokens, count * step.left, step.width
  weights = 3 * before * step.in_width * width + 9 * after * width**2
  if step.in_width != width:
    weights += before * step.in_width * width
  sources = step.tokens if step.windowed else before
  return 2.0 * (weights + 2 * after * sources * width)


def kept(step: hiera_plan.Step, remat: str) -> tuple[int, int]:
  """Returns values that a unit's backward pass keeps: in whole, and by remat.

  The same estimate as for other blocks, see `flops.activations`; windows keep
  their weights of attention, which no kernel hides.

  Args:
    step: which block.
    remat: `none`, `dots` or `full`.
  """
  before, after, width = step.tokens, step.left, step.width
  # Norm's input and output, k and v; queries, attention's output, the second
  # norm's two, and the MLP's two.
  whole = 2 * before * (step.in_width + width) + 12 * after * width
  if step.windowed:
    whole += after * before * step.num_heads
  dots = 2 * before * width + 8 * after * width
  part = {'none': whole, 'dots': dots, 'full': before * step.in_width}[remat]
  return whole, part


def fusion(tokens: int, in_width: int) -> float:
  """Returns the forward FLOPs of bringing all stages to the last one's size.

  Args:
    tokens: visible, of a Hiera with two poolings.
    in_width: channels of the last stage; the first has an eighth of them, at
      16 times as many tokens, and the second a quarter, at 4 times as many.
  """
  return 2.0 * tokens * in_width * (16 * in_width // 8 + 4 * in_width // 4)
