"""Shapes of a phase's train step, and its compilation without a run.

No arrays are allocated. The compiler is that of the local devices, or of a TPU
slice that need not be attached (`libtpu` compiles without one). The reported
memory holds only for the devices that the step was compiled for.
"""

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh

from vssl_jax import sharding
from vssl_jax.data import batch as batch_lib
from vssl_jax.methods import phase as phase_lib
from vssl_jax.target_cache import policy
from vssl_jax.train import freezing, optimizer, train_step
from vssl_jax.train import run as run_lib

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class PhaseSetup:
  """Shapes, optimizer and schedules of a phase.

  Attributes:
    span: the phase and its steps in the run.
    fresh: () -> initial state of the phase, to be jitted.
    state: shapes of the train state.
    teachers: name -> shapes of parameters; EMA teachers are in the state.
    tx: the optimizer.
    labels: `freezing.labels` of the parameters.
    schedules: `lr` and `wd`, functions of the step of the run.
    examples: number of training examples, for `example_memory`.
    cached: targets that are cached on disk, if any.
  """

  span: run_lib.Span
  fresh: Callable[[], train_step.TrainState]
  state: train_step.TrainState
  teachers: dict[str, Any]
  tx: optax.GradientTransformationExtraArgs
  labels: Any
  schedules: dict[str, optimizer.Schedule]
  examples: int
  cached: policy.Cached | None = None

  @property
  def step_teachers(self) -> dict[str, Any]:
    """Name -> parameter shapes of the teachers that the step evaluates."""
    cached = self.cached.teachers if self.cached else ()
    return {n: x for n, x in self.teachers.items() if n not in cached}


def build(
  config: ml_collections.ConfigDict,
  span: run_lib.Span,
  video: tuple[int, ...],
  examples: int = 1,
) -> PhaseSetup:
  """Builds the `PhaseSetup` of a phase; allocates no arrays.

  Args:
    config: a resolved config.
    span: the phase and its steps, one of `run.spans`.
    video: (T, H, W, C) of a clip.
    examples: number of training examples, for `example_memory`.

  Raises:
    ValueError: the schedules do not fit the phase.
  """
  phase, key = span.phase, jax.random.key(config.seed)
  clip = jax.ShapeDtypeStruct((1, *video), jnp.uint8)
  shapes = jax.eval_shape(lambda k, v: phase.init(k, v), key, clip)
  labels = freezing.labels(shapes, phase.frozen)
  horizon = optimizer.horizon(phase, span.start, span.covers)
  optimizer.warmup_steps(config.optim, horizon, phase.name)
  lr = optimizer.learning_rate(config.optim, horizon, config.batch_size)
  decay = optimizer.weight_decay(config.optim, horizon)
  tx = optimizer.make(config.optim, labels, lr, decay)

  def fresh() -> train_step.TrainState:
    return train_step.init_state(phase, tx, key, video, examples, span.start)

  state = jax.eval_shape(fresh)
  teachers = {
    name: teacher_shapes(teacher, video)
    for name, teacher in phase.teachers.items()
    if not isinstance(teacher.source, phase_lib.FromEma)
  }
  return PhaseSetup(
    span,
    fresh,
    state,
    teachers,
    tx,
    labels,
    schedules={'lr': lr, 'wd': decay},
    examples=examples,
    cached=cached(config, phase, video),
  )


def cached(
  config: ml_collections.ConfigDict,
  phase: phase_lib.Phase,
  video: tuple[int, ...],
) -> policy.Cached | None:
  """Returns the targets of a phase that are cached on disk; None for none.

  Args:
    config: a resolved config.
    phase: the phase.
    video: (T, H, W, C) of a clip.
  """
  if not config.cache_targets:
    return None
  params = {n: teacher_shapes(t, video) for n, t in phase.teachers.items()}
  return policy.cached(config, phase, video, params)


def teacher_shapes(teacher: phase_lib.Teacher, video: tuple[int, ...]) -> Any:
  """Returns the shapes of a teacher's parameters for clips (T, H, W, C)."""
  clip = jax.ShapeDtypeStruct((1, *video), jnp.uint8)
  shapes = jax.eval_shape(teacher.module.init, jax.random.key(0), clip)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(teacher.stored)),
    shapes['params'],
  )


def placed(config: ml_collections.ConfigDict, tree: Any, mesh: Mesh) -> Any:
  """Returns the shapes of a tree of arrays or shapes, with shardings."""
  shardings = sharding.shardings(tree, mesh, dict(config.mesh.overrides))
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    shardings,
  )


def jitted(
  config: ml_collections.ConfigDict,
  setup: PhaseSetup,
  mesh: Mesh,
) -> Callable[..., Any]:
  """Returns the jitted step of a phase; see `train_step.jit_update`."""
  update = train_step.make_update(
    setup.span.phase,
    setup.tx,
    setup.labels,
    key=jax.random.key(config.seed),
    start=setup.span.start,
    num_examples=setup.examples,
    accumulate=config.optim.accumulate,
    skip_spike=config.optim.skip_spike,
  )
  return train_step.jit_update(
    update,
    setup.state,
    setup.step_teachers,
    mesh,
    dict(config.mesh.overrides),
  )


def lower(
  config: ml_collections.ConfigDict,
  setup: PhaseSetup,
  video: tuple[int, ...],
  mesh: Mesh,
) -> jax.stages.Lowered:
  """Lowers the train step of a phase for a mesh, as the trainer does.

  Args:
    config: a resolved config.
    setup: from `build`.
    video: (T, H, W, C) of a clip.
    mesh: of local devices, or from `tpu_mesh`.
  """
  update = jitted(config, setup, mesh)
  batch = batch_lib.shapes(
    config.batch_size,
    video,
    sharding.batch_sharding(mesh),
    sharding.replicated(mesh),
  )
  batch = with_targets(batch, setup, mesh)
  with jax.set_mesh(mesh):
    return update.lower(setup.state, setup.step_teachers, batch)


def with_targets(
  batch: batch_lib.Batch, setup: PhaseSetup, mesh: Mesh
) -> batch_lib.Batch:
  """Returns the shapes of a batch with the cached targets of a phase.

  Args:
    batch: shapes of a batch of any phase; its targets are replaced.
    setup: from `build`.
    mesh: mesh that shards the batch.
  """
  cached = setup.cached.shapes if setup.cached else {}
  targets = {
    name: jax.ShapeDtypeStruct(
      (*batch.index.shape, *x.shape),
      x.dtype,
      sharding=sharding.batch_sharding(mesh),
    )
    for name, x in cached.items()
  }
  return dataclasses.replace(batch, targets=targets)


def tpu_mesh(slice_name: str, data: int = 1) -> Mesh:
  """Returns the mesh of a TPU slice that need not be attached.

  Args:
    slice_name: kind and shape, such as `v5p:4x4x4` or `v6e:8x8`.
    data: size of the `data` axis; the other axis takes the rest.

  Raises:
    ValueError: there is no such slice, `libtpu` is not installed, or `data`
      does not divide the slice.
  """
  if not re.fullmatch(r'v\w+:\d+(x\d+)+', slice_name):
    raise ValueError(
      f'--plan: found the slice {slice_name!r}, wanted a kind and a shape such '
      'as tpu:v5p:4x4x4 or tpu:v6e:8x8'
    )
  if importlib.util.find_spec('libtpu') is None:
    raise ValueError(
      '--plan: compiling for a TPU needs its compiler, which needs no TPU: '
      "pip install 'jax[tpu]'"
    )
  # Without it libtpu waits minutes for the metadata server of a cloud machine.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  try:
    slice_ = topologies.get_topology_desc(slice_name, 'tpu')
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(
      f'--plan: libtpu has no slice {slice_name!r}: {error}'
    ) from error
  devices = np.array(slice_.devices)
  if data < 1 or devices.size % data:
    raise ValueError(
      f'mesh.data: found {data}, which does not divide the {devices.size} '
      f'devices of {slice_name}'
    )
  return Mesh(
    devices.reshape(data, -1), ('data', 'fsdp'), axis_types=sharding.AUTO
  )


def report(lowered: jax.stages.Lowered, mesh: Mesh, name: str) -> str:
  """Compiles a step; returns one line on its memory, FLOPs and compile time.

  Args:
    lowered: from `lower`.
    mesh: mesh that it was lowered for.
    name: name of the phase.
  """
  device = mesh.devices.flat[0]
  is_local = device.client is jax.devices()[0].client
  head = f'compiled {name} for {mesh.size} x {device.device_kind}'
  start = time.perf_counter()
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    reason = str(error).partition('\n')[0].removeprefix('RESOURCE_EXHAUSTED: ')
    return f'{head}: does not fit. {reason}'
  seconds = time.perf_counter() - start
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
  argument_bytes = memory.argument_size_in_bytes - memory.alias_size_in_bytes
  total_bytes = (
    argument_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
  )
  source = (
    'of this machine, not of another' if is_local else 'by its own compiler'
  )
  return (
    f'{head} in {seconds:.0f} s: GiB per device: arguments '
    f'{memory.argument_size_in_bytes / GIB:.2f}, temporary '
    f'{memory.temp_size_in_bytes / GIB:.2f}, total {total_bytes / GIB:.2f}; '
    f'{cost.get("flops", math.nan):.3g} FLOPs per device ({source})'
  )
