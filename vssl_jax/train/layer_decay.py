"""Layer-wise decay: the nearer to the pixels, the smaller the learning rate.

With n blocks and decay d, block i (from 0) learns at d^(n - i) of the learning
rate, what comes before the blocks at d^(n + 1), what comes after them and all
other roles, such as the head, at the full rate. Weight decay shrinks with the
learning rate, as it does in AdamW.

Source: BEiT, arXiv 2106.08254, and the code of VideoMAE and MVD,
`optim_factory.py`. Optax has no ready one; this is a transform for its chains.
"""

import re
from typing import Any

import jax
import optax

from vssl_jax import trees

BLOCK = re.compile(r'encoder/block_(\d+)/')
# Named leaves of the encoder that stand behind its blocks.
BEHIND = ('encoder/norm/',)


def scales(params: Any, decay: float) -> Any:
  """Returns the factor on the learning rate of every leaf.

  Args:
    params: role -> tree; the role `encoder` has blocks.
    decay: factor from one block to the one before it.

  Raises:
    ValueError: there are no blocks to go by.
  """
  found = [BLOCK.match(name) for name, _ in trees.named_leaves(params)]
  if not any(found):
    raise ValueError(
      f'optim.layer_decay: found {decay}, but the encoder has no leaves named '
      'block_00 and so on; wanted 1.0 for such an encoder'
    )
  count = 1 + max(int(m[1]) for m in found if m)

  def one(name: str, _: Any) -> float:
    block = BLOCK.match(name)
    if block:
      return decay ** (count - int(block[1]))
    if not name.startswith('encoder/') or name.startswith(BEHIND):
      return 1.0
    return decay ** (count + 1)

  return trees.map_named(one, params)


def scale(decay: float) -> optax.GradientTransformation:
  """Returns what multiplies the updates of every leaf by its factor.

  Args:
    decay: see `scales`; 1.0 for none.

  Raises:
    ValueError: it is not in (0, 1].
  """
  if not 0 < decay <= 1:
    raise ValueError(
      f'optim.layer_decay: found {decay}, wanted more than 0, at most 1'
    )

  def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
    factors = scales(params, decay)
    return jax.tree.map(lambda u, f: f * u, updates, factors), state

  return optax.GradientTransformation(lambda _: optax.EmptyState(), update)
