"""Frozen probes: heads trained on tokens, chosen on held-out training clips."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jaxtyping import Array, Float, Int, Key

from vssl_jax import rngs
from vssl_jax.data import holdout
from vssl_jax.evals import features, heads, options, outcome, votes

Rows = Iterable[features.Tokens]
Log = Callable[[Mapping[str, Any]], None]

KEYS, default, network = options.KEYS, options.default, options.network
held_out = holdout.held_out


@dataclasses.dataclass(frozen=True)
class Settings:
  """How heads are trained.

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
    """Returns what `config.probe` says."""
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

  def spec(self, network: heads.Readout, steps: int, **more: Any) -> heads.Spec:
    """Returns what is trained, given the readout and the steps of an epoch."""
    return heads.Spec(
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
    train: number of the epoch -> batches. Held-out videos may be among them
      and count for nothing.
    steps: batches in each epoch.
    held: () -> one pass over rows of the held-out training videos, others may
      be among them; None where none are held out.
  """

  train: Callable[[int], Rows]
  steps: int
  held: Callable[[], Rows] | None = None


def measure(
  network: heads.Readout,
  settings: Settings,
  epochs: Epochs,
  *,
  test: Callable[[], Rows],
  views: int = 1,
  key: Key[Array, ''],
  log: Log = lambda entry: None,
) -> outcome.Outcome:
  """Trains a grid of heads on frozen features and tests them.

  Args:
    network: the readout.
    settings: how it is trained.
    epochs: the training rows.
    test: () -> one pass over the test rows.
    views: of each test video.
    key: of the heads' first values.
    log: gets each entry of the history.

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
        state = heads.init(spec, key, rows.tokens)
      weight = without_held(rows.index, rows.weight, fraction)
      state, loss = heads.update(
        spec, state, rows.tokens, rows.label, weight, drops(key, spec, state)
      )
      losses.append(loss)
    if state is None:
      raise ValueError('probe: there are no training batches')
    last = epoch == settings.epochs
    if last or (settings.eval_every and epoch % settings.eval_every == 0):
      tested = count(spec, state, test(), views)
      entry = {
        'epoch': epoch,
        'loss': np.mean([features.fetch(x) for x in losses], axis=0).tolist(),
        'accuracy': (tested.correct() / tested.total).tolist(),
      }
      history.append(entry)
      log(entry)
  chosen = None
  if fraction:
    chosen = count(spec, state, held(), 1, fraction)
  return _outcome(spec, tested, chosen, history)


def without_held(
  index: Int[Array, 'R'], weight: Float[Array, 'R'], fraction: float
) -> Float[Array, 'R']:
  """Returns weights that leave held-out videos out."""
  if not fraction:
    return weight
  keep = ~held_out(features.fetch(index), fraction)
  return weight * jax.device_put(keep.astype(np.float32), weight.sharding)


def drops(
  key: Key[Array, ''], spec: heads.Spec, state: heads.State
) -> Key[Array, ''] | None:
  """Returns the key of this step's dropout, None where nothing is dropped."""
  if not getattr(spec.readout, 'dropout', 0.0):
    return None
  return jax.random.fold_in(rngs.stream(key, 'dropout'), state.step)


def count(
  spec: heads.Spec,
  state: heads.State,
  batches: Rows,
  views: int,
  held: float = 0.0,
) -> votes.Votes:
  """Lets trained heads vote on rows.

  Args:
    spec: of the heads.
    state: of the heads.
    batches: rows, in any order.
    views: of each video.
    held: count only the held-out videos of this fraction; 0 for all.
  """
  found = votes.Votes(views)
  for rows in batches:
    weight = features.fetch(rows.weight)
    index = features.fetch(rows.index)
    if held:
      weight = weight * held_out(index, held)
    label = features.fetch(rows.label)
    found.add(
      features.fetch(heads.predict(spec, state, rows.tokens)),
      label,
      index,
      features.fetch(rows.view),
      weight * (label >= 0),
    )
  if not found.total:
    raise ValueError('probe: there are no labelled clips to test on')
  return found


def _outcome(
  spec: heads.Spec,
  tested: votes.Votes,
  chosen: votes.Votes | None,
  history: list[dict[str, Any]],
) -> outcome.Outcome:
  held, selected = None, None
  if len(spec.pairs) == 1:
    selected = 0
  if chosen is not None:
    held = chosen.correct() / chosen.total
    # Few clips give many ties: the more probable truth decides.
    selected = int(np.lexsort((chosen.loss(), -held))[0])
  return outcome.Outcome(
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
  network: heads.Readout,
  settings: Settings,
  train: features.Table,
  test: features.Table | Callable[[], Rows],
  *,
  batch_size: int = 256,
  views: int = 1,
  key: Key[Array, ''],
  mesh: jax.sharding.Mesh | None = None,
  log: Log = lambda entry: None,
) -> outcome.Outcome:
  """Probes training features that are held in memory.

  Args:
    network: the readout.
    settings: how it is trained.
    train: training rows.
    test: test rows, or what makes a pass over them.
    batch_size: rows per step; a smaller table is one padded batch.
    views: rows per test video.
    key: of first values and order.
    mesh: its devices split each batch.
    log: gets each entry of the history.
  """
  epochs = kept(
    train,
    settings.held_out_fraction,
    batch_size,
    seed=jax.random.key_data(key).astype(np.uint32).tolist(),
    mesh=mesh,
  )

  def tests() -> Rows:
    return test.batches(batch_size, mesh=mesh)

  return measure(
    network,
    settings,
    epochs,
    test=tests if isinstance(test, features.Table) else test,
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
    fraction: of the videos that choose the head.
    batch_size: rows per step; a smaller table is one padded batch.
    seed: of the orders.
    mesh: its devices split each batch.
  """
  out = held_out(table.index, fraction)
  rest, chosen = table.take(~out), table.take(out)

  def train(number: int) -> Rows:
    rng = np.random.default_rng([*seed, number])
    return rest.batches(batch_size, rng=rng, mesh=mesh)

  def held() -> Rows:
    return chosen.batches(batch_size, mesh=mesh)

  steps = max(len(rest) // batch_size, 1)
  return Epochs(train, steps, held if out.any() else None)
