"""A linear probe of vectors: pooled tokens, or baselines that learn nothing."""

import jax
from jaxtyping import Array, Key

from vssl_jax.evals import features, outcome, probe
from vssl_jax.models import readout


def fit(
  train: features.Table,
  test: features.Table,
  *,
  classes: int,
  settings: probe.Settings | None = None,
  batch_size: int = 256,
  key: Key[Array, ''] | None = None,
) -> outcome.Outcome:
  """Trains a grid of linear heads on features in memory and tests them.

  Args:
    train: training rows; their tokens are averaged.
    test: one row per test video.
    classes: number of classes.
    settings: how the heads are trained.
    batch_size: rows per step.
    key: of first values and order; that of seed 0 when None.
  """
  return probe.on_tables(
    readout.Linear(classes),
    settings or probe.Settings(),
    train,
    test,
    batch_size=batch_size,
    key=jax.random.key(0) if key is None else key,
  )
