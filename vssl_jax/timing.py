"""A phase's real step on random input, and the clock that runs beside it."""

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
from vssl_jax.methods import base
from vssl_jax.train import ahead, step
from vssl_jax.train import run as run_lib

WARM_UP = 3  # steps before the clock starts


@dataclasses.dataclass
class Prepared:
  """A phase's compiled step with everything that it reads.

  Attributes:
    compiled: (state, teachers, batch) -> (state, metrics); takes the state.
    state: before the first step.
    teachers: name -> parameters.
    batch: clips on the device.
    compile_seconds: tracing and compiling.
  """

  compiled: Any
  state: step.TrainState
  teachers: dict[str, Any]
  batch: dict[str, Any]
  compile_seconds: float


def prepare(
  config: ml_collections.ConfigDict,
  method: base.Method,
  span: run_lib.Span,
  size: int,
  video: tuple[int, ...],
  mesh: jax.sharding.Mesh,
) -> Prepared:
  """Compiles a phase's step as the trainer does, on random input."""
  config = config.copy_and_resolve_references()
  config.batch_size = size
  config.cache_targets = ''  # the step asks its teachers
  shapes = ahead.outline(config, method, span, video, examples=size)
  overrides = dict(config.mesh.overrides)
  at = sharding.shardings(shapes.state, mesh, overrides)
  state = jax.jit(shapes.fresh, out_shardings=at)()
  teachers = {
    name: _random_teacher(span.phase.teachers[name], video, mesh, overrides)
    for name in shapes.teachers
  }
  batch = _random_batch(size, video, mesh)
  update = ahead.jitted(config, method, shapes, mesh)
  start = time.perf_counter()
  compiled = update.lower(state, teachers, batch).compile()
  return Prepared(compiled, state, teachers, batch, time.perf_counter() - start)


def _random_teacher(
  teacher: base.Teacher,
  video: tuple[int, ...],
  mesh: jax.sharding.Mesh,
  overrides: dict[str, Any],
) -> Any:
  def init() -> Any:
    clip = jnp.zeros((1, *video), jnp.uint8)
    params = teacher.module.init(jax.random.key(0), clip)['params']
    return trees.cast(params, teacher.stored)

  at = sharding.shardings(jax.eval_shape(init), mesh, overrides)
  return jax.jit(init, out_shardings=at)()


def _random_batch(
  size: int, video: tuple[int, ...], mesh: jax.sharding.Mesh
) -> dict[str, Any]:
  """Returns a batch that was drawn where it is needed."""
  split = sharding.batch_sharding(mesh)
  draw = functools.partial(
    jax.random.bits, shape=(size, *video), dtype=jnp.uint8
  )
  clips = jax.jit(draw, out_shardings=split)(jax.random.key(1))
  count = jnp.arange(size, dtype=jnp.int32)
  none = jnp.zeros_like(count, bool)
  whole = jnp.zeros((size, 4)).at[:, 2:].set(1.0)
  return {
    'video': clips,
    'index': jax.device_put(count, split),
    'label': jax.device_put(jnp.zeros_like(count), split),
    'repeat': jax.device_put(jnp.zeros_like(count), split),
    'substituted': jax.device_put(none, split),
    'crop': jax.device_put(whole, split),
    'flip': jax.device_put(none, split),
    'progress': jax.device_put(jnp.float32(0), sharding.replicated(mesh)),
  }


def step_seconds(
  prepared: Prepared, steps: int
) -> tuple[list[float], step.TrainState]:
  """Returns the seconds of each step, and the state after the last.

  As in the trainer, one step is always in hand: what is timed is from the end
  of one step to the end of the next.
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
    dtype: of the factors and of the product.
    repeats: timed products, of which the fastest counts.
  """
  keys = jax.random.split(jax.random.key(0))
  a, b = (jax.random.normal(k, (side, side), dtype) for k in keys)
  product = jax.jit(jnp.matmul).lower(a, b).compile()
  seconds = times(lambda: product(a, b), repeats)
  return 2.0 * side**3 / min(seconds)


def times(call: Callable[[], Any], repeats: int) -> list[float]:
  """Returns the seconds of each call, after one that is not counted."""
  out = []
  jax.block_until_ready(call())
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(call())
    out.append(time.perf_counter() - start)
  return out
