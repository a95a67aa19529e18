"""One pass over all videos, each once per view, for evaluation."""

import time
from collections.abc import Iterator

import grain
import numpy as np
from jaxtyping import Int

from vssl_jax.data import ledger as ledger_lib
from vssl_jax.data import loading


class Pass:
  """Batches of every video once, in order. Made by `pipeline.evaluation`.

  A local batch holds B = batch_size / processes clips of whole videos, all
  clips of a video next to each other: video by video, in it view by view, in
  that segment by segment. So any array [B, ...] of a batch or computed from it
  is an array [videos, views, segments, ...] by `reshape`. Entries:

    video: uint8 [B, T, H, W, C]
    index: int32 [B], number of the video (of all there are where padded)
    label: int32 [B], -1 unknown
    view, segment: int32 [B]
    weight: float32 [B], 1, or 0 for padding and unreadable videos
    substituted: bool [B], true where a video could not be read (black)
    crop: float32 [B, 4]
    depth: float32 [B, T, H, W] in metres, 0 where unknown (RGB-D only)

  All processes get the same number of batches; every video comes exactly once.

  Attributes:
    num_examples: videos of the pass.
    num_batches: local batches in a pass.
    segments: clips along time.
    views: crops.
    classes: class names by label, or None.
    fingerprint: hash of the list of videos.
    shapes: shape of one clip's entries by name.
  """

  def __init__(
    self,
    loader: loading.Loader,
    ledger: ledger_lib.Ledger,
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
    self._loader, self._ledger = loader, ledger
    self._tickets, self._padded = _Tickets(videos, numbers), len(source)
    self._process = process_index, process_count
    self._workers, self._prefetch = workers, prefetch

  def __len__(self) -> int:
    return self.num_batches

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    index, count = self._process
    numbers = grain.MapDataset.range(self.num_batches * count)[index::count]
    tickets = numbers.map(self._tickets)
    iterator = loading.stream(
      tickets, self._loader, self._workers, self._prefetch
    )
    try:
      for number in range(index, self.num_batches * count, count):
        start = time.perf_counter()
        batch = loading.take(iterator)
        self._ledger.take(batch, time.perf_counter() - start)
        yield self._finish(loading.own(batch), number)
    finally:
      iterator.close()

  def _finish(
    self, batch: dict[str, np.ndarray], number: int
  ) -> dict[str, np.ndarray]:
    """Adds what only a pass knows to a batch."""
    per = self.segments * self.views
    rows = self._tickets(number)[:, 0]
    rows = np.where(rows < 0, self._padded, rows)
    batch['index'] = np.repeat(rows, per).astype(np.int32)
    missing = batch['substituted'] | (batch['index'] == self._padded)
    batch['weight'] = (~missing).astype(np.float32)
    view, segment = np.divmod(batch.pop('repeat'), self.segments)
    batch.update(view=view, segment=segment)
    return batch

  @property
  def bad(self) -> dict[int, dict]:
    """Videos that could not be read so far: number -> file, reason, detail."""
    return self._ledger.bad

  def report(self) -> dict[str, float]:
    """Rates since the last report, counts since the start."""
    return self._ledger.report()

  def close(self) -> None:
    """Ends workers and readers."""
    self._loader.close()


class _Tickets(grain.transforms.Map):
  """Numbers of the videos in a batch, PADDING after the last."""

  def __init__(self, videos: int, numbers: Int[np.ndarray, 'n']) -> None:
    self._videos, self._numbers = videos, numbers

  def map(self, element: int) -> np.ndarray:
    places = element * self._videos + np.arange(self._videos, dtype=np.int64)
    rows = np.full(self._videos, loading.PADDING, np.int64)
    real = places < len(self._numbers)
    rows[real] = self._numbers[places[real]]
    return np.stack([rows, np.zeros_like(rows)], axis=1)

  __call__ = map
