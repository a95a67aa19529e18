"""Memory of one value per training example, inside the train state.

Arrays `[num_examples, ...]` are sharded like everything else. A step gathers
the rows of its batch, the method returns new ones, the step scatters them.
Substituted examples carry an index past the end: they read the fill value and
write nowhere.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from vssl_jax.methods import base

# Suffix of the copy as it stood at the last window end.
WINDOW = '@window'


def init(
  specs: Mapping[str, base.RowSpec], num_examples: int
) -> dict[str, Array]:
  """Returns every row, and its window copy if it has one, at the fill value."""
  names = [
    name + suffix
    for name, spec in specs.items()
    for suffix in ('', WINDOW)[: 2 if spec.window else 1]
  ]
  return {name: _full(specs, name, num_examples) for name in names}


def _full(
  specs: Mapping[str, base.RowSpec], name: str, num_examples: int
) -> Array:
  spec = specs[name.removesuffix(WINDOW)]
  return jnp.full((num_examples, *spec.shape), spec.fill, spec.dtype)


def gather(
  specs: Mapping[str, base.RowSpec],
  rows: Mapping[str, Array],
  batch: Mapping[str, Any],
) -> dict[str, Array]:
  """Returns `rows/<name>` (and `@window`) of the batch, float32 [B, ...]."""
  return {
    f'rows/{name}': jnp.take(
      memory,
      batch['index'],
      axis=0,
      mode='fill',
      fill_value=specs[name.removesuffix(WINDOW)].fill,
    ).astype(jnp.float32)
    for name, memory in rows.items()
  }


def scatter(
  specs: Mapping[str, base.RowSpec],
  rows: Mapping[str, Array],
  batch: Mapping[str, Any],
  new: Mapping[str, Array],
  done: Any,
) -> dict[str, Array]:
  """Returns the rows with the batch's examples replaced by `new`.

  Args:
    specs: what the phase declares.
    rows: `[num_examples, ...]` each.
    batch: needs `index` [B]; indices past the end are not written.
    new: name -> [B, ...].
    done: steps of the phase finished after this one; a window copy is
      refreshed where its length divides them.

  Raises:
    ValueError: the loss returned other rows than the phase declares.
  """
  if set(new) != set(specs):
    raise ValueError(
      f'the loss returned rows {sorted(new)} and the phase declares '
      f'{sorted(specs)}'
    )
  out = dict(rows)
  for name, value in new.items():
    out[name] = (
      rows[name]
      .at[batch['index']]
      .set(_stored(value, rows[name].dtype), mode='drop')
    )
    window = specs[name].window
    if window:
      copy = name + WINDOW
      out[copy] = jnp.where(done % window == 0, out[name], rows[copy])
  return out


def _stored(value: Array, dtype: Any) -> Array:
  """Returns values as they are stored: what is too large is the largest."""
  limit = float(jnp.finfo(dtype).max)
  return jnp.clip(value, -limit, limit).astype(dtype)
