"""Effective rank of features, and confidence intervals of accuracies."""

import numpy as np
import scipy.stats
from jaxtyping import Float


def rankme(features: Float[np.ndarray, 'n D'], eps: float = 1e-7) -> float:
  """Returns the effective rank of features: exp(entropy of the spectrum).

  Source: RankMe (arXiv 2210.02885), Eq. 1. The result is n for n equal singular
  values, 1 for a single one, and 0 if all features are zero.

  Args:
    features: one row per clip, not centred.
    eps: added to each normalised singular value.
  """
  values = np.linalg.svd(np.asarray(features, np.float64), compute_uv=False)
  if not values.sum() > 0:
    return 0.0
  share = values / values.sum() + eps
  return float(np.exp(-(share * np.log(share)).sum()))


def interval(
  correct: int, total: int, confidence: float = 0.95
) -> tuple[float, float]:
  """Returns the Wilson score interval of an accuracy, as fractions.

  Unlike the normal approximation it stays inside [0, 1] and is accurate for few
  clips. It covers the sampling of clips, not the variance of training seeds.

  Args:
    correct: number of correctly classified clips.
    total: number of clips.
    confidence: confidence level, a fraction.
  """
  bounds = scipy.stats.binomtest(correct, total).proportion_ci(
    confidence, method='wilson'
  )
  return float(bounds.low), float(bounds.high)
