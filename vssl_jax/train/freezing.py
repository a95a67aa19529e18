"""Freezing is one tree of labels, used twice.

`stop` cuts the gradient inside the loss, so that the backward pass of frozen
parts is never computed; the optimizer's `multi_transform` gives frozen leaves
no update and no state. Either alone is wrong: without the first the gradients
are computed for the global norm, without the second momentum and weight decay
go on moving frozen weights.
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


def stop(params: Any, labels: Any) -> Any:
  """Returns the parameters with the gradient of frozen leaves cut."""
  return jax.tree.map(
    lambda x, label: jax.lax.stop_gradient(x) if label == FREEZE else x,
    params,
    labels,
  )
