"""Linear probe of pooled tokens, or of baselines without an encoder."""

import jax
from jaxtyping import Array, Key

from vssl_jax.evals import features
from vssl_jax.evals.probe import results, train_heads
from vssl_jax.models import readout


def fit(
  train: features.Table,
  test: features.Table,
  *,
  classes: int,
  settings: train_heads.Settings | None = None,
  batch_size: int = 256,
  key: Key[Array, ''] | None = None,
) -> results.Results:
  """Trains a grid of linear heads on features in memory and tests them.

  Args:
    train: training rows; their tokens are averaged.
    test: one row per test video.
    classes: number of classes.
    settings: how the heads are trained.
    batch_size: rows per step.
    key: key of initial values and order; None for that of seed 0.
  """
  return train_heads.on_tables(
    readout.Linear(classes),
    settings or train_heads.Settings(),
    train,
    test,
    batch_size=batch_size,
    key=jax.random.key(0) if key is None else key,
  )
