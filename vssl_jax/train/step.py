"""The train step: one pure function, compiled once per phase."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vssl_jax import rngs, sharding, trees
from vssl_jax.methods import base
from vssl_jax.train import freezing, rows

# Losses that the running median of the spike guard looks back on.
HISTORY = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that a step reads and writes, and a checkpoint holds.

  Attributes:
    step: int32 scalar, steps done over the whole run.
    params: role -> tree, float32; frozen matrices in the phase's
      `frozen_dtype`.
    opt: the optimizer's state.
    ema: name -> averaged tree, float32.
    rows: name -> memory of every training example, see `rows`.
    guard: `skipped` int32 and `streak` int32 (steps without an update, in all
      and in a row), `history` float32 [HISTORY] of accepted losses (NaN:
      empty).
  """

  step: Any
  params: Any
  opt: Any
  ema: Any
  rows: Any
  guard: Any


def init_guard() -> dict[str, Any]:
  """Returns the guard's state at the start of a phase."""
  return {
    'skipped': jnp.zeros((), jnp.int32),
    'streak': jnp.zeros((), jnp.int32),
    'history': jnp.full((HISTORY,), jnp.nan, jnp.float32),
  }


def init_state(
  method: base.Method,
  phase: base.Phase,
  tx: optax.GradientTransformation,
  key: jax.Array,
  video: tuple[int, ...],
  num_examples: int,
  start: int = 0,
) -> TrainState:
  """Returns the fresh state of a phase; to be jitted or `eval_shape`d.

  Args:
    method: the method.
    phase: one of its phases.
    tx: its optimizer.
    key: the run's key; the phase's name is folded in.
    video: (T, H, W, C) of a clip.
    num_examples: training examples, for phases that remember them.
    start: first step of the phase, counted over the run.
  """
  clip = jnp.zeros((1, *video), jnp.uint8)
  params = method.init(rngs.stream(key, f'init/{phase.name}'), clip, phase)
  labels = freezing.labels(params, phase.frozen)
  params = freezing.store(params, labels, phase.frozen_dtype)
  return TrainState(
    step=jnp.asarray(start, jnp.int32),
    params=params,
    opt=tx.init(params),
    ema={n: copy_params(params[e.of]) for n, e in phase.ema.items()},
    rows=rows.init(phase.row_specs, num_examples),
    guard=init_guard(),
  )


def copy_params(params: Any) -> Any:
  """Returns a float32 copy: donated arguments must not share a buffer."""
  return jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params)


def make_update(
  method: base.Method,
  phase: base.Phase,
  tx: optax.GradientTransformationExtraArgs,
  labels: Any,
  *,
  key: jax.Array,
  start: int,
  num_examples: int,
  accumulate: int = 1,
  skip_spike: float = 0.0,
) -> Callable[[TrainState, Any, Mapping[str, Any]], tuple[TrainState, Any]]:
  """Returns `(state, teachers, batch) -> (state, metrics)`, not yet jitted.

  Args:
    method: the method.
    phase: its static knobs.
    tx: `optimizer.make` over the same labels.
    labels: `freezing.labels`.
    key: the run's key.
    start: first step of the phase, counted over the run.
    num_examples: training examples; indices from there on are substitutes.
    accumulate: micro-batches per step.
    skip_spike: skip a loss over this multiple of the running median; 0: never.
  """

  def update(
    state: TrainState, teachers: Any, batch: Mapping[str, Any]
  ) -> tuple[TrainState, Any]:
    targets = dict(teachers) | ema_teachers(phase, state.ema)
    specs, index = phase.row_specs, batch['index']
    batch = dict(batch) | rows.gather(specs, state.rows, index, num_examples)

    trained, frozen = freezing.split(state.params, labels)

    def loss(
      trained: Any, batch: Any, micro_batch: Any
    ) -> tuple[jax.Array, base.Aux]:
      params = freezing.join(trained, frozen)
      rng = rngs.Rng(key, state.step, micro_batch)
      return method.loss(params, targets, batch, rng, phase)

    grad = jax.value_and_grad(loss, has_aux=True)
    (value, aux), grads = _accumulate(grad, accumulate)(trained, batch)
    norm = optax.tree.norm(grads)
    ok, spike = _accept(value, norm, state.guard['history'], skip_spike)
    # The optimizer wants the whole tree; it sets these zeros to zero.
    whole = freezing.join(grads, jax.tree.map(jnp.zeros_like, frozen))
    # Schedules count steps from 1, see `optimizer.Schedule`.
    number = state.step + 1
    updates, opt = tx.update(whole, state.opt, state.params, step=number)
    updates, _ = freezing.split(updates, labels)
    params = freezing.join(optax.apply_updates(trained, updates), frozen)
    ema = _average(phase, state.ema, params, state.step - start)
    kept = jax.tree.map(
      lambda new, old: jnp.where(ok, new, old),
      (params, opt, ema),
      (state.params, state.opt, state.ema),
    )
    # A step that is not taken writes as a batch of substitutes does: nowhere.
    index = jnp.where(ok, index, num_examples)
    new_rows = rows.scatter(specs, state.rows, index, aux.rows, num_examples)
    guard = _advance_guard(state.guard, value, ok, state.step)
    new_state = TrainState(state.step + 1, *kept, new_rows, guard)
    metrics = dict(aux.metrics) | {
      'loss': value,
      'grad_norm': norm,
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
  """Compiles `update` with shardings; the state is donated, teachers are not.

  Args:
    update: from `make_update`.
    state: the state or its shapes.
    teachers: name -> parameters or their shapes.
    mesh: device mesh.
    overrides: of `sharding.shardings`.
  """
  state_at = sharding.shardings(state, mesh, overrides)
  teachers_at = sharding.shardings(teachers, mesh, overrides)
  return jax.jit(
    update,
    in_shardings=(state_at, teachers_at, None),
    out_shardings=(state_at, sharding.replicated(mesh)),
    donate_argnums=0,
  )


def end_windows(state: TrainState, phase: base.Phase, done: int) -> TrainState:
  """Returns the state after what is due between two steps of a phase.

  Args:
    state: after a step; its copies of rows are donated where they are due.
    phase: the phase.
    done: steps of the phase that the state has seen.
  """
  kept = rows.end_windows(phase.row_specs, state.rows, done)
  return dataclasses.replace(state, rows=kept)


def ema_teachers(phase: base.Phase, ema: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the averages that teachers of this phase read."""
  prefix = '@ema/'
  return {
    name: ema[teacher.source.removeprefix(prefix)]
    for name, teacher in phase.teachers.items()
    if teacher.source.startswith(prefix)
  }


def _accumulate(grad: Callable[..., Any], micro: int) -> Callable[..., Any]:
  """Wraps value_and_grad to run over micro-batches and average.

  Args:
    grad: (parameters, batch, number of the micro-batch or None).
    micro: micro-batches per step.
  """
  if micro == 1:
    return lambda params, batch: grad(params, batch, None)

  def averaged(params: Any, batch: Mapping[str, Any]) -> Any:
    shared = {k: x for k, x in batch.items() if not x.ndim}
    # Interleaved, so that each device splits only what it already holds.
    split = {
      k: jnp.moveaxis(x.reshape(-1, micro, *x.shape[1:]), 1, 0)
      for k, x in batch.items()
      if x.ndim
    }

    def body(total: Any, numbered: tuple[Any, Any]) -> tuple[Any, Any]:
      number, part = numbered
      (value, aux), grads = grad(params, part | shared, number)
      total = jax.tree.map(jnp.add, total, (value, aux.metrics, grads))
      return total, aux.rows

    first = jax.tree.map(lambda x: x[0], split)
    numbers = jnp.arange(micro, dtype=jnp.int32)
    (value, aux), grads = jax.eval_shape(
      grad, params, first | shared, numbers[0]
    )
    zero = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), (value, aux.metrics, grads)
    )
    total, row_parts = jax.lax.scan(body, zero, (numbers, split))
    value, metrics, grads = jax.tree.map(lambda x: x / micro, total)
    new_rows = jax.tree.map(
      lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), row_parts
    )
    return (value, base.Aux(metrics, new_rows)), grads

  return averaged


def _accept(
  value: jax.Array, norm: jax.Array, history: jax.Array, skip_spike: float
) -> tuple[jax.Array, jax.Array]:
  """Returns whether to take the step, and loss over its running median."""
  ratio = value / jnp.nanmedian(history)
  ratio = jnp.where(jnp.isnan(ratio), 1.0, ratio)
  ok = jnp.isfinite(value) & jnp.isfinite(norm)
  if skip_spike:
    ok &= ratio < skip_spike
  return ok, ratio


def _advance_guard(
  guard: Mapping[str, Any], value: jax.Array, ok: jax.Array, step: jax.Array
) -> dict[str, Any]:
  """Counts the step and remembers its loss if it was accepted."""
  history = guard['history']
  here = jnp.arange(HISTORY) == step % HISTORY
  return {
    'skipped': guard['skipped'] + (~ok).astype(jnp.int32),
    'streak': jnp.where(ok, 0, guard['streak'] + 1),
    'history': jnp.where(here & ok, value.astype(jnp.float32), history),
  }


def _average(
  phase: base.Phase, ema: Mapping[str, Any], params: Any, done: jax.Array
) -> dict[str, Any]:
  """Moves each average towards the new parameters."""
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
