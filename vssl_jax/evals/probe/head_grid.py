"""Trains readouts at once: a grid of learning rates and weight decays.

All heads read the same tokens in one jitted step, so the frozen encoder runs
once per batch for any number of heads. AdamW with betas (.9, .999) and cosine
decay to 0; by default with weight decay on all parameters and without a
warm-up (V-JEPA 2's evaluation).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from vssl_jax.models import readout as readout_lib

Readout = (
  readout_lib.Attentive
  | readout_lib.Linear
  | readout_lib.CrossAttention
  | readout_lib.Dense
)
# (outputs [R, ...], targets [R, ...], weights [R]) -> a scalar
Loss = Callable[[Array, Array, Array], Array]
DECAYED = ('all', 'matrices')


def cross_entropy(
  logits: Float[Array, 'R K'],
  label: Int[Array, 'R'],
  weight: Float[Array, 'R'],
) -> Float[Array, '']:
  """Returns the weighted mean of the rows' cross-entropies."""
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
  return jnp.sum(losses * weight) / jnp.maximum(jnp.sum(weight), 1e-6)


@dataclasses.dataclass(frozen=True)
class Spec:
  """Training of a grid of heads; static under jit.

  Attributes:
    readout: (tokens, weight, train) -> logits.
    lrs: learning rates of the grid.
    wds: weight decays of the grid; each head has one pair of the two.
    steps: length of the schedule.
    groups: number of groups that are trained one after the other within a step.
      More groups need less memory for activations and gradients, and give the
      same result. Parameters and moments of all heads stay in memory.
    warmup: steps in which the learning rate rises from 0.
    decay: `all` parameters, or `matrices`: those of two axes or more.
    loss: loss of one head.
  """

  readout: Readout
  lrs: tuple[float, ...]
  wds: tuple[float, ...]
  steps: int
  groups: int = 1
  warmup: int = 0
  decay: str = 'all'
  loss: Loss = cross_entropy

  def __post_init__(self) -> None:
    if not self.pairs or self.groups < 1 or len(self.pairs) % self.groups:
      raise ValueError(
        f'probe.groups: found {self.groups}, wanted a divisor of the '
        f'{len(self.pairs)} heads ({len(self.lrs)} lrs x {len(self.wds)} wds)'
      )
    if self.steps < 1:
      raise ValueError(
        f'probe: found {self.steps} training steps, wanted at least 1; raise '
        'probe.epochs'
      )
    if not 0 <= self.warmup < self.steps:
      raise ValueError(
        f'probe.warmup: found {self.warmup}, wanted 0 or more and less than '
        f'the {self.steps} training steps'
      )
    if self.decay not in DECAYED:
      raise ValueError(
        f'probe.decay: found {self.decay!r}, wanted one of {DECAYED}'
      )

  @property
  def pairs(self) -> list[tuple[float, float]]:
    """(learning rate, weight decay) of each head."""
    return list(itertools.product(self.lrs, self.wds))


class State(NamedTuple):
  """Heads in training; every leaf but `step` has a leading axis of heads."""

  step: Int[Array, '']
  params: Any
  stats: Any
  opt: Any


_ADAM = optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)


@functools.partial(jax.jit, static_argnums=0)
def init(
  spec: Spec, key: Key[Array, ''], tokens: Float[Array, 'R N D']
) -> State:
  """Returns untrained heads, each initialised from its own key.

  Args:
    spec: training of the heads.
    key: key that the heads' keys are folded from.
    tokens: an example batch, for its shape.
  """
  weight = jnp.ones(tokens.shape[0])

  def init_head(head: Array) -> tuple[Any, Any, Any]:
    variables = dict(
      spec.readout.init(jax.random.fold_in(key, head), tokens, weight)
    )
    params = variables.pop('params')
    return params, variables, _ADAM.init(params)

  heads = jnp.arange(len(spec.pairs))
  return State(jnp.int32(0), *jax.lax.map(init_head, heads))


def update(
  spec: Spec,
  state: State,
  tokens: Float[Array, 'R N D'],
  target: Int[Array, 'R'] | Float[Array, 'R ...'],
  weight: Float[Array, 'R'],
  key: Key[Array, ''] | None = None,
) -> tuple[State, Float[Array, 'H']]:
  """Takes one optimizer step with all heads.

  Args:
    spec: training of the heads.
    state: donated.
    tokens: features; no gradient flows into them.
    target: classes, where rows below 0 are ignored; or other targets of the
      loss.
    weight: weight of each row; 0 leaves it out.
    key: dropout key.

  Returns:
    The new state and the loss of each head.
  """
  lr, wd = (jnp.asarray(x, jnp.float32) for x in zip(*spec.pairs, strict=True))
  hyperparams, heads = (lr, wd, jnp.arange(len(lr))), tuple(state[1:])
  batch = (state.step, tokens, target, weight, key)
  if spec.groups == 1:
    heads, values = step(spec, heads, hyperparams, *batch)
    return State(state.step + 1, *heads), values
  # One program per group: a loop inside one program would hold all heads
  # twice.
  losses = []
  for number in range(spec.groups):
    index = jnp.int32(number)
    group, group_hyperparams = (
      _group(spec, index, heads),
      _group(spec, index, hyperparams),
    )
    group, values = step(spec, group, group_hyperparams, *batch)
    heads = _put(spec, index, heads, group)
    losses.append(values)
  return State(state.step + 1, *heads), jnp.concatenate(losses)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def step(
  spec: Spec,
  heads: tuple[Any, ...],
  given: tuple[Array, ...],
  done: Int[Array, ''],
  tokens: Float[Array, 'R N D'],
  target: Int[Array, 'R'] | Float[Array, 'R ...'],
  weight: Float[Array, 'R'],
  key: Key[Array, ''] | None = None,
) -> tuple[tuple[Any, ...], Float[Array, 'H']]:
  """Takes one optimizer step with some heads; their state is donated.

  Args:
    spec: training of the heads.
    heads: parameters, statistics and moments.
    given: learning rate, weight decay and index of each head.
    done: number of previous steps.
    tokens: see `update`.
    target: see `update`.
    weight: see `update`.
    key: see `update`.
  """
  if target.ndim == 1:
    weight = weight * (target >= 0)
  # V-JEPA's probe counts steps from 1, so that the last learning rate is 0.
  # 4DS's readouts, which have a warm-up, count from 0 as optax does.
  scale = _schedule(spec)(done if spec.warmup else done + 1)

  def loss(params: Any, stats: Any, rngs: Any) -> tuple[Array, Any]:
    variables = {'params': params, **stats}
    outputs, new = spec.readout.apply(
      variables, tokens, weight, True, mutable=list(stats), rngs=rngs
    )
    return spec.loss(outputs, target, weight), dict(new)

  def step_head(head: tuple[Any, ...]) -> tuple[Any, ...]:
    params, stats, opt, lr, wd, number = head
    rngs = {} if key is None else {'dropout': jax.random.fold_in(key, number)}
    (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(
      params, stats, rngs
    )
    updates, opt = _ADAM.update(gradient, opt)

    # With `all`, biases decay too, as published.
    def apply_update(p: Array, s: Array) -> Array:
      decays = spec.decay == 'all' or p.ndim > 1
      return p - lr * scale * (s + wd * p if decays else s)

    return jax.tree.map(apply_update, params, updates), stats, opt, value

  *new, values = jax.vmap(step_head)((*heads, *given))
  return tuple(new), values


@functools.partial(jax.jit, static_argnums=0)
def _group(spec: Spec, number: Int[Array, ''], heads: Any) -> Any:
  """Returns one group of heads."""
  size = len(spec.pairs) // spec.groups
  return jax.tree.map(
    lambda x: jax.lax.dynamic_slice_in_dim(x, number * size, size), heads
  )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _put(spec: Spec, number: Int[Array, ''], heads: Any, part: Any) -> Any:
  """Returns all heads with one group replaced in place."""
  size = len(spec.pairs) // spec.groups
  return jax.tree.map(
    lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, number * size, 0),
    heads,
    part,
  )


def _schedule(spec: Spec) -> optax.Schedule:
  """Returns step -> learning rate factor, from 0 to 1 and back to 0."""
  if not spec.warmup:
    return optax.cosine_decay_schedule(1.0, spec.steps)
  return optax.warmup_cosine_decay_schedule(0.0, 1.0, spec.warmup, spec.steps)


@functools.partial(jax.jit, static_argnums=0)
def predict(
  spec: Spec, state: State, tokens: Float[Array, 'R N D']
) -> Float[Array, 'R H K']:
  """Returns the class probabilities of each head."""
  return jax.nn.softmax(outputs(spec, state, tokens))


@functools.partial(jax.jit, static_argnums=0)
def outputs(
  spec: Spec, state: State, tokens: Float[Array, 'R N D']
) -> Float[Array, 'R H ...']:
  """Returns the outputs of each head: logits, or a value per pixel."""
  weight = jnp.ones(tokens.shape[0])

  def apply_head(head: tuple[Any, Any]) -> Array:
    params, stats = head
    return spec.readout.apply({'params': params, **stats}, tokens, weight)

  values = _over_heads(spec, apply_head, (state.params, state.stats))
  return jnp.swapaxes(values, 0, 1)


def _over_heads(spec: Spec, one: Any, heads: Any) -> Any:
  """Maps over heads: all at once, or group by group."""
  if spec.groups == 1:
    return jax.vmap(one)(heads)
  size = len(spec.pairs) // spec.groups
  return jax.lax.map(one, heads, batch_size=size)
