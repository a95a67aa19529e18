"""Freezes parameters by one label tree, in the loss and in the optimizer.

`split` and `join` exclude frozen leaves from differentiation, so that their
backward pass is not computed and their gradients are not stored. The
optimizer's `multi_transform` gives them no update and no state. Both are
needed: without the first, gradients are computed for the global norm; without
the second, momentum and weight decay still change frozen weights.
"""

from collections.abc import Sequence
from typing import Any

import jax

from vssl_jax import trees

TRAIN, FREEZE = 'train', 'freeze'


def labels(params: Any, frozen: Sequence[str]) -> Any:
  """Returns the label tree: `train` or `freeze` for every leaf.

  Args:
    params: parameters or their shapes.
    frozen: regular expressions over names such as `encoder/block_00`.

  Raises:
    ValueError: a pattern matches nothing, or nothing is left to train.
  """
  names = [name for name, _ in trees.named_leaves(params)]
  is_frozen = trees.matcher(frozen, names, 'phase.frozen')
  if all(is_frozen(name) for name in names):
    raise ValueError(f'phase.frozen={tuple(frozen)} leaves nothing to train')
  return trees.map_named(
    lambda name, _: FREEZE if is_frozen(name) else TRAIN, params
  )


def split(tree: Any, labels: Any) -> tuple[Any, Any]:
  """Splits a tree into (trained, frozen), with None for the other leaves."""

  def select(chosen: str) -> Any:
    return jax.tree.map(
      lambda x, label: x if label == chosen else None, tree, labels
    )

  return select(TRAIN), select(FREEZE)


def join(trained: Any, frozen: Any) -> Any:
  """Merges the two trees of `split`."""
  return jax.tree.map(
    lambda t, f: f if t is None else t,
    trained,
    frozen,
    is_leaf=lambda x: x is None,
  )


def store(params: Any, labels: Any, dtype: str) -> Any:
  """Casts frozen matrices to another dtype.

  Vectors are not cast: norms are computed in float32.
  """

  def cast(x: Any, label: str) -> Any:
    return x.astype(dtype) if label == FREEZE and x.ndim > 1 else x

  return jax.tree.map(cast, params, labels)
