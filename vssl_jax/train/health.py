"""Health panel: detects a collapsing encoder during training.

At intervals the encoder computes features of a fixed set of clips, the first
of the run's data. The panel logs the spread and rank of the features and, for
clips with labels, the k-NN accuracy. For every block of the encoder it logs the
norm of the weights and their relative change since the previous panel.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Array, Float

from vssl_jax import sharding, trees
from vssl_jax.data import pipeline
from vssl_jax.utils import knn, metrics, statistics

# A figure below this fraction of its early reference triggers a warning.
COLLAPSE = 0.1
REFERENCE_AT = 0.02  # fraction of the run
WATCHED = tuple(
  f'health/{x}' for x in ('token_variance', 'rankme', 'feature_std')
)
SAMPLED = 65_536  # values sampled per matrix (up to twice as many)

ADVICE = (
  'COLLAPSE? {name} fell to {value:.3g}, from {before:.3g} early in the '
  'training of this encoder. '
  'The features of different clips become similar. If the teacher is an '
  'average of the student, raise its momentum or lower optim.lr; with a frozen '
  'teacher look at target/std and at the variety of the data.'
)


class Panel:
  """Measures the features and weights of the encoder at intervals.

  Args:
    config: `config.health`.
    clips: the run's data; the panel keeps its first batches.
    total: steps of the run.
  """

  def __init__(
    self, config: ml_collections.ConfigDict, clips: pipeline.Clips, total: int
  ) -> None:
    every = config.every
    self._every = max(round(every * total if 0 < every <= 1 else every), 0)
    self._count = config.clips
    self._clips = clips
    self._total = total
    self._held: dict[str, np.ndarray] | None = None
    self._early: Mapping[str, float] = {}
    self._encode: Any = None
    self._phase = ''
    self._weights: dict[str, dict[str, np.ndarray]] = {}

  def due(self, done: int, span_start: int) -> bool:
    """Returns whether the panel runs after this step."""
    if not self._every:
      return False
    early = span_start + max(round(REFERENCE_AT * self._total), 1)
    return done == early or done % self._every == 0

  def look(self, run: Any, span: Any, state: Any, done: int) -> list[str]:
    """Computes and logs the panel; returns warnings.

    Args:
      run: the run; its mesh and logger are used.
      span: the phase and its boundaries.
      state: train state.
      done: completed steps.
    """
    if self._phase != span.phase.name:
      self._phase, self._early = span.phase.name, {}
      if 'params' not in span.phase.carry:
        self._weights = {}  # another encoder: nothing to compare with
      self._encode = jax.jit(
        lambda params, video: _summary(span.phase.encode(params, video))
      )
    values = self._measure(run, state)
    before, self._weights = self._weights, sample(state.params, run.mesh)
    values |= drift(before, self._weights)
    run.logger.write(done, values, phase=span.phase.name)
    self._early = self._early or _first(run, span.phase.name, values)
    return collapsed(values, self._early)

  def _measure(self, run: Any, state: Any) -> dict[str, float]:
    clips = self._hold()
    size = run.config.batch_size // jax.process_count()
    means, spreads = [], []
    for i in range(0, len(clips['video']) - size + 1, size):
      batch = sharding.put_batch(
        {'video': clips['video'][i : i + size]}, run.mesh
      )
      mean, spread = self._encode(state.params, batch['video'])
      means.append(_gather(mean))
      spreads.append(_gather(spread))
    features = np.concatenate(means)
    labels = clips.get('label')
    if labels is not None:
      labels = _gather_host(labels[: len(features) // jax.process_count()])
    return panel(features, np.concatenate(spreads), labels)

  def _hold(self) -> dict[str, np.ndarray]:
    """Returns the first clips of the run; reads them once."""
    if self._held is None:
      num_clips, batches, indices = (
        self._count // jax.process_count(),
        [],
        set(),
      )
      for batch in self._clips.iterator(0):
        batches.append(batch)
        indices.update(batch['index'].tolist())
        count = sum(len(p['index']) for p in batches)
        # A small data set repeats before there are enough clips.
        if count >= num_clips or len(indices) < count:
          break
      keys = [k for k in ('video', 'label') if k in batches[0]]
      self._held = {k: np.concatenate([p[k] for p in batches]) for k in keys}
    return self._held


def _first(
  run: Any, name: str, values: Mapping[str, float]
) -> Mapping[str, float]:
  """Returns the first panel of an encoder, also from an earlier start.

  Args:
    run: the run; its phases and workdir are used.
    name: name of the current phase. The phases before it, back to a fresh
      start, trained the same encoder.
    values: the current panel, which is the first if none is logged.
  """
  family: list[str] = []
  for phase in run.phases:
    family = [*(family if 'params' in phase.carry else ()), phase.name]
    if phase.name == name:
      break
  for line in metrics.read(run.workdir / metrics.FILE):
    figures = {key: line.get(key) for key in WATCHED}
    if line.get('phase') in family and None not in figures.values():
      return figures
  return values


def _summary(
  tokens: Float[Array, 'B N D'],
) -> tuple[Float[Array, 'B D'], Float[Array, 'B']]:
  """Returns the mean token of each clip and the variance of its tokens."""
  tokens = tokens.astype(jnp.float32)
  return jnp.mean(tokens, axis=1), jnp.mean(jnp.var(tokens, axis=1), axis=-1)


def panel(
  features: np.ndarray, spread: np.ndarray, labels: np.ndarray | None = None
) -> dict[str, float]:
  """Computes the health figures from the features of clips.

  Args:
    features: mean tokens [n, D].
    spread: variance of the tokens within each clip [n].
    labels: classes [n], -1 where unknown.
  """
  unit = features / np.maximum(
    np.linalg.norm(features, axis=1, keepdims=True), 1e-12
  )
  n = len(unit)
  similarity = (np.square(unit.sum(0)).sum() - n) / (n * (n - 1))
  values = {
    'health/feature_std': float(features.std(axis=0).mean()),
    'health/rankme': float(statistics.rankme(features)),
    'health/token_variance': float(spread.mean()),
    'health/cosine': float(similarity),
  }
  known = labels is not None and (labels >= 0).all()
  if known and len(np.unique(labels)) > 1 and n >= 16:
    half = n // 2
    values['health/knn'] = knn.accuracy(
      features[:half], labels[:half], features[half:], labels[half:], k=20
    )
  return values


def sample(
  params: Any, mesh: jax.sharding.Mesh
) -> dict[str, dict[str, np.ndarray]]:
  """Samples the matrices of each encoder block at even intervals.

  Small matrices are returned whole.

  Args:
    params: role -> tree; blocks of `encoder` are read.
    mesh: mesh that shards them; every process gets all values.
  """

  def subsample(x: Array) -> Array:
    return x.reshape(-1)[:: max(x.size // SAMPLED, 1)].astype(jnp.float32)

  blocks = {
    name: {n: x for n, x in trees.named_leaves(tree) if x.ndim > 1}
    for name, tree in params['encoder'].items()
    if name.startswith('block_')
  }
  subsample_blocks = jax.jit(
    lambda tree: jax.tree.map(subsample, tree),
    out_shardings=sharding.replicated(mesh),
  )
  return jax.device_get(subsample_blocks(blocks))


def drift(
  before: Mapping[str, Mapping[str, np.ndarray]],
  now: Mapping[str, Mapping[str, np.ndarray]],
) -> dict[str, float]:
  """Returns `norm/block_i`, and `drift/block_i` = |w - w_before| / |w|.

  Args:
    before: block -> leaf -> values at the previous panel; empty at the first. A
      block with other leaves or shapes is not compared.
    now: the same at this panel. The norm is the root mean square of a leaf's
      values, averaged over leaves, so that a sample is enough.
  """
  out = {}
  for name, leaves in now.items():
    sizes = [np.sqrt(np.mean(np.square(x))) for x in leaves.values()]
    out[f'norm/{name}'] = float(np.mean(sizes))
    past = before.get(name, {})
    if {n: x.shape for n, x in leaves.items()} == {
      n: x.shape for n, x in past.items()
    }:
      change = sum(np.sum(np.square(x - past[n])) for n, x in leaves.items())
      total = sum(np.sum(np.square(x)) for x in leaves.values())
      out[f'drift/{name}'] = float(np.sqrt(change / max(total, 1e-30)))
  return out


def collapsed(
  values: Mapping[str, float], before: Mapping[str, float]
) -> list[str]:
  """Returns a warning for each figure that has collapsed."""
  return [
    ADVICE.format(name=name, value=values[name], before=before[name])
    for name in WATCHED
    if values[name] < COLLAPSE * before[name]
  ]


def _gather(x: Array) -> np.ndarray:
  """Gathers a global array on every host."""
  if jax.process_count() == 1:
    return np.asarray(x)
  from jax.experimental import multihost_utils

  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def _gather_host(x: np.ndarray) -> np.ndarray:
  if jax.process_count() == 1:
    return x
  from jax.experimental import multihost_utils

  return np.asarray(multihost_utils.process_allgather(x, tiled=True))
