"""Memory of one array per training example, inside the train state.

Arrays `[E, ...]` are split over their examples, by every device that there is:
each holds some examples whole. A step gathers the rows of its batch, the loss
returns new ones, the step scatters them. Only rows of a batch travel: each
device looks up, and writes, what it owns of the whole batch's indices.

Substituted clips carry an index past the last example: they read the fill
value and write nowhere. So does a whole batch whose step is not taken.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int, Shaped

from vssl_jax import sharding
from vssl_jax.methods import base

# Suffix of the copy as it stood at the last window end.
WINDOW = '@window'
# Places are made for a multiple of so many examples, so that shapes do not
# depend on how many devices share them.
ROUND = 1024
ALL = ('data', 'fsdp')


def places(num_examples: int) -> int:
  """Returns for how many examples there is room, E."""
  return -(-num_examples // ROUND) * ROUND


def bytes_per_example(specs: Mapping[str, base.RowSpec]) -> int:
  """Returns what the memory of one example takes, window copies included."""
  return sum(
    math.prod(spec.shape)
    * jnp.dtype(spec.dtype).itemsize
    * (2 if spec.window else 1)
    for spec in specs.values()
  )


def init(
  specs: Mapping[str, base.RowSpec], num_examples: int
) -> dict[str, Array]:
  """Returns every row, and its window copy if it has one, at the fill value."""
  return {
    name + suffix: jnp.full(
      (places(num_examples), *spec.shape), spec.fill, spec.dtype
    )
    for name, spec in specs.items()
    for suffix in ('', WINDOW)[: 2 if spec.window else 1]
  }


def gather(
  specs: Mapping[str, base.RowSpec],
  rows: Mapping[str, Array],
  index: Int[Array, 'B'],
  num_examples: int,
) -> dict[str, Array]:
  """Returns `rows/<name>` (and `@window`) of the batch, float32 [B, ...].

  Args:
    specs: what the phase declares.
    rows: from `init`.
    index: examples; those past the last read the fill value.
    num_examples: how many there are.
  """
  out = {}
  for name, memory in rows.items():
    found = _look_up(memory, index).astype(jnp.float32)
    known = index < num_examples
    known = known.reshape(-1, *(1 for _ in found.shape[1:]))
    fill = specs[name.removesuffix(WINDOW)].fill
    out[f'rows/{name}'] = jnp.where(known, found, jnp.float32(fill))
  return out


def scatter(
  specs: Mapping[str, base.RowSpec],
  rows: Mapping[str, Array],
  index: Int[Array, 'B'],
  new: Mapping[str, Array],
  num_examples: int,
) -> dict[str, Array]:
  """Returns the rows with the batch's examples replaced by `new`.

  Args:
    specs: what the phase declares.
    rows: from `init`; window copies stay as they are.
    index: examples, none twice; those past the last are not written.
    new: name -> [B, ...].
    num_examples: how many there are.

  Raises:
    ValueError: the loss returned other rows than the phase declares.
  """
  wanted = {k: (*index.shape, *spec.shape) for k, spec in specs.items()}
  found = {k: tuple(x.shape) for k, x in new.items()}
  if found != wanted:
    raise ValueError(
      f'the loss returned rows {found} and the phase declares {wanted}'
    )
  index = jnp.where(index < num_examples, index, jnp.iinfo(jnp.int32).max)
  out = dict(rows)
  for name, value in new.items():
    out[name] = _write(rows[name], index, _stored(value, rows[name].dtype))
  return out


def end_windows(
  specs: Mapping[str, base.RowSpec], rows: Mapping[str, Array], done: int
) -> dict[str, Array]:
  """Returns the rows with those copies renewed whose window ends now.

  A program of its own, once per window: a step that chose between old and new
  would read and write every example.

  Args:
    specs: what the phase declares.
    rows: from `init`; copies that are renewed are donated.
    done: steps of the phase so far.
  """
  due = [
    k for k, s in specs.items() if s.window and done and done % s.window == 0
  ]
  copies = _copied([rows[k] for k in due], [rows[k + WINDOW] for k in due])
  return dict(rows) | {k + WINDOW: x for k, x in zip(due, copies, strict=True)}


@functools.partial(jax.jit, donate_argnums=1, keep_unused=True)
def _copied(values: list[Array], old: list[Array]) -> list[Array]:
  """Returns copies of values, in the memory of the old ones."""
  del old
  return [jnp.copy(x) for x in values]


def _stored(value: Array, dtype: Any) -> Array:
  """Returns values as they are stored: what is too large is the largest."""
  limit = float(jnp.finfo(dtype).max)
  return jnp.clip(value, -limit, limit).astype(dtype)


def _look_up(
  memory: Shaped[Array, 'E ...'], index: Int[Array, 'B']
) -> Shaped[Array, 'B ...']:
  """Returns the memory of some examples, split like the batch."""
  mesh = sharding.mesh_of_step()
  if mesh is None:
    return jnp.take(memory, index, axis=0, mode='clip')
  axes = sharding.example_axes(memory.shape[0], mesh.shape)

  def own(memory: Array, index: Array) -> Array:
    if not axes:
      return jnp.take(memory, index, axis=0, mode='clip')
    asked = jax.lax.all_gather(index, axes, tiled=True)
    here = asked - jax.lax.axis_index(axes) * memory.shape[0]
    # All but the owner answer with zeros, so a sum is what the owner has.
    found = jnp.take(memory, here, axis=0, mode='clip')
    mine = (here >= 0) & (here < memory.shape[0])
    mine = mine.reshape(-1, *(1 for _ in found.shape[1:]))
    found = jnp.where(mine, found, jnp.zeros_like(found))
    return jax.lax.psum_scatter(found, axes, tiled=True)

  return jax.shard_map(
    own,
    in_specs=(PartitionSpec(axes or None), PartitionSpec(ALL)),
    out_specs=PartitionSpec(ALL),
    check_vma=False,
  )(memory, index)


def _write(
  memory: Shaped[Array, 'E ...'],
  index: Int[Array, 'B'],
  value: Shaped[Array, 'B ...'],
) -> Shaped[Array, 'E ...']:
  """Returns the memory with some examples replaced; others keep every bit."""
  mesh = sharding.mesh_of_step()
  if mesh is None:
    return _replaced(memory, index, value)
  axes = sharding.example_axes(memory.shape[0], mesh.shape)

  def own(memory: Array, index: Array, value: Array) -> Array:
    # To every device: those that hold the same examples stay the same.
    index, value = (
      jax.lax.all_gather(x, ALL, tiled=True) for x in (index, value)
    )
    if axes:
      index = index - jax.lax.axis_index(axes) * memory.shape[0]
    return _replaced(memory, index, value)

  at = PartitionSpec(axes or None)
  return jax.shard_map(
    own,
    in_specs=(at, PartitionSpec(ALL), PartitionSpec(ALL)),
    out_specs=at,
    check_vma=False,
  )(memory, index, value)


def _replaced(memory: Array, index: Array, value: Array) -> Array:
  """Writes where an index lies inside; a negative one must not count back."""
  inside = (index >= 0) & (index < memory.shape[0])
  past = memory.shape[0] + jnp.arange(index.size, dtype=index.dtype)
  return memory.at[jnp.where(inside, index, past)].set(
    value, mode='drop', unique_indices=True
  )
