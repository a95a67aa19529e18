"""Compiles a phase's train step for random input, and times it."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from vssl_jax import sharding, trees
from vssl_jax.data import batch as batch_lib
from vssl_jax.methods import phase
from vssl_jax.train import phase_setup, train_step
from vssl_jax.train import run as run_lib

WARM_UP = 3  # untimed steps before the timed ones


@dataclasses.dataclass
class Prepared:
  """A phase's compiled step with all its inputs.

  Attributes:
    compiled: (state, teachers, batch) -> (state, metrics); donates the state.
    state: train state before the first step.
    teachers: name -> parameters.
    batch: clips on the device.
    compile_seconds: seconds of tracing and compiling.
  """

  compiled: Any
  state: train_step.TrainState
  teachers: dict[str, Any]
  batch: batch_lib.Batch
  compile_seconds: float


def prepare(
  config: ml_collections.ConfigDict,
  span: run_lib.Span,
  size: int,
  video: tuple[int, ...],
  mesh: jax.sharding.Mesh,
) -> Prepared:
  """Compiles a phase's step as the trainer does, for random input."""
  config = config.copy_and_resolve_references()
  config.batch_size = size
  config.cache_targets = ''  # the step computes its targets
  setup = phase_setup.build(config, span, video, examples=size)
  overrides = dict(config.mesh.overrides)
  shardings = sharding.shardings(setup.state, mesh, overrides)
  state = jax.jit(setup.fresh, out_shardings=shardings)()
  teachers = {
    name: _random_teacher(span.phase.teachers[name], video, mesh, overrides)
    for name in setup.teachers
  }
  batch = _random_batch(size, video, mesh)
  update = phase_setup.jitted(config, setup, mesh)
  start = time.perf_counter()
  compiled = update.lower(state, teachers, batch).compile()
  return Prepared(compiled, state, teachers, batch, time.perf_counter() - start)


def _random_teacher(
  teacher: phase.Teacher,
  video: tuple[int, ...],
  mesh: jax.sharding.Mesh,
  overrides: dict[str, Any],
) -> Any:
  def init() -> Any:
    clip = jnp.zeros((1, *video), jnp.uint8)
    params = teacher.module.init(jax.random.key(0), clip)['params']
    return trees.cast(params, teacher.stored)

  shardings = sharding.shardings(jax.eval_shape(init), mesh, overrides)
  return jax.jit(init, out_shardings=shardings)()


def _random_batch(
  size: int, video: tuple[int, ...], mesh: jax.sharding.Mesh
) -> batch_lib.Batch:
  """Returns a random batch, generated with the sharding of the step."""
  split = sharding.batch_sharding(mesh)
  draw = functools.partial(
    jax.random.bits, shape=(size, *video), dtype=jnp.uint8
  )
  clips = jax.jit(draw, out_shardings=split)(jax.random.key(1))
  indices = jnp.arange(size, dtype=jnp.int32)
  false = jnp.zeros_like(indices, bool)
  full_frame = jnp.zeros((size, 4)).at[:, 2:].set(1.0)
  return batch_lib.Batch(
    video=clips,
    index=jax.device_put(indices, split),
    label=jax.device_put(jnp.zeros_like(indices), split),
    repeat=jax.device_put(jnp.zeros_like(indices), split),
    substituted=jax.device_put(false, split),
    crop=jax.device_put(full_frame, split),
    flip=jax.device_put(false, split),
    progress=jax.device_put(jnp.float32(0), sharding.replicated(mesh)),
  )


def step_seconds(
  prepared: Prepared, steps: int
) -> tuple[list[float], train_step.TrainState]:
  """Returns the seconds of each step, and the state after the last.

  As in the trainer, one step is always in flight: each time is from the end of
  one step to the end of the next.
  """
  state, pending, ends = prepared.state, None, []
  for _ in range(WARM_UP + steps + 1):
    state, values = prepared.compiled(state, prepared.teachers, prepared.batch)
    if pending is not None:
      jax.block_until_ready(pending)
      ends.append(time.perf_counter())
    pending = values
  jax.block_until_ready(pending)
  prepared.state = state  # the first one was donated
  return list(np.diff(ends)[-steps:]), state


def matrix_rate(side: int, dtype: str = 'float32', repeats: int = 5) -> float:
  """Returns the FLOP/s of one device in a square matrix product.

  Args:
    side: rows and columns of both factors.
    dtype: dtype of the factors and of the product.
    repeats: number of timed products; the fastest counts.
  """
  keys = jax.random.split(jax.random.key(0))
  a, b = (jax.random.normal(k, (side, side), dtype) for k in keys)
  product = jax.jit(jnp.matmul).lower(a, b).compile()
  seconds = times(lambda: product(a, b), repeats)
  return 2.0 * side**3 / min(seconds)


def times(call: Callable[[], Any], repeats: int) -> list[float]:
  """Returns the seconds of each call, after a first untimed call."""
  out = []
  jax.block_until_ready(call())
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(call())
    out.append(time.perf_counter() - start)
  return out
