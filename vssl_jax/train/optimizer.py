"""AdamW and SGD with learning-rate and weight-decay schedules and freezing.

Learning rate and weight decay are functions of the step of the run, not of the
optimizer's own count, so a skipped step does not shift them.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float, Int

from vssl_jax import trees
from vssl_jax.methods import phase as phase_lib
from vssl_jax.train import freezing
from vssl_jax.utils import ranges

# Step number, counted over the run from 1 -> value. A phase of S steps uses the
# values at 1 to S, and reaches `lr_end` and `weight_decay_end` at S. V-JEPA's
# code also counts from 1. VideoMAE's and MVD's count from 0; their first step
# does not change the parameters.
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
  # steps; -1: the smaller of 10,000 and a quarter of the schedule
  warmup=(-1, ranges.Whole(-1, ranges.MANY)),
  # steps at the end of a 'constant' schedule
  cooldown=(0, ranges.Whole(0, ranges.MANY)),
  weight_decay=(0.04, RATE),
  weight_decay_end=(0.4, RATE),  # cosine over the schedule
  # Whether mask tokens and other learned tokens [1, D] are decayed, as in the
  # codes of V-JEPA and MVD; VideoMAE's leaves them out.
  decay_tokens=(True, ranges.Flag()),
  # 'sgd': momentum b1; weight decay is added to the gradient before
  # momentum, as in torch. b2 and eps are not used.
  rule=('adamw', ranges.Choice(('adamw', 'sgd'))),
  b1=(0.9, ranges.Real(0, below=1)),
  b2=(0.95, ranges.Real(0, below=1)),
  eps=(1e-8, ranges.Real(ranges.LEAST, 1)),
  clip=(0.02, ranges.Real(0)),  # global norm; 0: none
  # 'per_role': encoder and predictor are clipped separately
  clip_scope=('joint', ranges.Choice(('joint', 'per_role'))),
  # Factor on the learning rate from one block of the encoder to the one
  # before it, counted from the head; 1.0: the same for all.
  layer_decay=(1.0, ranges.Real(high=1, above=0)),
  # Micro-batches per step, at least 1. Masks, example memory and the mean
  # of a loss over clips are the same as with 1. Drop path, dropout and
  # mixing draw new random numbers for each micro-batch. Clips are mixed,
  # and means over labelled clips are taken, within a micro-batch.
  accumulate=(1, ranges.Whole(1, 2**20)),
  # Skip a step whose loss is this many times the running median; 0: never.
  # Steps with a loss or gradient that is not finite are always skipped.
  skip_spike=(0.0, ranges.Real(above=1, also=(0,))),
)

default = KEYS.defaults


@dataclasses.dataclass(frozen=True)
class Horizon:
  """The range of steps that a schedule covers.

  Attributes:
    start: completed steps of the run before it.
    steps: its length.
    warmup: warm-up steps set by the phase; None for `optim.warmup`.
    rewarm_at: completed steps of the run before the phase.
    rewarm: (steps, factor), see `phase.Phase`.
  """

  start: int
  steps: int
  warmup: int | None = None
  rewarm_at: int = 0
  rewarm: tuple[int, float] = (0, 1.0)


def horizon(
  phase: phase_lib.Phase, start: int, covers: tuple[int, int]
) -> Horizon:
  """Returns the `Horizon` of a phase's schedules.

  Args:
    phase: the phase.
    start: completed steps of the run before it.
    covers: first step and number of steps of the range, see `run.spans`.
  """
  return Horizon(*covers, phase.warmup, start, phase.rewarm)


def warmup_steps(
  optim: ml_collections.ConfigDict, horizon: Horizon, phase: str = ''
) -> int:
  """Returns the number of warm-up steps of a phase.

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
  """Returns the factor on the learning rates for a batch size in clips."""
  return (batch_size / optim.lr_batch) ** optim.lr_power


def describe_lr(optim: ml_collections.ConfigDict, batch_size: int) -> str:
  """Returns the peak learning rate as a formula with its result."""
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
  """Returns the schedule: step number, from 1 -> learning rate."""
  scale = lr_scale(optim, batch_size)
  start, peak, end = (
    x * scale for x in (optim.lr_start, optim.lr, optim.lr_end)
  )
  warmup = warmup_steps(optim, horizon)
  decay_steps = horizon.steps - warmup
  if optim.schedule == 'cosine':
    alpha = end / peak if peak else 0.0
    main_schedule = optax.cosine_decay_schedule(peak, decay_steps, alpha=alpha)
  elif optim.schedule == 'constant':
    cooldown = min(optim.cooldown, decay_steps)
    main_schedule = optax.join_schedules(
      [
        optax.constant_schedule(peak),
        optax.linear_schedule(peak, end, max(cooldown, 1)),
      ],
      [decay_steps - cooldown if cooldown else decay_steps],
    )
  else:
    raise ValueError(
      f"optim.schedule: found {optim.schedule!r}, wanted 'cosine' or 'constant'"
    )
  joined = optax.join_schedules(
    [optax.linear_schedule(start, peak, max(warmup, 1)), main_schedule],
    [warmup],
  )
  steps, factor = horizon.rewarm

  def schedule(step: Any) -> Float[Array, '']:
    rate = jnp.asarray(joined(step - horizon.start), jnp.float32)
    fraction = jnp.clip((step - horizon.rewarm_at) / max(steps, 1), 0.0, 1.0)
    return rate * (factor + (1 - factor) * fraction) if steps else rate

  return schedule


def weight_decay(
  optim: ml_collections.ConfigDict, horizon: Horizon
) -> Schedule:
  """Returns the schedule: step number, from 1 -> weight decay (half cosine)."""
  first, last = optim.weight_decay, optim.weight_decay_end

  def schedule(step: Any) -> Float[Array, '']:
    fraction = (step - horizon.start) / horizon.steps
    return last + (first - last) * 0.5 * (1 + jnp.cos(math.pi * fraction))

  return schedule


def decayed(params: Any, decay_tokens: bool) -> Any:
  """Returns a tree of booleans: True for leaves with weight decay.

  Matrices are decayed; biases, norms and position tables are not. A token
  [1, D] has the shape of a matrix and is decayed if `decay_tokens` is set.
  """

  def is_decayed(name: str, x: Any) -> bool:
    last = name.rsplit('/', maxsplit=1)[-1]
    if x.ndim < 2 or 'position' in last:
      return False
    return decay_tokens or 'token' not in last

  return trees.map_named(is_decayed, params)


def make(
  optim: ml_collections.ConfigDict,
  labels: Any,
  lr: Schedule,
  decay: Schedule,
) -> optax.GradientTransformationExtraArgs:
  """Builds the optimizer; its `update` takes the keyword `step`.

  Clipping is part of the trained branch, so that its norm, like the logged
  one, covers the trained leaves only.

  Args:
    optim: `config.optim`.
    labels: `freezing.labels`.
    lr: step -> learning rate.
    decay: step -> weight decay.

  Raises:
    ValueError: `clip_scope` or `rule` is not a known value.
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
  # After the branches, because each sees only its own leaves: the factor
  # depends on the number of all encoder blocks, frozen ones included.
  return optax.chain(tx, scale_by_layer(optim.layer_decay))


def _by_role(labels: Any) -> Any:
  """Returns `labels` with the role appended to the label of trained leaves."""

  def add_role(name: str, label: str) -> str:
    role = name.split('/', maxsplit=1)[0]
    return label if label == freezing.FREEZE else f'{label}_{role}'

  return trees.map_named(add_role, labels)


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


_BLOCK = re.compile(r'encoder/block_(\d+)/')
# Name prefixes of the encoder leaves after its blocks.
_AFTER_BLOCKS = ('encoder/norm/',)


def layer_scales(params: Any, decay: float) -> Any:
  """Returns the layer-wise learning-rate factor of every leaf.

  Args:
    params: role -> tree; the role `encoder` has blocks.
    decay: factor from one block to the one before it.

  Raises:
    ValueError: the encoder has no leaves named `block_00` and so on.
  """
  matches = [_BLOCK.match(name) for name, _ in trees.named_leaves(params)]
  if not any(matches):
    raise ValueError(
      f'optim.layer_decay: found {decay}, but the encoder has no leaves named '
      'block_00 and so on; wanted 1.0 for such an encoder'
    )
  num_blocks = 1 + max(int(m[1]) for m in matches if m)

  def leaf_factor(name: str, _: Any) -> float:
    block = _BLOCK.match(name)
    if block:
      return decay ** (num_blocks - int(block[1]))
    if not name.startswith('encoder/') or name.startswith(_AFTER_BLOCKS):
      return 1.0
    return decay ** (num_blocks + 1)

  return trees.map_named(leaf_factor, params)


def scale_by_layer(decay: float) -> optax.GradientTransformation:
  """Returns a transformation that multiplies updates by `layer_scales`.

  Args:
    decay: see `layer_scales`; 1.0 for none.

  Raises:
    ValueError: `decay` is not in (0, 1].
  """
  if not 0 < decay <= 1:
    raise ValueError(
      f'optim.layer_decay: found {decay}, wanted more than 0, at most 1'
    )

  def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
    factors = layer_scales(params, decay)
    return jax.tree.map(lambda u, f: f * u, updates, factors), state

  return optax.GradientTransformation(lambda _: optax.EmptyState(), update)
