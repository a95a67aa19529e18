"""PMD's memory of what is hard: losses of patches, smoothed over visits.

Pure functions of arrays [B, N] over all patches of a clip; `hidden` says which
of them this step predicts. Source: PMD (CVPR 2026), secondary; `README.md`
lists what its text leaves open.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

PARTS = ('both', 'smooth', 'weights')


class Difficulty(NamedTuple):
  """The difficulty-aware loss of each clip.

  Attributes:
    loss: [B].
    smoothed: [B, N], the new memory; as it was where a patch is visible.
    weights: [B, N], 0 where a patch is visible; a clip's sum to 1.
  """

  loss: Float[Array, 'B']
  smoothed: Float[Array, 'B N']
  weights: Float[Array, 'B N']


def weigh(
  loss: Float[Array, 'B N'],
  hidden: Bool[Array, 'B N'],
  value: Float[Array, 'B N'],
  window: Float[Array, 'B N'],
  *,
  alpha: float,
  tau: float,
  parts: str = 'both',
) -> Difficulty:
  """Returns the sum of smoothed losses, weighed by their difficulty.

  Lhat = alpha * loss + (1 - alpha) * value; w = softmax(window / tau) over the
  hidden patches; the loss is sum(w * Lhat). Memory and weights are constants:
  the gradient is that of w * alpha * loss.

  Args:
    loss: of each patch; only hidden ones count.
    hidden: patches that are predicted.
    value: smoothed loss after the last visit; 0 before the first.
    window: the same as it stood at the end of the last window.
    alpha: weight of the new loss.
    tau: temperature.
    parts: `smooth` has uniform weights, `weights` does not smooth the loss.
  """
  if parts not in PARTS:
    raise ValueError(f'dare: found {parts!r}, wanted one of {PARTS}')
  value, window = jax.lax.stop_gradient((value, window))
  smoothed = alpha * loss + (1 - alpha) * value
  score = jnp.zeros_like(window) if parts == 'smooth' else window / tau
  weights = jax.nn.softmax(score, axis=1, where=hidden)
  weights = jnp.where(hidden, weights, 0.0)
  term = loss if parts == 'weights' else smoothed
  return Difficulty(
    jnp.sum(weights * jnp.where(hidden, term, 0.0), axis=1),
    jax.lax.stop_gradient(jnp.where(hidden, smoothed, value)),
    weights,
  )


def evenness(
  weights: Float[Array, 'B N'], hidden: Bool[Array, 'B N']
) -> Float[Array, '']:
  """Returns the mean entropy of weights over that of uniform ones."""
  logs = jnp.log(jnp.where(weights > 0, weights, 1.0))
  most = jnp.log(jnp.sum(hidden, axis=1).astype(jnp.float32))
  entropy = -jnp.sum(weights * logs, axis=1)
  return jnp.mean(entropy / jnp.maximum(most, 1e-6))


def align(
  mapped: Mapping[int, Float[Array, 'B V D']],
  groups: tuple[tuple[range, Float[Array, 'B V D']], ...],
) -> Float[Array, '']:
  """Returns CLFA's distance of student layers to deeper teacher layers.

  Over all pairs of layers the mean square is that to the mean of the teacher's
  group, which is what this is, plus the spread of `condense`, a constant.

  Args:
    mapped: student layer (from 1) -> its tokens in the teacher's width.
    groups: student layers, and the mean of the teacher layers they follow.
  """
  total = jnp.zeros(())
  for students, mean in groups:
    each = [jnp.mean(jnp.square(mapped[n] - mean)) for n in students]
    total += jnp.mean(jnp.stack(each))
  return total


def condense(
  layers: Sequence[Float[Array, 'B N D']],
) -> tuple[Float[Array, 'B N D'], Float[Array, 'B N']]:
  """Returns the mean of some layers, and their mean square around it."""
  stacked = jnp.stack([x.astype(jnp.float32) for x in layers])
  mean = jnp.mean(stacked, axis=0, keepdims=True)
  return mean[0], jnp.mean(jnp.square(stacked - mean), axis=(0, 3))


def thirds(depth: int) -> tuple[range, range, range]:
  """Returns the layers (from 1) of the shallow, middle and deep third.

  Raises:
    ValueError: fewer than three layers.
  """
  if depth < 3:
    raise ValueError(
      f'alignment needs encoders of 3 blocks or more, found {depth}; set '
      'lambda_al=0 or take a deeper encoder'
    )
  a, b = depth // 3, 2 * depth // 3
  return range(1, a + 1), range(a + 1, b + 1), range(b + 1, depth + 1)


def aligned(depth: int) -> tuple[int, ...]:
  """Returns the student's layers (from 1) that follow a teacher's."""
  shallow, middle, _ = thirds(depth)
  return (*shallow, *middle)
