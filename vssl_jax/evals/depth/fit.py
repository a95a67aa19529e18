"""Trains depth readouts on tokens and computes their errors."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from vssl_jax.evals import features
from vssl_jax.evals.depth import errors
from vssl_jax.evals.probe import head_grid, train_heads
from vssl_jax.models import readout

Rows = Iterable[features.Tokens]
LOSSES = {'mse': errors.mse, 'l1': errors.l1}


@dataclasses.dataclass
class Trained:
  """A grid of trained depth readouts.

  Attributes:
    spec: spec of the heads.
    state: state of the heads.
    mean: metres, the mean of the training clips at each pixel: a baseline
      that ignores its input.
    selected: head with the smallest AbsRel on held-out training examples, the
      only one if there is one, or None.
    held_out: number of held-out pixels that chose it.
    history: mean loss of each head in each epoch.
  """

  spec: head_grid.Spec
  state: head_grid.State
  mean: Float[np.ndarray, 'T H W']
  selected: int | None
  held_out: int
  history: list[dict[str, Any]]


def fit(
  network: readout.Dense,
  settings: train_heads.Settings,
  *,
  train: Callable[[int], Rows],
  steps_per_epoch: int,
  held: Callable[[], Rows] | None = None,
  loss: str = 'mse',
  key: Key[Array, ''],
  log: Callable[[Mapping[str, Any]], None] = lambda entry: None,
) -> Trained:
  """Trains a grid of depth readouts on frozen features.

  Args:
    network: the readout.
    settings: how it is trained.
    train: epoch -> batches of training rows. They may include held-out
      examples, which are ignored.
    steps_per_epoch: batches in each epoch.
    held: () -> one pass over rows of the held-out training examples. It may
      include other examples.
    loss: `mse` or `l1`.
    key: key of the heads' initial values.
    log: called with each entry of the history.

  Raises:
    ValueError: there are no training batches.
  """
  spec = settings.spec(network, steps_per_epoch, loss=LOSSES[loss])
  fraction = settings.held_out_fraction if held else 0.0
  state, history, depth_sums = None, [], None
  for epoch in range(1, settings.epochs + 1):
    losses = []
    for rows in train(epoch - 1):
      weight = train_heads.without_held(rows.index, rows.weight, fraction)
      state, value = _step(spec, state, rows, weight, key)
      losses.append(value)
      if epoch == 1:
        part = _seen(rows.depth, weight)
        depth_sums = (
          part
          if depth_sums is None
          else jax.tree.map(jnp.add, depth_sums, part)
        )
    if state is None:
      raise ValueError('depth: there are no training batches')
    mean = np.mean([features.fetch(x) for x in losses], axis=0)
    history.append({'epoch': epoch, 'loss': mean.tolist()})
    log(history[-1])
  selection = _choose(spec, state, held() if fraction else None, fraction)
  total, count = (features.fetch(x).sum(0) for x in depth_sums)
  return Trained(spec, state, _fill(total, count), *selection, history)


def _step(
  spec: head_grid.Spec,
  state: head_grid.State | None,
  rows: features.Tokens,
  weight: Float[Array, 'R'],
  key: Key[Array, ''],
) -> tuple[head_grid.State, Array]:
  """Takes one step; the first one initialises the heads."""
  if state is None:
    state = head_grid.init(spec, key, rows.tokens)
  dropout_key = train_heads.drops(key, spec, state)
  return head_grid.update(
    spec, state, rows.tokens, rows.depth, weight, dropout_key
  )


def _choose(
  spec: head_grid.Spec,
  state: head_grid.State,
  held: Rows | None,
  fraction: float,
) -> tuple[int | None, int]:
  """Returns the best head on held-out rows and the number of their pixels."""
  if held is None:
    return (0 if len(spec.pairs) == 1 else None), 0
  figures, _ = add_up(spec, state, held, fraction)
  error = np.where(np.isnan(figures['abs_rel']), np.inf, figures['abs_rel'])
  return int(error.argmin()), int(figures['pixels'][0])


@jax.jit
def _seen(
  depth: Float[Array, 'R T H W'], weight: Float[Array, 'R']
) -> tuple[Float[Array, 'R T H W'], Float[Array, 'R T H W']]:
  """Returns the depth at each pixel and the mask of valid pixels.

  Rows are not summed: on several CPU devices, a sum over rows may hang if it
  runs concurrently with a step that it does not wait for.
  """
  valid = (depth > 0) * weight[:, None, None, None]
  return depth * valid, valid


def _fill(total: np.ndarray, count: np.ndarray) -> np.ndarray:
  """Returns the mean at each pixel, or the overall mean where none is valid."""
  everywhere = total.sum() / max(count.sum(), 1)
  mean = np.where(count > 0, total / np.maximum(count, 1), everywhere)
  return mean.astype(np.float32)


def add_up(
  spec: head_grid.Spec,
  state: head_grid.State,
  batches: Rows,
  held: float = 0.0,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Returns the figures of each head over rows, in any order.

  Args:
    spec: spec of the heads.
    state: state of the heads.
    batches: rows.
    held: count only the held-out examples of this fraction; 0 for all.

  Returns:
    Figures as predicted, and with the median of each clip aligned to the truth.
  """
  totals = errors.Total(), errors.Total()
  for rows in batches:
    weight = features.fetch(rows.weight)
    if held:
      weight = weight * train_heads.held_out(features.fetch(rows.index), held)
    predicted = head_grid.outputs(spec, state, rows.tokens)
    for total, sums in zip(totals, judge(predicted, rows.depth), strict=True):
      total.add(sums, weight)
  return totals[0].figures(), totals[1].figures()


def judge(
  predicted: Float[Array, 'R K T H W'], truth: Float[Array, 'R T H W']
) -> tuple[errors.Sums, errors.Sums]:
  """Returns the error sums [R, K] of each head, as predicted and aligned."""
  by_head = []
  for head in range(predicted.shape[1]):
    p = predicted[:, head]
    aligned = errors.align(p, truth)
    by_head.append([errors.sums(x, truth) for x in (p, aligned)])
  return tuple(
    errors.Sums(
      *(
        np.stack([features.fetch(x) for x in column], 1)
        for column in zip(*sums, strict=True)
      )
    )
    for sums in zip(*by_head, strict=True)
  )
