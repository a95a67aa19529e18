"""Whole batches of clips, whatever state the files are in.

An example that cannot be read is tried again if the disk may be to blame, and
then replaced by another one, the same each time. What went wrong travels with
the batch, so that whoever takes the batch can write it down and count it.
"""

import concurrent.futures
import dataclasses
import json
import os
import threading
import time

import grain
import numpy as np

from vssl_jax.data import clip as clip_lib
from vssl_jax.data import decode, reader, rgbd, sources
from vssl_jax.data import item as item_lib
from vssl_jax.data import workers as workers_lib

NOTES = '_notes'  # key of the report that travels with a batch
PADDING = -1
LOST = -2


@dataclasses.dataclass(frozen=True)
class Policy:
  """How to read and when to give up. See `options.default()`."""

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
  """What came of one ticket."""

  clips: clip_lib.Clips | None
  item: item_lib.Item | None
  index: int
  failures: tuple[dict, ...]
  seconds: int | float


class Loader:
  """Turns tickets into batches. It can be pickled into other processes.

  A ticket is [1 + n] integers: the example's number (or PADDING, which gives
  black clips) and seeds of its clips.
  """

  def __init__(
    self, source: sources.Source, spec: clip_lib.Spec, policy: Policy
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
    """Starts threads, once, in the process that loads."""
    with self._lock:
      if self._closed:
        raise RuntimeError('this stream of clips is closed')
      if self._threads is None:
        self._readers = reader.Readers(
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
    """Returns the size of the pictures in a batch of videos."""
    return videos * self.spec.clips * int(np.prod(self.spec.stored))

  def close(self) -> None:
    """Ends threads and child processes, at once."""
    with self._lock:
      self._closed = True
    if self._threads is not None:
      self._readers.stop()
      self._threads.shutdown(wait=True, cancel_futures=True)
      self._readers.close()
      self._threads = None

  def __call__(self, tickets: np.ndarray) -> dict[str, np.ndarray]:
    """Loads a batch.

    Args:
      tickets: int64 [n, 1 + words].

    Returns:
      The batch of n * spec.clips clips, clips of one video adjacent, and a
      report under NOTES: a JSON object as uint8 characters.
    """
    threads = self._start()
    per, number = self.spec.clips, len(self.source)
    video = np.empty((len(tickets) * per, *self.spec.stored), np.uint8)
    jobs = [
      threads.submit(self._find, ticket, video[i * per : (i + 1) * per])
      for i, ticket in enumerate(tickets)
    ]
    try:
      found = [job.result() for job in jobs]
    finally:
      for job in jobs:
        job.cancel()
    wanted, got = tickets[:, 0], np.asarray([f.index for f in found])
    batch = {
      'index': np.where((got == wanted) & (got >= 0), got, number),
      'substituted': got != wanted,
      'label': np.asarray([_label(f) for f in found]),
    }
    for name in ('index', 'label'):
      batch[name] = batch[name].astype(np.int32)
    batch = {name: np.repeat(rows, per) for name, rows in batch.items()}
    batch['repeat'] = np.tile(np.arange(per, dtype=np.int32), len(tickets))
    batch['crop'] = np.concatenate([_crops(f, per) for f in found])
    batch['flip'] = np.concatenate([_flips(f, per) for f in found])
    if self.spec.depth_units:
      video, batch['depth'] = rgbd.split(video, self.spec)
    batch['video'] = video
    batch[NOTES] = _notes(found)
    return batch

  def _find(self, ticket: np.ndarray, out: np.ndarray) -> _Found:
    """Reads the example of a ticket, or another one in its place."""
    wanted, entropy = int(ticket[0]), [int(word) for word in ticket[1:]]
    if wanted == PADDING:
      out[...] = 0
      return _Found(None, None, PADDING, (), 0.0)
    failures, start = [], time.perf_counter()
    limit = self.policy.max_substitutes if self.policy.substitute else 0
    for attempt in range(limit + 1):
      index = wanted if not attempt else self._substitute(wanted, attempt)
      try:
        item, clips = self._read(index, [*entropy, attempt], out)
      except decode.VideoError as error:
        failures.append(self._failure(index, wanted, error))
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
  ) -> tuple[item_lib.Item, clip_lib.Clips]:
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
  return found.item.label if found.item else item_lib.UNKNOWN


def _crops(found: _Found, per: int) -> np.ndarray:
  return found.clips.crop if found.clips else np.zeros((per, 4), np.float32)


def _flips(found: _Found, per: int) -> np.ndarray:
  return found.clips.flipped if found.clips else np.zeros(per, bool)


def _notes(found: list[_Found]) -> np.ndarray:
  """What happened in a batch, as the characters of a JSON object."""
  notes = {
    'failures': [failure for f in found for failure in f.failures],
    'lost': [f.failures[0]['wanted'] for f in found if f.index == LOST],
    'short': sum(bool(f.clips and f.clips.short) for f in found),
    'seconds': sum(f.seconds for f in found),
    'videos': sum(f.index != PADDING for f in found),
  }
  return np.frombuffer(json.dumps(notes).encode(), np.uint8)


def stream(
  tickets: grain.MapDataset, loader: Loader, workers: int, prefetch: int
) -> grain.DatasetIterator:
  """Iterates over the batches of tickets, loaded in advance.

  Args:
    tickets: of batches, [n, 1 + words] each.
    loader: makes a batch of them.
    workers: processes; 0: this one.
    prefetch: batches ready in advance, per worker.
  """
  batches = tickets.map(loader).to_iter_dataset(
    grain.ReadOptions(num_threads=1, prefetch_buffer_size=max(prefetch, 1))
  )
  if workers:
    workers_lib.remove_abandoned()
    workers_lib.check_space(loader.batch_nbytes(len(tickets[0])), workers)
    batches = batches.mp_prefetch(
      grain.MultiprocessingOptions(
        num_workers=workers, per_worker_buffer_size=max(prefetch, 1)
      ),
      worker_init_fn=workers_lib.initializer(),
    )
  return iter(batches)


def take(iterator: grain.DatasetIterator) -> dict[str, np.ndarray]:
  """Returns the next batch; an error names the cause where it is known."""
  try:
    return next(iterator)
  except RuntimeError as error:
    raise workers_lib.explain(error) from error


def own(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """A batch whose small arrays do not hold on to a worker's shared memory."""
  return {k: v if k == 'video' else np.array(v) for k, v in batch.items()}


def cores() -> int:
  """CPU cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
