"""k-nearest-neighbour classification: evaluates features without training.

Votes are weighted as in DINOv2 (`dinov2/eval/knn.py`): weights are the softmax
over cosine similarities of the 200 nearest, summed per class over the first k.
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
  """Predicts the class of each query by a weighted vote of its neighbours.

  Args:
    bank: labelled features; all features are normalised to length 1.
    bank_labels: their classes, from 0.
    queries: features to classify.
    ks: numbers of neighbours; those larger than the bank are left out.
    temperature: temperature of the softmax over similarities.
    chunk: rows compared at once; does not affect the result.

  Returns:
    k -> classes. Ties go to the lower class.

  Raises:
    ValueError: all ks are out of range, or a label of the bank is negative.
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
  predictions: dict[int, list[np.ndarray]] = {k: [] for k in ks}
  for start in range(0, len(queries), chunk):
    query = jnp.asarray(_unit(queries[start : start + chunk]))
    similar, nearest_labels = _search(query, unit, labels, nearest, chunk)
    for k in ks:
      votes = _vote(
        similar, nearest_labels, k, classes, jnp.float32(temperature)
      )
      predictions[k].append(np.asarray(votes))
  return {k: np.concatenate(parts) for k, parts in predictions.items()}


def accuracy(
  bank: Float[np.ndarray, 'n D'],
  bank_labels: Int[np.ndarray, 'n'],
  queries: Float[np.ndarray, 'm D'],
  query_labels: Int[np.ndarray, 'm'],
  k: int = 20,
) -> float:
  """Returns the accuracy of kNN classification as a fraction.

  If the bank has fewer than k clips, all of them vote.
  """
  k = min(k, len(bank))
  predicted = predict(bank, bank_labels, queries, (k,))[k]
  return float(np.mean(predicted == np.asarray(query_labels)))


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
  """Returns similarities and labels of the nearest, in descending order."""
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
  # Lower matmul precision, the default on some devices, would reorder
  # neighbours of similar distance.
  similar = jnp.matmul(query, bank.T, precision=lax.Precision.HIGHEST)
  similar = jnp.concatenate([best, similar], axis=1)
  all_labels = jnp.broadcast_to(labels[None], (len(query), len(labels)))
  all_labels = jnp.concatenate([best_labels, all_labels], axis=1)
  best, indices = lax.top_k(similar, min(nearest, similar.shape[1]))
  return best, jnp.take_along_axis(all_labels, indices, axis=1)


@functools.partial(jax.jit, static_argnames=('k', 'classes'))
def _vote(
  similar: Array, labels: Array, k: int, classes: int, temperature: Array
) -> Int[Array, 'q']:
  weight = jax.nn.softmax(similar / temperature, axis=1)[:, :k]
  hit = jax.nn.one_hot(labels[:, :k], classes)
  return jnp.argmax(jnp.einsum('qk,qkc->qc', weight, hit), axis=1)
