"""Options of each block of Hiera: stage, width, pooling and attention range."""

from collections.abc import Sequence
from typing import NamedTuple

# Whether a stage attends within units. The first block of a stage uses the
# value of the previous stage. Source: Hiera, arXiv 2306.00989, released code.
WINDOWED = (True, True, False, False)
LEVELS = len(WINDOWED) - 1
SIDE = 2**LEVELS  # side of a unit, in tokens of the first stage


class Step(NamedTuple):
  """Options of one block.

  Attributes:
    stage: index of the stage, from 0.
    in_width: channels of the input tokens.
    width: channels of the output tokens.
    num_heads: attention heads.
    pooled: whether each four tokens are pooled to one.
    windowed: whether tokens attend within their unit only.
    tokens: number of input tokens per unit.
  """

  stage: int
  in_width: int
  width: int
  num_heads: int
  pooled: bool
  windowed: bool
  tokens: int

  @property
  def left(self) -> int:
    """Number of output tokens per unit."""
    return self.tokens // 4 if self.pooled else self.tokens


def of(
  channels: int, depths: Sequence[int], num_heads: int, q_pool: int
) -> tuple[Step, ...]:
  """Returns the options of each block.

  Args:
    channels: channels of the first stage.
    depths: number of blocks of each stage.
    num_heads: attention heads of the first stage.
    q_pool: number of stages that begin with pooling.

  Raises:
    ValueError: `depths` does not have four stages, or `q_pool` is not 0 to 3.
  """
  if len(depths) != len(WINDOWED) or min(depths) < 1:
    raise ValueError(
      f'depths is {depths}, wanted blocks of {len(WINDOWED)} stages'
    )
  if not 0 <= q_pool <= LEVELS:
    raise ValueError(f'q_pool is {q_pool}, wanted 0 to {LEVELS}')
  steps: list[Step] = []
  width, tokens = channels, SIDE**2
  for stage, count in enumerate(depths):
    for i in range(count):
      first = stage > 0 and i == 0
      step = Step(
        stage=stage,
        in_width=width,
        width=channels * 2**stage,
        num_heads=num_heads * 2**stage,
        pooled=first and stage <= q_pool,
        windowed=WINDOWED[stage - 1 if first else stage],
        tokens=tokens,
      )
      steps.append(step)
      width, tokens = step.width, step.left
  return tuple(steps)
