"""One mesh, one rule: where parameters, rows and batches live.

The mesh has two axes. `data` splits the batch only; `fsdp` splits the batch
and the parameters. There is no `tensor` axis: with at most 4B parameters and
clips of 1,568 tokens, fully sharded data parallelism has not been measured to
need one.

Left alone, the compiler spreads the split of a weight to what is multiplied by
it: activations of the whole batch are then summed over all devices in every
layer. So models say that a weight is gathered where it is used, in the type
that it is used in; activations then stay with their clips.
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

# Leaves under this many scalars are replicated: gathering them costs more in
# latency than holding them costs in memory.
MIN_SHARDED_SIZE = 2**14

# Leaves under this name have a training example in each place of axis 0.
EXAMPLES = 'rows/'

# The compiler decides where intermediate values live.
AUTO = (AxisType.Auto,) * 2


def make_mesh(data: int = 1, fsdp: int = -1) -> Mesh:
  """Makes the mesh with axes `data` and `fsdp` over all devices.

  Args:
    data: size of the replicated data axis; -1 for what `fsdp` leaves over.
    fsdp: size of the sharded axis; -1 for what `data` leaves over.

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
  """Lets processes meet at once, in every group that the mesh has.

  CPUs connect at the first sum over a group, and fail where one comes 30 s
  later than another, as it may after compiling a step. Once they are
  connected they wait for each other.
  """
  axes = mesh.axis_names
  spec = PartitionSpec(*axes)

  def meet(x: Array) -> Array:
    return sum(jax.lax.psum(x, group) for group in (*axes, axes))

  met = jax.jit(jax.shard_map(meet, mesh=mesh, in_specs=spec, out_specs=spec))
  ones = np.ones(mesh.devices.shape, np.float32)
  at = NamedSharding(mesh, spec)
  jax.block_until_ready(
    met(jax.make_array_from_callback(ones.shape, at, ones.__getitem__))
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
  """Returns where one leaf is split: its largest axis that `fsdp` divides.

  The memory of training examples is split over them, by every device that
  there is, however small it is.

  Args:
    name: the leaf, for `overrides`.
    shape: its shape.
    sizes: of the mesh's axes, by name.
    overrides: regular expression of a name -> partition spec as a tuple; none
      changes where examples live.

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
  """Raises where a leaf cannot be split as an override says."""
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
  """Returns the axes that split the training examples: the most that divide.

  Args:
    examples: places for them.
    sizes: of the mesh's axes, by name.
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

  The rule looks at the last names too: optimizer moments carry the name and
  the shape of their parameter, so they land where it does.
  """
  sizes = mesh.shape
  return trees.map_named(
    lambda name, x: NamedSharding(mesh, spec(name, x.shape, sizes, overrides)),
    tree,
  )


def mesh_of_step() -> Any:
  """Returns the mesh of the step that is being traced; None without one."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size == 1 or mesh.axis_names != ('data', 'fsdp'):
    return None
  return mesh if mesh.axis_types == AUTO else None


@jax.custom_vjp
def gathered(weight: jax.Array) -> jax.Array:
  """Returns a weight that every device holds in full for the moment.

  Its gradient goes back to the devices that hold the weight.
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
  at = spec('', gradient.shape, mesh.shape)
  return (jax.lax.with_sharding_constraint(gradient, at),)


gathered.defvjp(_gathered_forward, _gathered_backward)


def dot_general(
  x: jax.Array, weight: jax.Array, *args: Any, **kwargs: Any
) -> jax.Array:
  """Returns `jax.lax.dot_general` of activations and a gathered weight."""
  return jax.lax.dot_general(x, gathered(weight), *args, **kwargs)


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
  """Makes global arrays from each process's local part of a batch.

  Args:
    batch: numpy arrays [B_local, ...]; scalars are replicated.
    mesh: the mesh; its devices split the first axis.
  """
  split, whole = batch_sharding(mesh), replicated(mesh)

  def one(x: Any) -> Any:
    x = np.asarray(x)
    return jax.make_array_from_process_local_data(split if x.ndim else whole, x)

  return {name: one(x) for name, x in batch.items()}
