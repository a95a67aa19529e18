"""Named random streams: adding a stream does not change the others.

The key of a stream is the run's key, folded with a hash of the stream's name
and then with the step. `per_example` (masks) also folds in the global index of
the example; `per_batch` (drop path, dropout, mixing) folds in the index of the
micro-batch. No draw depends on the mesh or on the number of hosts. Draws per
example depend neither on the order of examples in the batch nor on
`optim.accumulate`.
"""

import dataclasses
import zlib
from typing import Any

import jax
from jaxtyping import Array, Key


def stream(key: Key[Array, ''], name: str) -> Key[Array, '']:
  """Returns `key` folded with a hash of `name`, equal in every process.

  Args:
    key: a typed key (`jax.random.key`).
    name: any text; `mask/short` and `mask/long` are independent streams.
  """
  # crc32 and not hash(): the latter changes from one process to the next.
  return jax.random.fold_in(key, zlib.crc32(name.encode()))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rng:
  """All randomness of one train step: the run's key and the step.

  Attributes:
    key: typed key of the run, the same at every step.
    step: int32 scalar, may be traced.
    micro_batch: int32 scalar, index of the micro-batch if the step
      accumulates gradients; else None.
  """

  key: Key[Array, '']
  step: Any
  micro_batch: Any = None

  def stream(self, name: str) -> Key[Array, '']:
    """Returns the key of stream `name` at this step."""
    return jax.random.fold_in(stream(self.key, name), self.step)

  def per_batch(self, name: str) -> Key[Array, '']:
    """Returns a key for draws that depend on the position in the batch.

    Each micro-batch of a step has its own key. With a common key, the first
    examples of all micro-batches would drop the same branches.
    """
    key = self.stream(name)
    if self.micro_batch is None:
      return key
    return jax.random.fold_in(key, self.micro_batch)

  def per_example(self, name: str, batch: Any) -> Key[Array, 'B']:
    """Returns one key per example of the batch.

    Args:
      name: the stream.
      batch: has `index`, int32 [B], the number of each example, and `repeat`,
        int32 [B], which distinguishes several clips of one example, or None.

    Returns:
      Typed keys [B] that depend only on (seed, name, step, index, repeat).
    """
    key = self.stream(name)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(batch.index)
    if batch.repeat is not None:
      keys = jax.vmap(jax.random.fold_in)(keys, batch.repeat)
    return keys
