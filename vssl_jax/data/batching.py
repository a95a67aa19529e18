"""Loads batches of clips and replaces bad files by substitute clips.

After an I/O error, reading an example is retried. An example that still cannot
be read is replaced by another one, which depends on the seed and the index
alone. The failures are returned with the batch, so that the process that takes
the batch can log and count them.
"""

import concurrent.futures
import dataclasses
import json
import os
import threading
import time

import grain
import numpy as np

from vssl_jax.data import loader_processes as loader_processes_lib
from vssl_jax.data.clips import clip_spec as clip_spec_lib
from vssl_jax.data.clips import decode, read_clip, rgbd
from vssl_jax.data.sources import example as example_lib
from vssl_jax.data.sources import source as source_lib

NOTES = '_notes'  # key of the report that is returned with a batch
PADDING = -1
LOST = -2


@dataclasses.dataclass(frozen=True)
class Policy:
  """Options for reading and for errors. See `options.default()`."""

  seed: int = 0
  retries: int = 2
  max_substitutes: int = 10
  substitute: bool = True
  isolate: bool = True
  processes: int = 1
  deadline_s: int | float = 20.0
  memory_limit_mb: int = 1024

  def __post_init__(self) -> None:
    if not 0 < self.deadline_s <= 3600:
      raise ValueError(
        f'data.deadline_s is {self.deadline_s}; wanted 0 to 3600 seconds'
      )


@dataclasses.dataclass(frozen=True)
class _Found:
  """Result of reading one example."""

  clips: clip_spec_lib.Clips | None
  item: example_lib.Item | None
  index: int
  failures: tuple[dict, ...]
  seconds: int | float


class Loader:
  """Loads the batch for an array of requests. Can be pickled.

  A request is [1 + n] integers: the index of an example (or PADDING for black
  clips) and n random words that seed its clips.
  """

  def __init__(
    self, source: source_lib.Source, spec: clip_spec_lib.Spec, policy: Policy
  ) -> None:
    self.__setstate__({'source': source, 'spec': spec, 'policy': policy})

  def __getstate__(self) -> dict:
    return {k: self.__dict__[k] for k in ('source', 'spec', 'policy')}

  def __setstate__(self, state: dict) -> None:
    self.source, self.spec = state['source'], state['spec']
    self.policy = state['policy']
    self._lock, self._closed = threading.Lock(), False
    self._threads = self._readers = None

  def _start(self) -> concurrent.futures.ThreadPoolExecutor:
    """Returns the thread pool; starts it at the first call."""
    with self._lock:
      if self._closed:
        raise RuntimeError('this stream of clips is closed')
      if self._threads is None:
        self._readers = read_clip.Readers(
          self.spec,
          isolate=self.policy.isolate,
          deadline_s=self.policy.deadline_s,
          memory_limit_mb=self.policy.memory_limit_mb,
        )
        self._threads = concurrent.futures.ThreadPoolExecutor(
          self.policy.processes, thread_name_prefix='clips'
        )
      return self._threads

  def batch_nbytes(self, videos: int) -> int:
    """Returns the size in bytes of the pixels in a batch of videos."""
    return videos * self.spec.clips * int(np.prod(self.spec.stored))

  def close(self) -> None:
    """Stops threads and worker processes immediately."""
    with self._lock:
      self._closed = True
    if self._threads is not None:
      self._readers.stop()
      self._threads.shutdown(wait=True, cancel_futures=True)
      self._readers.close()
      self._threads = None

  def __call__(self, requests: np.ndarray) -> dict[str, np.ndarray]:
    """Loads a batch.

    Args:
      requests: int64 [n, 1 + words].

    Returns:
      A batch of n * spec.clips clips, in which the clips of a video are
      adjacent. The entry NOTES is a report: a JSON object as uint8 characters.
    """
    executor = self._start()
    num_clips, unknown_index = self.spec.clips, len(self.source)
    video = np.empty((len(requests) * num_clips, *self.spec.stored), np.uint8)
    futures = [
      executor.submit(
        self._find, request, video[i * num_clips : (i + 1) * num_clips]
      )
      for i, request in enumerate(requests)
    ]
    try:
      results = [future.result() for future in futures]
    finally:
      for future in futures:
        future.cancel()
    requested, indices = requests[:, 0], np.asarray([r.index for r in results])
    batch = {
      'index': np.where(
        (indices == requested) & (indices >= 0), indices, unknown_index
      ),
      'substituted': indices != requested,
      'label': np.asarray([_label(r) for r in results]),
    }
    for name in ('index', 'label'):
      batch[name] = batch[name].astype(np.int32)
    batch = {name: np.repeat(x, num_clips) for name, x in batch.items()}
    batch['repeat'] = np.tile(
      np.arange(num_clips, dtype=np.int32), len(requests)
    )
    batch['crop'] = np.concatenate([_crops(r, num_clips) for r in results])
    batch['flip'] = np.concatenate([_flips(r, num_clips) for r in results])
    if self.spec.depth_units:
      video, batch['depth'] = rgbd.split(video, self.spec)
    batch['video'] = video
    batch[NOTES] = _notes(results)
    return batch

  def _find(self, request: np.ndarray, out: np.ndarray) -> _Found:
    """Reads the example of a request, or a substitute for a bad file."""
    requested, entropy = int(request[0]), [int(word) for word in request[1:]]
    if requested == PADDING:
      out[...] = 0
      return _Found(None, None, PADDING, (), 0.0)
    failures, start = [], time.perf_counter()
    limit = self.policy.max_substitutes if self.policy.substitute else 0
    for attempt in range(limit + 1):
      index = requested if not attempt else self._substitute(requested, attempt)
      try:
        item, clips = self._read(index, [*entropy, attempt], out)
      except decode.VideoError as error:
        failures.append(self._failure(index, requested, error))
        continue
      seconds = time.perf_counter() - start
      return _Found(clips, item, index, tuple(failures), seconds)
    out[...] = 0
    seconds = time.perf_counter() - start
    return _Found(None, None, LOST, tuple(failures), seconds)

  def _substitute(self, wanted: int, attempt: int) -> int:
    seeds = (self.policy.seed, wanted, attempt)
    return int(np.random.default_rng(seeds).integers(len(self.source)))

  def _read(
    self, index: int, entropy: list[int], out: np.ndarray
  ) -> tuple[example_lib.Item, clip_spec_lib.Clips]:
    for attempt in range(self.policy.retries + 1):
      try:
        item = self.source.item(index)
        return item, self._readers.read(item.media, entropy, out)
      except decode.VideoError as error:
        if error.reason != 'io' or attempt == self.policy.retries:
          raise
        time.sleep(0.1 * 2**attempt)
    raise AssertionError('not reached')

  def _failure(self, index: int, wanted: int, error: decode.VideoError) -> dict:
    try:
      name = self.source.item(index).name
    except decode.VideoError:
      name = f'example {index}'
    return {
      'index': index,
      'file': name,
      'reason': error.reason,
      'detail': error.detail,
      'wanted': wanted,
    }


def _label(found: _Found) -> int:
  return found.item.label if found.item else example_lib.UNKNOWN


def _crops(found: _Found, per: int) -> np.ndarray:
  return found.clips.crop if found.clips else np.zeros((per, 4), np.float32)


def _flips(found: _Found, per: int) -> np.ndarray:
  return found.clips.flipped if found.clips else np.zeros(per, bool)


def _notes(found: list[_Found]) -> np.ndarray:
  """Returns the report on a batch: a JSON object as uint8 characters."""
  notes = {
    'failures': [failure for result in found for failure in result.failures],
    'lost': [
      result.failures[0]['wanted'] for result in found if result.index == LOST
    ],
    'short': sum(bool(result.clips and result.clips.short) for result in found),
    'seconds': sum(result.seconds for result in found),
    'videos': sum(result.index != PADDING for result in found),
  }
  return np.frombuffer(json.dumps(notes).encode(), np.uint8)


def stream(
  requests: grain.MapDataset, loader: Loader, workers: int, prefetch: int
) -> grain.DatasetIterator:
  """Returns an iterator over batches, which are loaded in advance.

  Args:
    requests: requests of each batch, int64 [n, 1 + words].
    loader: loads the batch for its requests.
    workers: number of worker processes; 0 loads in this process.
    prefetch: batches loaded in advance, per worker.

  Raises:
    ValueError: the shared memory is too small for the workers.
  """
  batches = requests.map(loader).to_iter_dataset(
    grain.ReadOptions(num_threads=1, prefetch_buffer_size=max(prefetch, 1))
  )
  if workers:
    loader_processes_lib.remove_abandoned()
    loader_processes_lib.check_space(
      loader.batch_nbytes(len(requests[0])), workers
    )
    batches = batches.mp_prefetch(
      grain.MultiprocessingOptions(
        num_workers=workers, per_worker_buffer_size=max(prefetch, 1)
      ),
      worker_init_fn=loader_processes_lib.initializer(),
    )
  return iter(batches)


def take(iterator: grain.DatasetIterator) -> dict[str, np.ndarray]:
  """Returns the next batch; errors of workers name their cause if known."""
  try:
    return next(iterator)
  except RuntimeError as error:
    raise loader_processes_lib.explain(error) from error


def own(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Copies all entries but 'video', to free the worker's shared memory."""
  return {k: v if k == 'video' else np.array(v) for k, v in batch.items()}


def cores() -> int:
  """Returns the number of CPU cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
