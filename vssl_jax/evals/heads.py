"""Many readouts trained at once: a grid of learning rates and weight decays.

All heads see the same tokens in one jitted step, so the frozen encoder runs
once per batch however many heads there are. AdamW with betas (.9, .999) on
all parameters, cosine to 0, no warm-up (V-JEPA 2's evaluation).
"""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from vssl_jax.models import readout as readout_lib

Readout = readout_lib.Attentive | readout_lib.Linear


@dataclasses.dataclass(frozen=True)
class Spec:
  """What is trained; static under jit.

  Attributes:
    readout: (tokens, weight, train) -> logits.
    lrs: learning rates of the grid.
    wds: weight decays of the grid; every head is a pair of the two.
    steps: length of the schedule.
    groups: parts that the heads are trained in, one after the other within a
      step: less memory for activations and gradients, the same result.
  """

  readout: Readout
  lrs: tuple[float, ...]
  wds: tuple[float, ...]
  steps: int
  groups: int = 1

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
  """Returns untrained heads, each from a key of its own.

  Args:
    spec: what is trained.
    key: of all heads.
    tokens: an example, for its shape.
  """
  weight = jnp.ones(tokens.shape[0])

  def one(head: Array) -> tuple[Any, Any, Any]:
    variables = dict(
      spec.readout.init(jax.random.fold_in(key, head), tokens, weight)
    )
    params = variables.pop('params')
    return params, variables, _ADAM.init(params)

  heads = jnp.arange(len(spec.pairs))
  return State(jnp.int32(0), *jax.lax.map(one, heads))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def update(
  spec: Spec,
  state: State,
  tokens: Float[Array, 'R N D'],
  label: Int[Array, 'R'],
  weight: Float[Array, 'R'],
) -> tuple[State, Float[Array, 'H']]:
  """Takes one step with all heads.

  Args:
    spec: what is trained.
    state: donated.
    tokens: features; no gradient flows into them.
    label: classes; rows below 0 count for nothing.
    weight: 0 leaves a row out.

  Returns:
    The new state and the loss of each head.
  """
  weight = weight * (label >= 0)
  cosine = 0.5 * (1 + jnp.cos(jnp.pi * state.step / spec.steps))

  def loss(params: Any, stats: Any) -> tuple[Array, Any]:
    logits, new = spec.readout.apply(
      {'params': params, **stats}, tokens, weight, True, mutable=list(stats)
    )
    each = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    mean = jnp.sum(each * weight) / jnp.maximum(jnp.sum(weight), 1e-6)
    return mean, dict(new)

  def one(head: tuple[Any, ...]) -> tuple[Any, ...]:
    params, stats, opt, lr, wd = head
    (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(
      params, stats
    )
    step, opt = _ADAM.update(gradient, opt)
    # Every parameter decays, biases too: that is how it was published.
    params = jax.tree.map(
      lambda p, s: p - lr * cosine * (s + wd * p), params, step
    )
    return params, stats, opt, value

  lr, wd = (jnp.asarray(x, jnp.float32) for x in zip(*spec.pairs, strict=True))
  *new, value = _over_heads(
    spec, one, (state.params, state.stats, state.opt, lr, wd)
  )
  return State(state.step + 1, *new), value


@functools.partial(jax.jit, static_argnums=0)
def predict(
  spec: Spec, state: State, tokens: Float[Array, 'R N D']
) -> Float[Array, 'R H K']:
  """Returns the class probabilities of each head."""
  weight = jnp.ones(tokens.shape[0])

  def one(head: tuple[Any, Any]) -> Array:
    params, stats = head
    logits = spec.readout.apply({'params': params, **stats}, tokens, weight)
    return jax.nn.softmax(logits)

  found = _over_heads(spec, one, (state.params, state.stats))
  return jnp.swapaxes(found, 0, 1)


def _over_heads(spec: Spec, one: Any, heads: Any) -> Any:
  """Maps over heads: all at once, or group after group."""
  if spec.groups == 1:
    return jax.vmap(one)(heads)
  size = len(spec.pairs) // spec.groups
  return jax.lax.map(one, heads, batch_size=size)
