"""AdamW or SGD with the schedules that methods need, over a tree of labels.

Learning rate and weight decay are functions of the step inside the phase and
not of the optimizer's own count, so a skipped step does not shift them.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float, Int

from vssl_jax import ranges, trees
from vssl_jax.methods import base
from vssl_jax.train import freezing, layer_decay

# Number of the step, from 1 and counted over the run -> value. The first step
# of a phase of S steps takes the value at 1 and the last one that at S, where
# `lr_end` and `weight_decay_end` are reached. V-JEPA's code counts so;
# VideoMAE's and MVD's count from 0, and their first step moves nothing.
Schedule = Callable[[Int[Array, ''] | int], Float[Array, '']]


RATE = ranges.Real(0, 1e3)
KEYS = ranges.Section(  # SALT's published values
  # lr, lr_start and lr_end are for batches of lr_batch clips; they are
  # multiplied by (batch / lr_batch) ** lr_power. The result is printed.
  lr=(6.25e-4, RATE),
  lr_start=(2e-4, RATE),
  lr_end=(1e-6, RATE),
  lr_batch=(3072, ranges.Whole(1, ranges.MANY)),
  # 1.0: linear rule (VideoMAE); 0.0: no scaling
  lr_power=(0.5, ranges.Real(0, 2)),
  # 'constant': constant, then linear cooldown
  schedule=('cosine', ranges.Choice(('cosine', 'constant'))),
  # steps; -1: the smaller of 10,000 and a quarter of the phase
  warmup=(-1, ranges.Whole(-1, ranges.MANY)),
  # steps at the end of a 'constant' schedule
  cooldown=(0, ranges.Whole(0, ranges.MANY)),
  weight_decay=(0.04, RATE),
  weight_decay_end=(0.4, RATE),  # cosine over the phase
  # Whether mask tokens and other learned tokens [1, D] are decayed, as in the
  # codes of V-JEPA and MVD; VideoMAE's leaves them out.
  decay_tokens=(True, ranges.Flag()),
  # 'sgd': momentum b1; weight decay is added to the gradient in front of
  # it, as in torch. b2 and eps have no meaning there.
  rule=('adamw', ranges.Choice(('adamw', 'sgd'))),
  b1=(0.9, ranges.Real(0, below=1)),
  b2=(0.95, ranges.Real(0, below=1)),
  eps=(1e-8, ranges.Real(ranges.LEAST, 1)),
  clip=(0.02, ranges.Real(0)),  # global norm; 0: none
  # 'per_role': encoder and predictor apart
  clip_scope=('joint', ranges.Choice(('joint', 'per_role'))),
  # Factor on the learning rate from one block of the encoder to the one
  # before it, counted from the head; 1.0: the same for all.
  layer_decay=(1.0, ranges.Real(high=1, above=0)),
  # Micro-batches per step, at least 1. Masks, rows and the mean of a loss
  # over clips stay what they are with 1. Drop path, dropout and mixing
  # draw anew for each micro-batch, and clips mix within it; a mean over
  # labelled clips is taken within each micro-batch.
  accumulate=(1, ranges.Whole(1, 2**20)),
  # Skip a step whose loss is this many times the running median; 0: never.
  # Steps with a loss or gradient that is not finite are always skipped.
  skip_spike=(0.0, ranges.Real(above=1, also=(0,))),
)

default = KEYS.defaults


@dataclasses.dataclass(frozen=True)
class Horizon:
  """The stretch of steps that a schedule covers.

  Attributes:
    start: its first step, counted over the run.
    steps: its length.
    warmup: warm-up steps asked for by the phase; None for the config's.
    rewarm_at: first step of the phase, counted over the run.
    rewarm: (steps, factor), see `base.Phase`.
  """

  start: int
  steps: int
  warmup: int | None = None
  rewarm_at: int = 0
  rewarm: tuple[int, float] = (0, 1.0)


def horizon(phase: base.Phase, start: int, covers: tuple[int, int]) -> Horizon:
  """Returns what the schedules of a phase cover.

  Args:
    phase: the phase.
    start: its first step, counted over the run.
    covers: first step and length of the stretch, see `run.spans`.
  """
  return Horizon(*covers, phase.warmup, start, phase.rewarm)


def warmup_steps(
  optim: ml_collections.ConfigDict, horizon: Horizon, phase: str = ''
) -> int:
  """Returns the warm-up of a phase in steps.

  Raises:
    ValueError: it is as long as the phase or longer.
  """
  steps = optim.warmup if horizon.warmup is None else horizon.warmup
  if steps < 0:
    steps = min(10_000, horizon.steps // 4)
  if steps >= horizon.steps:
    raise ValueError(
      f'optim.warmup: found {steps} steps in a phase {phase!r} of '
      f'{horizon.steps}; the learning rate would never reach its peak. Set a '
      'shorter warm-up, or -1 for a quarter of the phase'
    )
  return steps


def lr_scale(optim: ml_collections.ConfigDict, batch_size: int) -> float:
  """Returns the factor on the learning rates for this batch size."""
  return (batch_size / optim.lr_batch) ** optim.lr_power


def describe_lr(optim: ml_collections.ConfigDict, batch_size: int) -> str:
  """Returns the learning rate as a formula with its result."""
  factor = (
    f' * ({batch_size}/{optim.lr_batch})^{optim.lr_power:g}'
    if optim.lr_power
    else ''
  )
  peak = optim.lr * lr_scale(optim, batch_size)
  return f'lr = {optim.lr:g}{factor} = {peak:.3g}'


def learning_rate(
  optim: ml_collections.ConfigDict, horizon: Horizon, batch_size: int
) -> Schedule:
  """Returns number of the step, from 1 -> learning rate."""
  scale = lr_scale(optim, batch_size)
  start, peak, end = (
    x * scale for x in (optim.lr_start, optim.lr, optim.lr_end)
  )
  warmup = warmup_steps(optim, horizon)
  rest = horizon.steps - warmup
  if optim.schedule == 'cosine':
    alpha = end / peak if peak else 0.0
    after = optax.cosine_decay_schedule(peak, rest, alpha=alpha)
  elif optim.schedule == 'constant':
    down = min(optim.cooldown, rest)
    after = optax.join_schedules(
      [
        optax.constant_schedule(peak),
        optax.linear_schedule(peak, end, max(down, 1)),
      ],
      [rest - down if down else rest],
    )
  else:
    raise ValueError(
      f"optim.schedule: found {optim.schedule!r}, wanted 'cosine' or 'constant'"
    )
  joined = optax.join_schedules(
    [optax.linear_schedule(start, peak, max(warmup, 1)), after], [warmup]
  )
  steps, factor = horizon.rewarm

  def schedule(step: Any) -> Float[Array, '']:
    rate = jnp.asarray(joined(step - horizon.start), jnp.float32)
    done = jnp.clip((step - horizon.rewarm_at) / max(steps, 1), 0.0, 1.0)
    return rate * (factor + (1 - factor) * done) if steps else rate

  return schedule


def weight_decay(
  optim: ml_collections.ConfigDict, horizon: Horizon
) -> Schedule:
  """Returns number of the step, from 1 -> weight decay: half a cosine."""
  first, last = optim.weight_decay, optim.weight_decay_end

  def schedule(step: Any) -> Float[Array, '']:
    done = (step - horizon.start) / horizon.steps
    return last + (first - last) * 0.5 * (1 + jnp.cos(math.pi * done))

  return schedule


def decayed(params: Any, decay_tokens: bool) -> Any:
  """Returns True for leaves that weight decay acts on.

  Matrices are decayed; biases, norms and position tables are not. A token
  [1, D] is a matrix by shape, and counts as one where `decay_tokens` is set.
  """

  def one(name: str, x: Any) -> bool:
    last = name.rsplit('/', maxsplit=1)[-1]
    if x.ndim < 2 or 'position' in last:
      return False
    return decay_tokens or 'token' not in last

  return trees.map_named(one, params)


def make(
  optim: ml_collections.ConfigDict,
  labels: Any,
  lr: Schedule,
  decay: Schedule,
) -> optax.GradientTransformationExtraArgs:
  """Makes the optimizer; `update` takes the keyword `step`.

  Clipping sits inside the trained branch, so that its norm, like the logged
  one, is that of the trained leaves alone.

  Args:
    optim: `config.optim`.
    labels: `freezing.labels`.
    lr: step -> learning rate.
    decay: step -> weight decay.
  """
  if optim.clip_scope not in ('joint', 'per_role'):
    raise ValueError(
      f'optim.clip_scope: found {optim.clip_scope!r}, wanted '
      "'joint' or 'per_role'"
    )

  if optim.rule not in ('adamw', 'sgd'):
    raise ValueError(
      f"optim.rule: found {optim.rule!r}, wanted 'adamw' or 'sgd'"
    )

  def trained() -> optax.GradientTransformationExtraArgs:
    clip = [optax.clip_by_global_norm(optim.clip)] if optim.clip else []
    if optim.rule == 'sgd':
      return optax.chain(
        *clip,
        _decay(decay, optim.decay_tokens),
        optax.trace(optim.b1),
        _scale(lr),
      )
    return optax.chain(
      *clip,
      optax.scale_by_adam(optim.b1, optim.b2, optim.eps),
      _decay(decay, optim.decay_tokens),
      _scale(lr),
    )

  branches = labels if optim.clip_scope == 'joint' else _by_role(labels)
  tx = optax.multi_transform(
    {
      branch: optax.set_to_zero() if branch == freezing.FREEZE else trained()
      for branch in sorted({freezing.FREEZE, *jax.tree.leaves(branches)})
    },
    branches,
  )
  if optim.layer_decay == 1.0:
    return tx
  # Behind the branches, which see their own leaves only: a rate goes by all
  # blocks of the encoder, frozen ones too.
  return optax.chain(tx, layer_decay.scale(optim.layer_decay))


def _by_role(labels: Any) -> Any:
  """Returns `labels` with the role in that of every trained leaf."""

  def one(name: str, label: str) -> str:
    role = name.split('/', maxsplit=1)[0]
    return label if label == freezing.FREEZE else f'{label}_{role}'

  return trees.map_named(one, labels)


def _decay(
  decay: Schedule, decay_tokens: bool
) -> optax.GradientTransformationExtraArgs:
  """Turns a direction u into u + decay * p."""

  def update(
    updates: Any, state: Any, params: Any, *, step: Any, **_: Any
  ) -> tuple[Any, Any]:
    wd, mask = decay(step), decayed(params, decay_tokens)
    updates = jax.tree.map(
      lambda u, p, d: u + wd * p if d else u, updates, params, mask
    )
    return updates, state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )


def _scale(lr: Schedule) -> optax.GradientTransformationExtraArgs:
  """Turns a direction u into -lr * u."""

  def update(
    updates: Any, state: Any, params: Any = None, *, step: Any, **_: Any
  ) -> tuple[Any, Any]:
    rate = lr(step)
    return jax.tree.map(lambda u: -rate * u, updates), state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )
