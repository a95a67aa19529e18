"""Device mesh, and shardings of parameters, example memory and batches.

The mesh has two axes. `data` splits the batch only; `fsdp` splits the batch
and the parameters. There is no `tensor` axis: with at most 4B parameters and
clips of 1,568 tokens, no measurement has shown that fully sharded data
parallelism needs one.

Without constraints, the compiler propagates the sharding of a weight to the
product with it: in every layer, activations of the whole batch are then summed
over all devices. Models therefore gather each weight where it is used
(`gathered`), in the dtype of that use. Activations then stay split by clip.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from vssl_jax import trees

# Leaves with fewer scalars are replicated: the latency of gathering them costs
# more than the memory of full copies.
MIN_SHARDED_SIZE = 2**14

# Prefix of leaves that have one entry per training example along axis 0.
EXAMPLES = 'example_memory/'

# The compiler chooses the shardings of intermediate values.
AUTO = (AxisType.Auto,) * 2


def make_mesh(data: int = 1, fsdp: int = -1) -> Mesh:
  """Makes the mesh with axes `data` and `fsdp` over all devices.

  Args:
    data: size of the axis that replicates parameters; -1 for the number of
      devices divided by `fsdp`.
    fsdp: size of the axis that shards parameters; -1 for the number of
      devices divided by `data`.

  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  n = jax.device_count()
  if data == -1 and fsdp == -1:
    raise ValueError('mesh: only one of data and fsdp can be -1')
  data = n // fsdp if data == -1 else data
  fsdp = n // data if fsdp == -1 else fsdp
  if data < 1 or fsdp < 1 or data * fsdp != n:
    raise ValueError(
      f'mesh: data={data} x fsdp={fsdp} is not the {n} devices found '
      f'({jax.devices()[0].platform}); set --config.mesh.data and '
      '--config.mesh.fsdp so that they multiply to it, or one of them to -1'
    )
  mesh = jax.make_mesh((data, fsdp), ('data', 'fsdp'), axis_types=AUTO)
  if jax.process_count() > 1 and mesh.devices.flat[0].platform == 'cpu':
    _connect(mesh)
  return mesh


def _connect(mesh: Mesh) -> None:
  """Connects CPU processes early, in every device group of the mesh.

  CPU processes connect at the first sum over a group. They fail if one of them
  arrives 30 s after another, which can happen after a step is compiled. Once
  connected, they wait for each other.
  """
  axes = mesh.axis_names
  partition = PartitionSpec(*axes)

  def sum_over_groups(x: Array) -> Array:
    return sum(jax.lax.psum(x, group) for group in (*axes, axes))

  jitted = jax.jit(
    jax.shard_map(
      sum_over_groups, mesh=mesh, in_specs=partition, out_specs=partition
    )
  )
  ones = np.ones(mesh.devices.shape, np.float32)
  sharding = NamedSharding(mesh, partition)
  jax.block_until_ready(
    jitted(jax.make_array_from_callback(ones.shape, sharding, ones.__getitem__))
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array whose first axis is the batch."""
  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device holds in full."""
  return NamedSharding(mesh, PartitionSpec())


def spec(
  name: str,
  shape: tuple[int, ...],
  sizes: Mapping[str, int],
  overrides: Mapping[str, tuple[str | None, ...]] | None = None,
) -> PartitionSpec:
  """Returns the partition spec of one leaf.

  Splits the largest axis that `fsdp` divides. The example memory is split
  along its examples, whatever its size, see `example_axes`.

  Args:
    name: name of the leaf.
    shape: shape of the leaf.
    sizes: sizes of the mesh axes, by name.
    overrides: regular expression for names -> partition spec as a tuple. They
      do not apply to the example memory.

  Raises:
    ValueError: an override does not fit the shape.
  """
  if name.startswith(EXAMPLES):
    return PartitionSpec(example_axes(shape[0], sizes) or None)
  fsdp = sizes['fsdp']
  for pattern, axes in (overrides or {}).items():
    if re.match(pattern, name):
      _check_override(pattern, axes, name, shape, sizes)
      return PartitionSpec(*axes)
  if fsdp == 1 or np.prod(shape) < MIN_SHARDED_SIZE:
    return PartitionSpec()
  sizes = [n if n % fsdp == 0 else 0 for n in shape]
  if not max(sizes):
    return PartitionSpec()
  axis = int(np.argmax(sizes))
  return PartitionSpec(
    *('fsdp' if i == axis else None for i in range(axis + 1))
  )


def _check_override(
  pattern: str,
  axes: tuple[str | None, ...],
  name: str,
  shape: tuple[int, ...],
  sizes: Mapping[str, int],
) -> None:
  """Raises ValueError if an override does not fit the shape of a leaf."""
  named = [axis for axis in axes if axis]
  split = zip(shape, axes, strict=False)
  if (
    len(axes) <= len(shape)
    and len(set(named)) == len(named)
    and all(n % sizes.get(axis, 1) == 0 for n, axis in split)
  ):
    return
  raise ValueError(
    f'mesh.overrides: found {axes} by {pattern!r} for {name} of shape '
    f'{tuple(shape)}, wanted at most {len(shape)} axes, none of them twice, '
    f'whose sizes {dict(sizes)} divide the shape; set --config.mesh.overrides '
    'to a pattern of fewer leaves, or to other axes'
  )


def example_axes(examples: int, sizes: Mapping[str, int]) -> tuple[str, ...]:
  """Returns the mesh axes that split the example memory.

  These are both axes, `fsdp` or `data`: the first choice whose number of
  devices divides the number of examples; none if there is no such choice.

  Args:
    examples: entries of the example memory.
    sizes: sizes of the mesh axes, by name.
  """
  for axes in (('data', 'fsdp'), ('fsdp',), ('data',)):
    if examples % math.prod(sizes[axis] for axis in axes) == 0:
      return axes
  return ()


def shardings(
  tree: Any,
  mesh: Mesh,
  overrides: Mapping[str, tuple[str | None, ...]] | None = None,
) -> Any:
  """Returns a `NamedSharding` for every leaf of a tree of arrays or shapes.

  Optimizer moments have the shape of their parameter, so the default rule
  gives them the same sharding. Their names end in the name of the parameter.
  """
  sizes = mesh.shape
  return trees.map_named(
    lambda name, x: NamedSharding(mesh, spec(name, x.shape, sizes, overrides)),
    tree,
  )


def mesh_of_step() -> Any:
  """Returns the mesh of the step being traced, or None without such a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size == 1 or mesh.axis_names != ('data', 'fsdp'):
    return None
  return mesh if mesh.axis_types == AUTO else None


@jax.custom_vjp
def gathered(weight: jax.Array) -> jax.Array:
  """Gathers a weight on every device for the operation that uses it.

  The gradient is sharded like the weight.
  """
  if mesh_of_step() is None:
    return weight
  return jax.lax.with_sharding_constraint(weight, PartitionSpec())


def _gathered_forward(weight: jax.Array) -> tuple[jax.Array, None]:
  return gathered(weight), None


def _gathered_backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
  mesh = mesh_of_step()
  if mesh is None:
    return (gradient,)
  partition = spec('', gradient.shape, mesh.shape)
  return (jax.lax.with_sharding_constraint(gradient, partition),)


gathered.defvjp(_gathered_forward, _gathered_backward)


def dot_general(
  x: jax.Array, weight: jax.Array, *args: Any, **kwargs: Any
) -> jax.Array:
  """Computes `jax.lax.dot_general` of activations and a gathered weight."""
  return jax.lax.dot_general(x, gathered(weight), *args, **kwargs)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
  """Makes global arrays from each process's local part of a batch.

  Args:
    batch: numpy arrays [B_local, ...]; scalars are replicated.
    mesh: the mesh; its devices split the first axis.
  """
  split, whole = batch_sharding(mesh), replicated(mesh)

  def put(x: Any) -> Any:
    x = np.asarray(x)
    return jax.make_array_from_process_local_data(split if x.ndim else whole, x)

  return {name: put(x) for name, x in batch.items()}
