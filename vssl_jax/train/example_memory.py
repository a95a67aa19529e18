"""Per-example memory: arrays with one entry per training example.

The arrays `[E, ...]` are part of the train state. They are sharded over
examples across all devices. A step gathers the entries of its batch, the loss
returns new ones, and the step scatters them. Only the entries of a batch are
communicated: of the whole batch, each device reads and writes those that it
owns.

Substitute clips have an index past the last example: they read the fill value
and write nothing. A skipped step also writes nothing.
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
from vssl_jax.methods import phase

# Suffix of the copy taken at the last window end.
WINDOW = '@window'
# E is a multiple of this number, so that shapes do not depend on the number of
# devices.
ROUND = 1024
ALL = ('data', 'fsdp')


def places(num_examples: int) -> int:
  """Returns the capacity E for a number of examples."""
  return -(-num_examples // ROUND) * ROUND


def bytes_per_example(specs: Mapping[str, phase.MemorySpec]) -> int:
  """Returns the bytes of one example's memory, window copies included."""
  return sum(
    math.prod(spec.shape)
    * jnp.dtype(spec.dtype).itemsize
    * (2 if spec.window else 1)
    for spec in specs.values()
  )


def init(
  specs: Mapping[str, phase.MemorySpec], num_examples: int
) -> dict[str, Array]:
  """Returns arrays [E, ...] of fill values, and their window copies if any."""
  return {
    name + suffix: jnp.full(
      (places(num_examples), *spec.shape), spec.fill, spec.dtype
    )
    for name, spec in specs.items()
    for suffix in ('', WINDOW)[: 2 if spec.window else 1]
  }


def gather(
  specs: Mapping[str, phase.MemorySpec],
  rows: Mapping[str, Array],
  index: Int[Array, 'B'],
  num_examples: int,
) -> dict[str, Array]:
  """Returns `example_memory` of the batch: name (and `@window`) -> [B, ...].

  The arrays are float32.

  Args:
    specs: `memory_specs` of the phase.
    rows: arrays [E, ...] from `init`.
    index: example indices; those past the last read the fill value.
    num_examples: number of training examples.
  """
  out = {}
  for name, memory in rows.items():
    entries = _look_up(memory, index).astype(jnp.float32)
    in_range = index < num_examples
    in_range = in_range.reshape(-1, *(1 for _ in entries.shape[1:]))
    fill = specs[name.removesuffix(WINDOW)].fill
    out[name] = jnp.where(in_range, entries, jnp.float32(fill))
  return out


def scatter(
  specs: Mapping[str, phase.MemorySpec],
  rows: Mapping[str, Array],
  index: Int[Array, 'B'],
  new: Mapping[str, Array],
  num_examples: int,
) -> dict[str, Array]:
  """Returns the arrays with the entries of the batch replaced by `new`.

  Args:
    specs: `memory_specs` of the phase.
    rows: arrays [E, ...] from `init`; window copies are not changed.
    index: example indices, without duplicates; those past the last are not
      written.
    new: name -> [B, ...].
    num_examples: number of training examples.

  Raises:
    ValueError: names or shapes of `new` differ from `specs`.
  """
  expected = {k: (*index.shape, *spec.shape) for k, spec in specs.items()}
  shapes = {k: tuple(x.shape) for k, x in new.items()}
  if shapes != expected:
    raise ValueError(
      f'the loss returned Aux.memory of shapes {shapes}, wanted '
      f'{expected}, the memory_specs of the phase'
    )
  index = jnp.where(index < num_examples, index, jnp.iinfo(jnp.int32).max)
  out = dict(rows)
  for name, value in new.items():
    out[name] = _write(rows[name], index, _stored(value, rows[name].dtype))
  return out


def end_windows(
  specs: Mapping[str, phase.MemorySpec], rows: Mapping[str, Array], done: int
) -> dict[str, Array]:
  """Updates the window copies whose window ends now.

  This is a separate program, run once per window: a step that selected between
  old and new would read and write every example.

  Args:
    specs: `memory_specs` of the phase.
    rows: arrays [E, ...] from `init`; copies that are updated are donated.
    done: completed steps of the phase.
  """
  due = [
    k for k, s in specs.items() if s.window and done and done % s.window == 0
  ]
  copies = _copied([rows[k] for k in due], [rows[k + WINDOW] for k in due])
  return dict(rows) | {k + WINDOW: x for k, x in zip(due, copies, strict=True)}


@functools.partial(jax.jit, donate_argnums=1, keep_unused=True)
def _copied(values: list[Array], old: list[Array]) -> list[Array]:
  """Returns copies of `values` in the donated buffers of `old`."""
  del old
  return [jnp.copy(x) for x in values]


def _stored(value: Array, dtype: Any) -> Array:
  """Casts values to the stored dtype, clipped to its finite range."""
  limit = float(jnp.finfo(dtype).max)
  return jnp.clip(value, -limit, limit).astype(dtype)


def _look_up(
  memory: Shaped[Array, 'E ...'], index: Int[Array, 'B']
) -> Shaped[Array, 'B ...']:
  """Gathers the entries of `index`, sharded like the batch."""
  mesh = sharding.mesh_of_step()
  if mesh is None:
    return jnp.take(memory, index, axis=0, mode='clip')
  axes = sharding.example_axes(memory.shape[0], mesh.shape)

  def local_look_up(memory: Array, index: Array) -> Array:
    if not axes:
      return jnp.take(memory, index, axis=0, mode='clip')
    batch_index = jax.lax.all_gather(index, axes, tiled=True)
    local_index = batch_index - jax.lax.axis_index(axes) * memory.shape[0]
    # Devices other than the owner contribute zeros to the sum.
    entries = jnp.take(memory, local_index, axis=0, mode='clip')
    is_local = (local_index >= 0) & (local_index < memory.shape[0])
    is_local = is_local.reshape(-1, *(1 for _ in entries.shape[1:]))
    entries = jnp.where(is_local, entries, jnp.zeros_like(entries))
    return jax.lax.psum_scatter(entries, axes, tiled=True)

  return jax.shard_map(
    local_look_up,
    in_specs=(PartitionSpec(axes or None), PartitionSpec(ALL)),
    out_specs=PartitionSpec(ALL),
    check_vma=False,
  )(memory, index)


def _write(
  memory: Shaped[Array, 'E ...'],
  index: Int[Array, 'B'],
  value: Shaped[Array, 'B ...'],
) -> Shaped[Array, 'E ...']:
  """Replaces the entries of `index`; all others stay equal bit for bit."""
  mesh = sharding.mesh_of_step()
  if mesh is None:
    return _replaced(memory, index, value)
  axes = sharding.example_axes(memory.shape[0], mesh.shape)

  def local_write(memory: Array, index: Array, value: Array) -> Array:
    # Gathered on every device, so that replicas of an example stay equal.
    index, value = (
      jax.lax.all_gather(x, ALL, tiled=True) for x in (index, value)
    )
    if axes:
      index = index - jax.lax.axis_index(axes) * memory.shape[0]
    return _replaced(memory, index, value)

  spec = PartitionSpec(axes or None)
  return jax.shard_map(
    local_write,
    in_specs=(spec, PartitionSpec(ALL), PartitionSpec(ALL)),
    out_specs=spec,
    check_vma=False,
  )(memory, index, value)


def _replaced(memory: Array, index: Array, value: Array) -> Array:
  """Replaces entries in range; negative indices must not wrap around."""
  inside = (index >= 0) & (index < memory.shape[0])
  dropped = memory.shape[0] + jnp.arange(index.size, dtype=index.dtype)
  return memory.at[jnp.where(inside, index, dropped)].set(
    value, mode='drop', unique_indices=True
  )
