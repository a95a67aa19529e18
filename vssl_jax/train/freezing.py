"""Freezing is one tree of labels, used twice.

`split` and `join` keep frozen leaves out of what the loss is differentiated
by, so that their backward pass is never computed and no gradient of them is
stored; the optimizer's `multi_transform` gives them no update and no state.
Either alone is wrong: without the first the gradients are computed for the
global norm, without the second momentum and weight decay go on moving frozen
weights.
"""

from collections.abc import Sequence
from typing import Any

import jax

from vssl_jax import trees

TRAIN, FREEZE = 'train', 'freeze'


def labels(params: Any, frozen: Sequence[str]) -> Any:
  """Returns the tree of labels: every leaf `train` or `freeze`.

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
  """Returns the trained leaves and the frozen ones, None where the other is."""

  def only(wanted: str) -> Any:
    return jax.tree.map(
      lambda x, label: x if label == wanted else None, tree, labels
    )

  return only(TRAIN), only(FREEZE)


def join(trained: Any, frozen: Any) -> Any:
  """Returns the whole tree again."""
  return jax.tree.map(
    lambda t, f: f if t is None else t,
    trained,
    frozen,
    is_leaf=lambda x: x is None,
  )


def store(params: Any, labels: Any, dtype: str) -> Any:
  """Returns the parameters with frozen matrices in another type.

  Vectors stay as they are: norms are computed in float32.
  """

  def one(x: Any, label: str) -> Any:
    return x.astype(dtype) if label == FREEZE and x.ndim > 1 else x

  return jax.tree.map(one, params, labels)
