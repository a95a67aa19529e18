"""Spread and rank of features, and intervals of accuracies."""

import numpy as np
import scipy.stats
from jaxtyping import Float


def rankme(features: Float[np.ndarray, 'n D'], eps: float = 1e-7) -> float:
  """Returns the effective rank of features: exp(entropy of the spectrum).

  Source: RankMe (arXiv 2210.02885), Eq. 1. Equal singular values give their
  number, a single one gives 1, features that are all zero give 0.

  Args:
    features: one row per clip, not centred.
    eps: added to each share of the spectrum.
  """
  values = np.linalg.svd(np.asarray(features, np.float64), compute_uv=False)
  if not values.sum() > 0:
    return 0.0
  share = values / values.sum() + eps
  return float(np.exp(-(share * np.log(share)).sum()))


def interval(
  correct: int, total: int, confidence: float = 0.95
) -> tuple[float, float]:
  """Returns Wilson's interval of an accuracy, as fractions.

  Unlike the normal approximation it stays inside [0, 1] and is honest for few
  clips. It speaks of the sample of clips, not of training seeds.
  """
  found = scipy.stats.binomtest(correct, total).proportion_ci(
    confidence, method='wilson'
  )
  return float(found.low), float(found.high)
