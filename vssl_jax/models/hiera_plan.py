"""What each block of Hiera does: stages, pooling, and where tokens attend."""

from collections.abc import Sequence
from typing import NamedTuple

# Which stages attend within units. The first block of a stage still does as
# the stage before it. Source: Hiera, arXiv 2306.00989, released code.
WINDOWED = (True, True, False, False)
LEVELS = len(WINDOWED) - 1
SIDE = 2**LEVELS  # of a unit, in tokens of the first stage


class Step(NamedTuple):
  """What differs between the blocks.

  Attributes:
    stage: from 0.
    in_width: channels of the tokens that come in.
    width: channels of those that go out.
    num_heads: attention heads.
    pooled: whether four tokens become one.
    windowed: whether tokens attend within their unit only.
    tokens: of a unit that come in.
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
    """Tokens of a unit that go out."""
    return self.tokens // 4 if self.pooled else self.tokens


def of(
  channels: int, depths: Sequence[int], num_heads: int, q_pool: int
) -> tuple[Step, ...]:
  """Returns what each block does.

  Args:
    channels: of the first stage.
    depths: blocks of each stage.
    num_heads: of the first stage.
    q_pool: stages that begin by pooling.

  Raises:
    ValueError: other than four stages, or more poolings than between them.
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
