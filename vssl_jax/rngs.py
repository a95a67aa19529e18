"""Named random streams: adding one never shifts another.

A stream is the run's key folded with a hash of the stream's name, then with
the step, then (for masks and other per-example draws) with the example's
global index. No draw depends on the mesh, on the number of hosts or on the
order of examples in the batch.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Key


def stream(key: Key[Array, ''], name: str) -> Key[Array, '']:
  """Returns `key` folded with a hash of `name` that is stable for ever.

  Args:
    key: a typed key (`jax.random.key`).
    name: any text; `mask/short` and `mask/long` are unrelated streams.
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
  """

  key: Key[Array, '']
  step: Any

  def stream(self, name: str) -> Key[Array, '']:
    """Returns the key of stream `name` at this step."""
    return jax.random.fold_in(stream(self.key, name), self.step)

  def per_example(self, name: str, batch: Mapping[str, Any]) -> Key[Array, 'B']:
    """Returns one key per example of the batch.

    Args:
      name: the stream.
      batch: needs `index` int32 [B], the global example index, and may hold
        `repeat` int32 [B], which tells apart several clips of one example.

    Returns:
      Typed keys [B] that depend on (seed, name, step, index, repeat) alone.
    """
    key = self.stream(name)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(batch['index'])
    if 'repeat' in batch:
      keys = jax.vmap(jax.random.fold_in)(keys, batch['repeat'])
    return keys
