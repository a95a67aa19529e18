"""Accuracies of a grid of heads.

Two accuracies are reported. `max` is that of the best head on the test clips,
as published probes report it; this choice is biased upwards. `selected` is
that of the head chosen on held-out training clips (a tenth by default), which
no head was trained on. A single head is both, and is trained on all of them.
"""

import dataclasses
from typing import Any

import numpy as np

from vssl_jax.utils import statistics


@dataclasses.dataclass(frozen=True)
class Results:
  """Accuracies of all heads.

  Attributes:
    pairs: (learning rate, weight decay) of each head.
    correct: test videos that each head classified correctly.
    top5: test videos whose class was among the head's five likeliest.
    total: number of test videos.
    held: fraction of held-out videos that each head classified correctly, or
      None.
    held_total: number of held-out videos.
    selected: head chosen on the held-out videos, the only one if there is
      one, or None.
    history: one entry per test: epoch, losses and accuracies.
    predictions: videos [n], true classes [n] and predicted ones [n, heads].
  """

  pairs: list[tuple[float, float]]
  correct: np.ndarray
  top5: np.ndarray
  total: int
  held: np.ndarray | None
  held_total: int
  selected: int | None
  history: list[dict[str, Any]]
  predictions: tuple[np.ndarray, np.ndarray, np.ndarray]

  @property
  def best(self) -> int:
    """The head with most test videos correct."""
    return int(np.argmax(self.correct))

  def accuracy(self, head: int) -> dict[str, Any]:
    """Returns accuracy, 95 % interval and grid point of a head."""
    count = int(self.correct[head])
    low, high = statistics.interval(count, self.total)
    lr, wd = self.pairs[head]
    return {
      'accuracy': count / self.total,
      'interval': [low, high],
      'top5': int(self.top5[head]) / self.total,
      'lr': lr,
      'wd': wd,
    }

  def summary(self) -> dict[str, Any]:
    """Returns the report entries on the heads."""
    out: dict[str, Any] = {
      'max': self.accuracy(self.best),
      'median': float(np.median(self.correct)) / self.total,
      'heads': len(self.pairs),
      'evaluated': self.total,
      'held_out': self.held_total,
    }
    if self.selected is not None:
      out['selected'] = self.accuracy(self.selected)
    return out
