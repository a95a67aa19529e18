"""Trains depth readouts on tokens, and adds up how far off they are."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from vssl_jax.evals import depth_error, features, heads, probe
from vssl_jax.models import readout

Rows = Iterable[features.Tokens]
LOSSES = {'mse': depth_error.mse, 'l1': depth_error.l1}


@dataclasses.dataclass
class Trained:
  """A grid of trained depth readouts.

  Attributes:
    spec: of the heads.
    state: of the heads.
    mean: metres, the mean of the training clips at each pixel: what can be
      said without looking.
    selected: head with the smallest AbsRel on held-out training examples, the
      only one if there is one, or None.
    held_out: pixels that chose it.
    history: mean loss of each head in each epoch.
  """

  spec: heads.Spec
  state: heads.State
  mean: Float[np.ndarray, 'T H W']
  selected: int | None
  held_out: int
  history: list[dict[str, Any]]


def fit(
  network: readout.Dense,
  settings: probe.Settings,
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
    train: epoch -> batches of training rows. Held-out examples may be among
      them and count for nothing.
    steps_per_epoch: batches in each epoch.
    held: () -> one pass over rows of the held-out training examples; others
      may be among them.
    loss: `mse` or `l1`.
    key: of the heads' first values.
    log: gets each entry of the history.

  Raises:
    ValueError: there are no training batches.
  """
  spec = settings.spec(network, steps_per_epoch, loss=LOSSES[loss])
  fraction = settings.held_out_fraction if held else 0.0
  state, history, seen = None, [], None
  for epoch in range(1, settings.epochs + 1):
    losses = []
    for rows in train(epoch - 1):
      weight = probe.without_held(rows.index, rows.weight, fraction)
      state, value = _step(spec, state, rows, weight, key)
      losses.append(value)
      if epoch == 1:
        part = _seen(rows.depth, weight)
        seen = part if seen is None else jax.tree.map(jnp.add, seen, part)
    if state is None:
      raise ValueError('depth: there are no training batches')
    mean = np.mean([features.fetch(x) for x in losses], axis=0)
    history.append({'epoch': epoch, 'loss': mean.tolist()})
    log(history[-1])
  chosen = _choose(spec, state, held() if fraction else None, fraction)
  total, number = (features.fetch(x).sum(0) for x in seen)
  return Trained(spec, state, _fill(total, number), *chosen, history)


def _step(
  spec: heads.Spec,
  state: heads.State | None,
  rows: features.Tokens,
  weight: Float[Array, 'R'],
  key: Key[Array, ''],
) -> tuple[heads.State, Array]:
  """Takes a step, the first one with untrained heads."""
  if state is None:
    state = heads.init(spec, key, rows.tokens)
  drops = probe.drops(key, spec, state)
  return heads.update(spec, state, rows.tokens, rows.depth, weight, drops)


def _choose(
  spec: heads.Spec, state: heads.State, held: Rows | None, fraction: float
) -> tuple[int | None, int]:
  """Returns the best head on held-out rows and the pixels that chose it."""
  if held is None:
    return (0 if len(spec.pairs) == 1 else None), 0
  found, _ = add_up(spec, state, held, fraction)
  error = np.where(np.isnan(found['abs_rel']), np.inf, found['abs_rel'])
  return int(error.argmin()), int(found['pixels'][0])


@jax.jit
def _seen(
  depth: Float[Array, 'R T H W'], weight: Float[Array, 'R']
) -> tuple[Float[Array, 'R T H W'], Float[Array, 'R T H W']]:
  """Returns the depth at each pixel and whether there is one.

  Rows stay apart: a sum over them, on several devices at once with a step that
  it does not wait for, may hang on a CPU.
  """
  valid = (depth > 0) * weight[:, None, None, None]
  return depth * valid, valid


def _fill(total: np.ndarray, count: np.ndarray) -> np.ndarray:
  """Returns the mean at each pixel, of all where a pixel was never seen."""
  everywhere = total.sum() / max(count.sum(), 1)
  mean = np.where(count > 0, total / np.maximum(count, 1), everywhere)
  return mean.astype(np.float32)


def add_up(
  spec: heads.Spec,
  state: heads.State,
  batches: Rows,
  held: float = 0.0,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Returns the figures of each head over rows, in any order.

  Args:
    spec: of the heads.
    state: of the heads.
    batches: rows.
    held: count only the held-out examples of this fraction; 0 for all.

  Returns:
    As predicted, and with the median of each clip aligned to the truth's.
  """
  totals = depth_error.Total(), depth_error.Total()
  for rows in batches:
    weight = features.fetch(rows.weight)
    if held:
      weight = weight * probe.held_out(features.fetch(rows.index), held)
    predicted = heads.outputs(spec, state, rows.tokens)
    for total, found in zip(totals, judge(predicted, rows.depth), strict=True):
      total.add(found, weight)
  return totals[0].figures(), totals[1].figures()


def judge(
  predicted: Float[Array, 'R K T H W'], truth: Float[Array, 'R T H W']
) -> tuple[depth_error.Sums, depth_error.Sums]:
  """Returns the sums [R, K] of each head, as predicted and aligned."""
  found = []
  for head in range(predicted.shape[1]):
    p = predicted[:, head]
    aligned = depth_error.align(p, truth)
    found.append([depth_error.sums(x, truth) for x in (p, aligned)])
  return tuple(
    depth_error.Sums(
      *(
        np.stack([features.fetch(x) for x in column], 1)
        for column in zip(*sums, strict=True)
      )
    )
    for sums in zip(*found, strict=True)
  )
