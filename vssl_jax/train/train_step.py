"""The train step: one pure function, compiled once per phase."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vssl_jax import rngs, sharding, trees
from vssl_jax.data import batch as batch_lib
from vssl_jax.methods import phase as phase_lib
from vssl_jax.train import example_memory, freezing

# Length of the loss history behind the running median of the spike guard.
HISTORY = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """State of a run: what a step updates and a checkpoint stores.

  Attributes:
    step: int32 scalar, completed steps over the whole run.
    params: role -> tree, float32; frozen matrices in the phase's
      `frozen_dtype`.
    opt: optimizer state.
    ema: name -> averaged tree, float32.
    example_memory: name -> array [E, ...], one entry per training example; see
      `train/example_memory.py`.
    guard: `skipped` and `streak`, int32 (skipped steps in total and in a row),
      and `history`, float32 [HISTORY] of accepted losses (NaN: empty).
  """

  step: Any
  params: Any
  opt: Any
  ema: Any
  example_memory: Any
  guard: Any


def init_guard() -> dict[str, Any]:
  """Returns the guard state at the start of a phase."""
  return {
    'skipped': jnp.zeros((), jnp.int32),
    'streak': jnp.zeros((), jnp.int32),
    'history': jnp.full((HISTORY,), jnp.nan, jnp.float32),
  }


def init_state(
  phase: phase_lib.Phase,
  tx: optax.GradientTransformation,
  key: jax.Array,
  video: tuple[int, ...],
  num_examples: int,
  start: int = 0,
) -> TrainState:
  """Returns the initial state of a phase; call it in `jit` or `eval_shape`.

  Args:
    phase: the phase.
    tx: its optimizer.
    key: the run's key; the phase's name is folded in.
    video: (T, H, W, C) of a clip.
    num_examples: number of training examples; sizes `example_memory`.
    start: first step of the phase, counted over the run.
  """
  clip = jnp.zeros((1, *video), jnp.uint8)
  params = phase.init(rngs.stream(key, f'init/{phase.name}'), clip)
  labels = freezing.labels(params, phase.frozen)
  params = freezing.store(params, labels, phase.frozen_dtype)
  return TrainState(
    step=jnp.asarray(start, jnp.int32),
    params=params,
    opt=tx.init(params),
    ema={n: copy_params(params[e.of]) for n, e in phase.ema.items()},
    example_memory=example_memory.init(phase.memory_specs, num_examples),
    guard=init_guard(),
  )


def copy_params(params: Any) -> Any:
  """Returns a float32 copy; donated arguments must not share a buffer."""
  return jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params)


def make_update(
  phase: phase_lib.Phase,
  tx: optax.GradientTransformationExtraArgs,
  labels: Any,
  *,
  key: jax.Array,
  start: int,
  num_examples: int,
  accumulate: int = 1,
  skip_spike: float = 0.0,
) -> Callable[[TrainState, Any, batch_lib.Batch], tuple[TrainState, Any]]:
  """Returns `(state, teachers, batch) -> (state, metrics)`, not yet jitted.

  Args:
    phase: the phase.
    tx: `optimizer.make` over the same labels.
    labels: `freezing.labels`.
    key: the run's key.
    start: first step of the phase, counted over the run.
    num_examples: number of training examples; indices from this number on are
      substitute clips.
    accumulate: micro-batches per step.
    skip_spike: skip steps whose loss exceeds this multiple of the running
      median; 0: never.
  """

  def update(
    state: TrainState, teachers: Any, batch: batch_lib.Batch
  ) -> tuple[TrainState, Any]:
    teachers = dict(teachers) | ema_teachers(phase, state.ema)
    specs, index = phase.memory_specs, batch.index
    memory = example_memory.gather(
      specs, state.example_memory, index, num_examples
    )
    batch = dataclasses.replace(batch, example_memory=memory)

    trained, frozen = freezing.split(state.params, labels)

    def loss(
      trained: Any, batch: batch_lib.Batch, micro_batch: Any
    ) -> tuple[jax.Array, phase_lib.Aux]:
      params = freezing.join(trained, frozen)
      rng = rngs.Rng(key, state.step, micro_batch)
      if not batch.targets:  # they were not read from the cache
        targets = phase.targets(teachers, batch.video)
        batch = dataclasses.replace(batch, targets=targets)
      return phase.loss(params, teachers, batch, rng)

    grad = jax.value_and_grad(loss, has_aux=True)
    (value, aux), grads = _accumulate(grad, accumulate)(trained, batch)
    grad_norm = optax.tree.norm(grads)
    ok, spike = _accept(value, grad_norm, state.guard['history'], skip_spike)
    # The optimizer takes the whole tree; its frozen branch sets the updates of
    # these zeros to zero.
    all_grads = freezing.join(grads, jax.tree.map(jnp.zeros_like, frozen))
    # Schedules count steps from 1, see `optimizer.Schedule`.
    step_number = state.step + 1
    updates, opt = tx.update(
      all_grads, state.opt, state.params, step=step_number
    )
    updates, _ = freezing.split(updates, labels)
    params = freezing.join(optax.apply_updates(trained, updates), frozen)
    ema = _average(phase, state.ema, params, state.step - start)
    selected = jax.tree.map(
      lambda new, old: jnp.where(ok, new, old),
      (params, opt, ema),
      (state.params, state.opt, state.ema),
    )
    # A skipped step writes nothing, like a batch of substitute clips.
    index = jnp.where(ok, index, num_examples)
    new_memory = example_memory.scatter(
      specs, state.example_memory, index, aux.memory, num_examples
    )
    guard = _advance_guard(state.guard, value, ok, state.step)
    new_state = TrainState(state.step + 1, *selected, new_memory, guard)
    metrics = dict(aux.metrics) | {
      'loss': value,
      'grad_norm': grad_norm,
      'skipped': new_state.guard['skipped'],
      'streak': new_state.guard['streak'],
      'spike': spike,
    }
    return new_state, metrics

  return update


def jit_update(
  update: Callable[..., Any],
  state: TrainState,
  teachers: Any,
  mesh: Mesh,
  overrides: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
  """Jits `update` with shardings; donates the state, but not the teachers.

  Args:
    update: from `make_update`.
    state: the state or its shapes.
    teachers: name -> parameters or their shapes.
    mesh: device mesh.
    overrides: see `sharding.shardings`.
  """
  state_shardings = sharding.shardings(state, mesh, overrides)
  teacher_shardings = sharding.shardings(teachers, mesh, overrides)
  return jax.jit(
    update,
    in_shardings=(state_shardings, teacher_shardings, None),
    out_shardings=(state_shardings, sharding.replicated(mesh)),
    donate_argnums=0,
  )


def end_windows(
  state: TrainState, phase: phase_lib.Phase, done: int
) -> TrainState:
  """Updates the window copies of `example_memory` that are due after a step.

  Args:
    state: after a step; copies that are updated are donated.
    phase: the phase.
    done: completed steps of the phase.
  """
  memory = example_memory.end_windows(
    phase.memory_specs, state.example_memory, done
  )
  return dataclasses.replace(state, example_memory=memory)


def ema_teachers(
  phase: phase_lib.Phase, ema: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns teacher name -> EMA parameters, of the teachers that are EMAs."""
  return {
    name: ema[teacher.source.name]
    for name, teacher in phase.teachers.items()
    if isinstance(teacher.source, phase_lib.FromEma)
  }


def _accumulate(grad: Callable[..., Any], micro: int) -> Callable[..., Any]:
  """Wraps value_and_grad to average over micro-batches.

  Args:
    grad: (parameters, batch, number of the micro-batch or None).
    micro: micro-batches per step.
  """
  if micro == 1:
    return lambda params, batch: grad(params, batch, None)

  def averaged_grad(params: Any, batch: batch_lib.Batch) -> Any:
    leaves, tree = jax.tree.flatten(batch)
    shared = [None if x.ndim else x for x in leaves]
    # Interleaved, so that each device splits only its own part of the batch.
    split = [
      jnp.moveaxis(x.reshape(-1, micro, *x.shape[1:]), 1, 0) if x.ndim else None
      for x in leaves
    ]

    def micro_batch(parts: list[Any]) -> batch_lib.Batch:
      return tree.unflatten(
        [y if x is None else x for x, y in zip(parts, shared, strict=True)]
      )

    def body(total: Any, numbered: tuple[Any, Any]) -> tuple[Any, Any]:
      number, parts = numbered
      (value, aux), grads = grad(params, micro_batch(parts), number)
      total = jax.tree.map(jnp.add, total, (value, aux.metrics, grads))
      return total, aux.memory

    first = jax.tree.map(lambda x: x[0], split)
    numbers = jnp.arange(micro, dtype=jnp.int32)
    (value, aux), grads = jax.eval_shape(
      grad, params, micro_batch(first), numbers[0]
    )
    zero = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), (value, aux.metrics, grads)
    )
    total, memory_parts = jax.lax.scan(body, zero, (numbers, split))
    value, metrics, grads = jax.tree.map(lambda x: x / micro, total)
    new_memory = jax.tree.map(
      lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), memory_parts
    )
    return (value, phase_lib.Aux(metrics, new_memory)), grads

  return averaged_grad


def _accept(
  value: jax.Array, norm: jax.Array, history: jax.Array, skip_spike: float
) -> tuple[jax.Array, jax.Array]:
  """Returns whether to accept the step, and loss / running median."""
  ratio = value / jnp.nanmedian(history)
  ratio = jnp.where(jnp.isnan(ratio), 1.0, ratio)
  ok = jnp.isfinite(value) & jnp.isfinite(norm)
  if skip_spike:
    ok &= ratio < skip_spike
  return ok, ratio


def _advance_guard(
  guard: Mapping[str, Any], value: jax.Array, ok: jax.Array, step: jax.Array
) -> dict[str, Any]:
  """Counts the step and stores its loss if it was accepted."""
  history = guard['history']
  is_slot = jnp.arange(HISTORY) == step % HISTORY
  return {
    'skipped': guard['skipped'] + (~ok).astype(jnp.int32),
    'streak': jnp.where(ok, 0, guard['streak'] + 1),
    'history': jnp.where(is_slot & ok, value.astype(jnp.float32), history),
  }


def _average(
  phase: phase_lib.Phase, ema: Mapping[str, Any], params: Any, done: jax.Array
) -> dict[str, Any]:
  """Updates each EMA with the new parameters."""
  out = {}
  for name, spec in phase.ema.items():
    first, last = spec.momentum
    m = first + (last - first) * (done / phase.steps).astype(jnp.float32)
    out[name] = jax.tree.map(
      lambda e, p, m=m: m * e + (1 - m) * p, ema[name], params[spec.of]
    )
  return out


def first_nonfinite(params: Any) -> str:
  """Returns the name of the first leaf with a value that is not finite."""
  for name, leaf in trees.named_leaves(params):
    if not bool(jnp.all(jnp.isfinite(leaf))):
      return name
  return ''
