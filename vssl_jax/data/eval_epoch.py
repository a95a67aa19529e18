"""Iterates once over all videos, in order, for evaluation."""

import time
from collections.abc import Iterator

import grain
import numpy as np
from jaxtyping import Int

from vssl_jax.data import batching
from vssl_jax.data import read_stats as read_stats_lib


class Pass:
  """Batches of every video once, in order. Built by `pipeline.evaluation`.

  A local batch holds B = batch_size / processes clips of whole videos. Its
  order is [videos, views, segments]: `reshape` turns any array [B, ...] of a
  batch, or computed from one, into [videos, views, segments, ...]. Entries:

    video: uint8 [B, T, H, W, C]
    index: int32 [B], index of the video; for padding the number of all videos
    label: int32 [B], -1 unknown
    view, segment: int32 [B]
    weight: float32 [B], 1, or 0 for padding and bad files
    substituted: bool [B], true for bad files, whose clips are black
    crop: float32 [B, 4], top, left, bottom, right as fractions of the frame
    flip: bool [B], always false
    depth: float32 [B, T, H, W] in metres, 0 where unknown (RGB-D only)

  All processes get the same number of batches. Every video occurs exactly once.

  Attributes:
    num_examples: number of videos in a pass.
    num_batches: number of local batches in a pass.
    segments: clips along time.
    views: crops.
    classes: class names by label, or None.
    fingerprint: hash of the list of videos.
    shapes: shapes of the entries of one clip, by name.
  """

  def __init__(
    self,
    loader: batching.Loader,
    read_stats: read_stats_lib.ReadStats,
    *,
    numbers: Int[np.ndarray, 'n'],
    videos: int,
    process_index: int,
    process_count: int,
    workers: int,
    prefetch: int,
  ) -> None:
    source, spec = loader.source, loader.spec
    self.num_examples = len(numbers)
    self.num_batches = -(-len(numbers) // (videos * process_count))
    self.segments, self.views = spec.segments, spec.views
    self.classes = list(source.classes) if source.classes else None
    self.fingerprint = source.fingerprint
    scalars = ('index', 'label', 'view', 'segment', 'weight', 'substituted')
    self.shapes = {'video': spec.shape, 'crop': (4,), 'flip': ()}
    self.shapes.update(dict.fromkeys(scalars, ()))
    if spec.depth_units:
      self.shapes['depth'] = spec.shape[:3]
    self._loader, self._read_stats = loader, read_stats
    self._requests, self._padded = _Tickets(videos, numbers), len(source)
    self._process = process_index, process_count
    self._workers, self._prefetch = workers, prefetch

  def __len__(self) -> int:
    return self.num_batches

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    index, count = self._process
    batch_indices = grain.MapDataset.range(self.num_batches * count)[
      index::count
    ]
    requests = batch_indices.map(self._requests)
    iterator = batching.stream(
      requests, self._loader, self._workers, self._prefetch
    )
    try:
      for batch_index in range(index, self.num_batches * count, count):
        start = time.perf_counter()
        batch = batching.take(iterator)
        self._read_stats.take(batch, time.perf_counter() - start)
        yield self._finish(batching.own(batch), batch_index)
    finally:
      iterator.close()

  def _finish(
    self, batch: dict[str, np.ndarray], number: int
  ) -> dict[str, np.ndarray]:
    """Adds 'index', 'weight', 'view' and 'segment' to a batch."""
    num_clips = self.segments * self.views
    indices = self._requests(number)[:, 0]
    indices = np.where(indices < 0, self._padded, indices)
    batch['index'] = np.repeat(indices, num_clips).astype(np.int32)
    missing = batch['substituted'] | (batch['index'] == self._padded)
    batch['weight'] = (~missing).astype(np.float32)
    view, segment = np.divmod(batch.pop('repeat'), self.segments)
    batch.update(view=view, segment=segment)
    return batch

  @property
  def bad(self) -> dict[int, dict]:
    """Bad files so far: index -> file, reason, detail."""
    return self._read_stats.bad

  def report(self) -> dict[str, float]:
    """Returns rates since the last report and counts since the start."""
    return self._read_stats.report()

  def close(self) -> None:
    """Stops worker processes and readers."""
    self._loader.close()


class _Tickets(grain.transforms.Map):
  """Requests for a batch: indices of its videos, PADDING after the last."""

  def __init__(self, videos: int, numbers: Int[np.ndarray, 'n']) -> None:
    self._videos, self._numbers = videos, numbers

  def map(self, element: int) -> np.ndarray:
    positions = element * self._videos + np.arange(self._videos, dtype=np.int64)
    indices = np.full(self._videos, batching.PADDING, np.int64)
    valid = positions < len(self._numbers)
    indices[valid] = self._numbers[positions[valid]]
    return np.stack([indices, np.zeros_like(indices)], axis=1)

  __call__ = map
