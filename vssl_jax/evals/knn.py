"""Nearest neighbours: a measure of features that trains nothing.

The vote is DINOv2's (`dinov2/eval/knn.py`): weights are a softmax of the
cosine similarities of the 200 nearest, summed per class over the first k.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

NEAREST = 200
CHUNK = 4096


def predict(
  bank: Float[np.ndarray, 'n D'],
  bank_labels: Int[np.ndarray, 'n'],
  queries: Float[np.ndarray, 'm D'],
  ks: Sequence[int],
  *,
  temperature: float = 0.07,
  chunk: int = CHUNK,
) -> dict[int, Int[np.ndarray, 'm']]:
  """Returns the class voted for each query.

  Args:
    bank: features with known labels; all features are scaled to length 1.
    bank_labels: their classes, from 0.
    queries: features to classify.
    ks: numbers of neighbours; those above the size of the bank are left out.
    temperature: of the softmax over similarities.
    chunk: rows compared at once; no result depends on it.

  Returns:
    k -> classes. Equal votes go to the lower class.

  Raises:
    ValueError: no k fits, or a label of the bank is negative.
  """
  ks = [k for k in ks if 0 < k <= len(bank)]
  if not ks:
    raise ValueError(
      f'kNN: no k fits a bank of {len(bank)} clips; wanted 1 to {len(bank)}'
    )
  if np.min(bank_labels) < 0:
    raise ValueError('kNN: the bank holds clips without a label (-1)')
  classes = int(np.max(bank_labels)) + 1
  nearest = min(max(NEAREST, *ks), len(bank))
  unit, labels = _unit(bank), np.asarray(bank_labels)
  out: dict[int, list[np.ndarray]] = {k: [] for k in ks}
  for start in range(0, len(queries), chunk):
    query = jnp.asarray(_unit(queries[start : start + chunk]))
    similar, found = _search(query, unit, labels, nearest, chunk)
    for k in ks:
      votes = _vote(similar, found, k, classes, jnp.float32(temperature))
      out[k].append(np.asarray(votes))
  return {k: np.concatenate(parts) for k, parts in out.items()}


def accuracy(
  bank: Float[np.ndarray, 'n D'],
  bank_labels: Int[np.ndarray, 'n'],
  queries: Float[np.ndarray, 'm D'],
  query_labels: Int[np.ndarray, 'm'],
  k: int = 20,
) -> float:
  """Returns the fraction of queries that k neighbours classify rightly.

  A bank of fewer than k clips votes as a whole.
  """
  k = min(k, len(bank))
  found = predict(bank, bank_labels, queries, (k,))[k]
  return float(np.mean(found == np.asarray(query_labels)))


def _unit(x: np.ndarray) -> np.ndarray:
  x = np.asarray(x, np.float32)
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _search(
  query: Float[Array, 'q D'],
  bank: np.ndarray,
  labels: np.ndarray,
  nearest: int,
  chunk: int,
) -> tuple[Float[Array, 'q r'], Int[Array, 'q r']]:
  """Returns similarity and label of the nearest, the most similar first."""
  best = jnp.zeros((len(query), 0))
  best_labels = jnp.zeros((len(query), 0), jnp.int32)
  for start in range(0, len(bank), chunk):
    stop = start + chunk
    best, best_labels = _merge(
      query,
      jnp.asarray(bank[start:stop]),
      jnp.asarray(labels[start:stop], jnp.int32),
      best,
      best_labels,
      nearest,
    )
  return best, best_labels


@functools.partial(jax.jit, static_argnames='nearest')
def _merge(
  query: Array,
  bank: Array,
  labels: Array,
  best: Array,
  best_labels: Array,
  nearest: int,
) -> tuple[Array, Array]:
  # Products of lower precision, the default on some devices, reorder
  # neighbours that are nearly as close.
  similar = jnp.matmul(query, bank.T, precision=lax.Precision.HIGHEST)
  similar = jnp.concatenate([best, similar], axis=1)
  many = jnp.broadcast_to(labels[None], (len(query), len(labels)))
  many = jnp.concatenate([best_labels, many], axis=1)
  best, at = lax.top_k(similar, min(nearest, similar.shape[1]))
  return best, jnp.take_along_axis(many, at, axis=1)


@functools.partial(jax.jit, static_argnames=('k', 'classes'))
def _vote(
  similar: Array, labels: Array, k: int, classes: int, temperature: Array
) -> Int[Array, 'q']:
  weight = jax.nn.softmax(similar / temperature, axis=1)[:, :k]
  hit = jax.nn.one_hot(labels[:, :k], classes)
  return jnp.argmax(jnp.einsum('qk,qkc->qc', weight, hit), axis=1)
