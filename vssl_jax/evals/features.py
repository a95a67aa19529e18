"""Computes features of clips: tokens of a frozen encoder, and baselines.

Evaluation data are finite iterables of batches of clips, numpy arrays: `video`
uint8 [B, T, H, W, C], `label` and `index` int32 [B], `weight` float32 [B] (0:
padding), and for several clips per video `view` and `segment` int32 [B]; the
segments of a view are successive rows. Frames with depth add `depth` float32
[B, T, H, W].
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int, UInt8

from vssl_jax import sharding

Encode = Callable[[Any], Array]
Batches = Iterable[Mapping[str, Any]]
# Limit of features kept in memory; above it an error names a remedy.
MAX_TABLE_BYTES = 32 * 2**30


class Tokens(NamedTuple):
  """Features of views of videos, one row per view.

  Attributes:
    tokens: tokens of all segments of the view, concatenated.
    label: class, -1 where unknown.
    index: index of the video.
    view: index of the view.
    weight: 0 for padding.
    depth: metres per pixel, 0 where unknown; None for videos without depth.
  """

  tokens: Float[Array, 'R N D']
  label: Int[Array, 'R']
  index: Int[Array, 'R']
  view: Int[Array, 'R']
  weight: Float[Array, 'R']
  depth: Float[Array, 'R T H W'] | None = None


def encode_batches(
  encode: Encode,
  batches: Batches,
  *,
  segments: int = 1,
  mesh: jax.sharding.Mesh | None = None,
) -> Iterator[Tokens]:
  """Encodes clips and joins the segments of each view along the tokens.

  Args:
    encode: clips [R, T, H, W, C] -> tokens [R, N, D].
    batches: clips, see above; a whole number of views in each batch.
    segments: clips per view.
    mesh: devices that the rows are sharded over; None for one device.

  Yields:
    Tokens [R, segments * N, D] with R = B / segments.

  Raises:
    ValueError: the rows are not whole views in order.
  """
  for batch in batches:
    rows = join(batch, segments)
    video = rows.pop('video')
    # One segment at a time: the encoder needs the memory of R clips.
    parts = [
      encode(put({'video': video[:, s]}, mesh)['video'])
      for s in range(segments)
    ]
    tokens = parts[0] if segments == 1 else jnp.concatenate(parts, axis=1)
    yield Tokens(jax.lax.stop_gradient(tokens), **put(rows, mesh))


def join(batch: Mapping[str, Any], segments: int) -> dict[str, np.ndarray]:
  """Returns a batch with one row per view: `video` [R, segments, T, H, W, C].

  Raises:
    ValueError: the rows are not whole views in order.
  """
  count = len(batch['video'])
  if count % segments:
    raise ValueError(
      f'a batch of {count} clips holds no whole number of views of {segments} '
      'segments; make the batch size a multiple of segments x views'
    )
  shape = (count // segments, segments)
  zeros = np.zeros(count, np.int32)
  columns = {
    'label': np.asarray(batch.get('label', zeros - 1), np.int32),
    'index': np.asarray(batch['index'], np.int32),
    'view': np.asarray(batch.get('view', zeros), np.int32),
    'weight': np.asarray(batch.get('weight', zeros + 1), np.float32),
  }
  if 'substituted' in batch:
    # A substitute clip is of another video: its label would be wrong.
    columns['weight'] = columns['weight'] * ~np.asarray(
      batch['substituted'], bool
    )
  columns = {name: x.reshape(shape) for name, x in columns.items()}
  is_real = columns['weight'].all(axis=1)
  for name in ('index', 'view'):
    if (columns[name][is_real] != columns[name][is_real, :1]).any():
      raise ValueError(
        f'found clips of different {name}, wanted {segments} segments of one '
        f'view each: {columns[name][is_real].tolist()}'
      )
  joined = {name: x[:, 0] for name, x in columns.items()}
  joined['weight'] = columns['weight'].min(axis=1)
  if 'depth' in batch and segments == 1:
    joined['depth'] = np.asarray(batch['depth'], np.float32)
  video = np.asarray(batch['video'])
  return {'video': video.reshape(*shape, *video.shape[1:]), **joined}


def only(
  batches: Batches, keep: Callable[[np.ndarray], np.ndarray]
) -> Iterator[Mapping[str, np.ndarray]]:
  """Yields batches of the same size with a subset of the videos.

  Args:
    batches: clips, all of a video in successive rows.
    keep: indices of videos -> mask of the videos to keep.
  """
  buffer: dict[str, np.ndarray] = {}
  size = 0
  for batch in batches:
    size = len(batch['index'])
    weight = np.asarray(batch.get('weight', np.ones(size)), np.float32)
    rows = keep(np.asarray(batch['index'])) & (weight > 0)
    part = {
      name: np.asarray(x)[rows]
      for name, x in (dict(batch) | {'weight': weight}).items()
      if np.ndim(x) and len(x) == size
    }
    buffer = {
      name: np.concatenate([buffer[name], x]) if buffer else x
      for name, x in part.items()
    }
    while len(buffer['index']) >= size:
      yield {name: x[:size] for name, x in buffer.items()}
      buffer = {name: x[size:] for name, x in buffer.items()}
  remaining = len(buffer['index']) if buffer else 0
  if remaining:
    indices = np.resize(np.arange(remaining), size)
    last = {name: x[indices] for name, x in buffer.items()}
    last['weight'] = last['weight'] * (np.arange(size) < remaining)
    yield last


def put(
  batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh | None
) -> dict[str, Array]:
  """Puts local rows on one device, or shards them over a mesh."""
  if mesh is None:
    return {name: jnp.asarray(x) for name, x in batch.items()}
  return sharding.put_batch(batch, mesh)


def fetch(x: Array) -> np.ndarray:
  """Gathers all rows of an array on every host."""
  if jax.process_count() == 1:
    return np.asarray(x)
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


@dataclasses.dataclass(frozen=True)
class Table:
  """Features held in memory, one row per view of a video.

  Attributes:
    tokens: float32 [n, N, D].
    label: int32 [n].
    index: int32 [n].
    view: int32 [n].
    depth: float32 [n, T, H, W], or None.
  """

  tokens: np.ndarray
  label: np.ndarray
  index: np.ndarray
  view: np.ndarray
  depth: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.label)

  def take(self, rows: np.ndarray) -> 'Table':
    """Returns rows by index or by mask."""
    return Table(**{name: x[rows] for name, x in self._columns().items()})

  def _columns(self) -> dict[str, np.ndarray]:
    """Returns the columns by name, without the copies of `asdict`."""
    names = (f.name for f in dataclasses.fields(self))
    columns = {name: getattr(self, name) for name in names}
    return {name: x for name, x in columns.items() if x is not None}

  def batches(
    self,
    size: int,
    *,
    rng: np.random.Generator | None = None,
    mesh: jax.sharding.Mesh | None = None,
  ) -> Iterator[Tokens]:
    """Yields one pass over the rows.

    Args:
      size: rows per batch.
      rng: shuffles the rows and drops an incomplete last batch. Without it the
        last batch is padded with rows of weight 0, as is a table smaller than
        `size`.
      mesh: devices that the rows are sharded over.
    """
    count, order = len(self), np.arange(len(self))
    if rng is not None:
      rng.shuffle(order)
      order = order[: max(count // size * size, min(count, size))]
    for start in range(0, len(order), size):
      rows = order[start : start + size]
      is_real = np.arange(size) < len(rows)
      part = self.take(np.resize(rows, size))._columns()
      part['weight'] = is_real.astype(np.float32)
      # Every host holds the whole table and puts its share of the batch.
      low = size // jax.process_count() * jax.process_index()
      high = low + size // jax.process_count()
      part = {name: x[low:high] for name, x in part.items()}
      yield Tokens(**put(part, mesh))


def check_room(size: int) -> None:
  """Raises ValueError if features of `size` bytes exceed `MAX_TABLE_BYTES`."""
  if size > MAX_TABLE_BYTES:
    raise ValueError(
      f'probe.augment=False keeps {size / 2**30:.0f} GiB of features in '
      f'memory, more than {MAX_TABLE_BYTES / 2**30:.0f}; set '
      '--config.probe.augment=True, which encodes new crops in every epoch'
    )


def table(
  encode: Encode,
  batches: Batches,
  *,
  segments: int = 1,
  pool: bool = False,
  mesh: jax.sharding.Mesh | None = None,
) -> Table:
  """Encodes clips once and keeps their features in memory.

  Args:
    encode: clips [R, T, H, W, C] -> tokens [R, N, D] or vectors [R, D].
    batches: clips.
    segments: clips per view.
    pool: whether to keep only the mean over tokens, as one token.
    mesh: devices that the rows are sharded over.

  Raises:
    ValueError: there are no clips.
  """

  def encode_rows(video: Array) -> Array:
    encoded = encode(video).astype(jnp.float32)
    encoded = encoded[:, None] if encoded.ndim == 2 else encoded
    return jnp.mean(encoded, axis=1, keepdims=True) if pool else encoded

  parts: list[dict[str, np.ndarray]] = []
  for rows in encode_batches(
    encode_rows, batches, segments=segments, mesh=mesh
  ):
    encoded = {k: fetch(x) for k, x in rows._asdict().items() if x is not None}
    is_real = encoded.pop('weight') > 0
    if pool:
      encoded['tokens'] = encoded['tokens'].mean(axis=1, keepdims=True)
    parts.append({name: x[is_real] for name, x in encoded.items()})
  if not parts:
    raise ValueError('there are no clips to evaluate; check data.source')
  return Table(**{n: np.concatenate([p[n] for p in parts]) for n in parts[0]})


def pixels(
  video: UInt8[Array | np.ndarray, 'B T H W C'],
) -> Float[Array, 'B D']:
  """Returns all pixels in [0, 1], a baseline that encoders should exceed."""
  return _flat(video)


def middle_frame(
  video: UInt8[Array | np.ndarray, 'B T H W C'],
) -> Float[Array, 'B D']:
  """Returns the pixels of the middle frame: a baseline without motion."""
  return _flat(video[:, video.shape[1] // 2])


def motion_energy(
  video: UInt8[Array | np.ndarray, 'B T H W C'], cells: int = 8
) -> Float[Array, 'B D']:
  """Returns the mean absolute difference of successive frames, in cells.

  Args:
    video: clips.
    cells: each pair of frames gives cells x cells values; remaining rows and
      columns are left out.
  """
  x = jnp.asarray(video, jnp.float32) / 255
  energy = jnp.mean(jnp.abs(jnp.diff(x, axis=1)), axis=-1)
  b, t, h, w = energy.shape
  y, x = (min(cells, n) for n in (h, w))
  energy = energy[:, :, : h // y * y, : w // x * x]
  energy = energy.reshape(b, t, y, h // y, x, w // x)
  return _flat(jnp.mean(energy, axis=(3, 5)) * 255)


def _flat(x: Array | np.ndarray) -> Array:
  return jnp.asarray(x, jnp.float32).reshape(x.shape[0], -1) / 255
