"""Trains probe heads on frozen tokens; held-out clips choose the head."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jaxtyping import Array, Float, Int, Key

from vssl_jax import rngs
from vssl_jax.data.sources import holdout
from vssl_jax.evals import features, multi_view
from vssl_jax.evals.probe import head_grid, options, results

Rows = Iterable[features.Tokens]
Log = Callable[[Mapping[str, Any]], None]

KEYS, default, network = options.KEYS, options.default, options.network
held_out = holdout.held_out


@dataclasses.dataclass(frozen=True)
class Settings:
  """Training options of the heads.

  Attributes:
    epochs: passes over the training clips.
    lrs: learning rates of the grid.
    wds: weight decays of the grid.
    groups: parts of the grid trained one after the other.
    eval_every: epochs between tests; 0 for one at the end.
    holdout: fraction of the training videos that chooses the head, if there
      are several.
    warmup: steps in which the learning rate rises from 0.
    decay: parameters that decay, `all` or `matrices`.
  """

  epochs: int = 20
  lrs: tuple[float, ...] = options.LRS
  wds: tuple[float, ...] = options.WDS
  groups: int = 1
  eval_every: int = 0
  holdout: float = 0.1
  warmup: int = 0
  decay: str = 'all'

  @classmethod
  def of(cls, config: ml_collections.ConfigDict) -> 'Settings':
    """Returns the settings in `config.probe`."""
    return cls(**{f.name: config[f.name] for f in dataclasses.fields(cls)})

  @property
  def pairs(self) -> list[tuple[float, float]]:
    """(learning rate, weight decay) of each head."""
    return list(itertools.product(self.lrs, self.wds))

  @property
  def held_out_fraction(self) -> float:
    """Fraction of the training videos that no head is trained on.

    A single head leaves nothing to choose and is trained on all of them.
    """
    return self.holdout if len(self.pairs) > 1 else 0.0

  def spec(
    self, network: head_grid.Readout, steps: int, **more: Any
  ) -> head_grid.Spec:
    """Returns the spec for a readout and a number of steps per epoch."""
    return head_grid.Spec(
      network,
      tuple(self.lrs),
      tuple(self.wds),
      self.epochs * steps,
      self.groups,
      self.warmup,
      self.decay,
      **more,
    )


@dataclasses.dataclass(frozen=True)
class Epochs:
  """Training rows, epoch by epoch.

  Attributes:
    train: epoch number -> batches. They may include held-out videos, which are
      ignored.
    steps: batches in each epoch.
    held: () -> one pass over rows of the held-out training videos. It may
      include other videos. None if no videos are held out.
  """

  train: Callable[[int], Rows]
  steps: int
  held: Callable[[], Rows] | None = None


def measure(
  network: head_grid.Readout,
  settings: Settings,
  epochs: Epochs,
  *,
  test: Callable[[], Rows],
  views: int = 1,
  key: Key[Array, ''],
  log: Log = lambda entry: None,
) -> results.Results:
  """Trains a grid of heads on frozen features and tests them.

  Args:
    network: the readout.
    settings: how it is trained.
    epochs: the training rows.
    test: () -> one pass over the test rows.
    views: number of views per test video.
    key: key of the heads' initial values.
    log: called with each entry of the history.

  Raises:
    ValueError: there are no training batches, or views are missing.
  """
  spec, held = settings.spec(network, epochs.steps), epochs.held
  fraction = settings.held_out_fraction if held else 0.0
  state, history = None, []
  for epoch in range(1, settings.epochs + 1):
    losses = []
    for rows in epochs.train(epoch - 1):
      if state is None:
        state = head_grid.init(spec, key, rows.tokens)
      weight = without_held(rows.index, rows.weight, fraction)
      state, loss = head_grid.update(
        spec, state, rows.tokens, rows.label, weight, drops(key, spec, state)
      )
      losses.append(loss)
    if state is None:
      raise ValueError('probe: there are no training batches')
    is_last = epoch == settings.epochs
    if is_last or (settings.eval_every and epoch % settings.eval_every == 0):
      test_predictions = count(spec, state, test(), views)
      entry = {
        'epoch': epoch,
        'loss': np.mean([features.fetch(x) for x in losses], axis=0).tolist(),
        'accuracy': (
          test_predictions.correct() / test_predictions.total
        ).tolist(),
      }
      history.append(entry)
      log(entry)
  held_predictions = None
  if fraction:
    held_predictions = count(spec, state, held(), 1, fraction)
  return _outcome(spec, test_predictions, held_predictions, history)


def without_held(
  index: Int[Array, 'R'], weight: Float[Array, 'R'], fraction: float
) -> Float[Array, 'R']:
  """Returns the weights with those of held-out videos set to 0."""
  if not fraction:
    return weight
  is_kept = ~held_out(features.fetch(index), fraction)
  return weight * jax.device_put(is_kept.astype(np.float32), weight.sharding)


def drops(
  key: Key[Array, ''], spec: head_grid.Spec, state: head_grid.State
) -> Key[Array, ''] | None:
  """Returns the dropout key of this step; None if there is no dropout."""
  if not getattr(spec.readout, 'dropout', 0.0):
    return None
  return jax.random.fold_in(rngs.stream(key, 'dropout'), state.step)


def count(
  spec: head_grid.Spec,
  state: head_grid.State,
  batches: Rows,
  views: int,
  held: float = 0.0,
) -> multi_view.Predictions:
  """Returns the predictions of trained heads for rows.

  Args:
    spec: spec of the heads.
    state: state of the heads.
    batches: rows, in any order.
    views: number of views per video.
    held: count only the held-out videos of this fraction; 0 for all.

  Raises:
    ValueError: no clip has a label.
  """
  predictions = multi_view.Predictions(views)
  for rows in batches:
    weight = features.fetch(rows.weight)
    index = features.fetch(rows.index)
    if held:
      weight = weight * held_out(index, held)
    label = features.fetch(rows.label)
    predictions.add(
      features.fetch(head_grid.predict(spec, state, rows.tokens)),
      label,
      index,
      features.fetch(rows.view),
      weight * (label >= 0),
    )
  if not predictions.total:
    raise ValueError('probe: there are no labelled clips to test on')
  return predictions


def _outcome(
  spec: head_grid.Spec,
  tested: multi_view.Predictions,
  chosen: multi_view.Predictions | None,
  history: list[dict[str, Any]],
) -> results.Results:
  held, selected = None, None
  if len(spec.pairs) == 1:
    selected = 0
  if chosen is not None:
    held = chosen.correct() / chosen.total
    # Few clips give many ties: the smaller loss decides.
    selected = int(np.lexsort((chosen.loss(), -held))[0])
  return results.Results(
    pairs=spec.pairs,
    correct=tested.correct(),
    top5=tested.correct(5),
    total=tested.total,
    held=held,
    held_total=chosen.total if chosen is not None else 0,
    selected=selected,
    history=history,
    predictions=tested.predictions(),
  )


def on_tables(
  network: head_grid.Readout,
  settings: Settings,
  train: features.Table,
  test: features.Table | Callable[[], Rows],
  *,
  batch_size: int = 256,
  views: int = 1,
  key: Key[Array, ''],
  mesh: jax.sharding.Mesh | None = None,
  log: Log = lambda entry: None,
) -> results.Results:
  """Trains a grid of heads on features in memory and tests them.

  Args:
    network: the readout.
    settings: how it is trained.
    train: training rows.
    test: test rows, or a function that returns a pass over them.
    batch_size: rows per step; a smaller table is one padded batch.
    views: rows per test video.
    key: key of initial values and order.
    mesh: devices that each batch is sharded over.
    log: called with each entry of the history.
  """
  epochs = kept(
    train,
    settings.held_out_fraction,
    batch_size,
    seed=jax.random.key_data(key).astype(np.uint32).tolist(),
    mesh=mesh,
  )

  def test_rows() -> Rows:
    return test.batches(batch_size, mesh=mesh)

  return measure(
    network,
    settings,
    epochs,
    test=test_rows if isinstance(test, features.Table) else test,
    views=views,
    key=key,
    log=log,
  )


def kept(
  table: features.Table,
  fraction: float,
  batch_size: int,
  *,
  seed: Sequence[int],
  mesh: jax.sharding.Mesh | None = None,
) -> Epochs:
  """Returns epochs over features in memory, in a new order each time.

  Args:
    table: rows of training videos.
    fraction: fraction of the videos that is held out to choose the head.
    batch_size: rows per step; a smaller table is one padded batch.
    seed: seed of the orders.
    mesh: devices that each batch is sharded over.
  """
  is_held_out = held_out(table.index, fraction)
  train_table, held_table = table.take(~is_held_out), table.take(is_held_out)

  def train(number: int) -> Rows:
    rng = np.random.default_rng([*seed, number])
    return train_table.batches(batch_size, rng=rng, mesh=mesh)

  def held() -> Rows:
    return held_table.batches(batch_size, mesh=mesh)

  steps = max(len(train_table) // batch_size, 1)
  return Epochs(train, steps, held if is_held_out.any() else None)
