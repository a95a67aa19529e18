"""Whole batches of clips, whatever state the files are in.

An example that cannot be read is tried again if the disk may be to blame, and
then replaced by another one, the same each time. What went wrong travels with
the batch, so that whoever takes the batch can write it down and count it.
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
import time

import numpy as np

from vssl_jax.data import clip as clip_lib
from vssl_jax.data import contain, decode, sources
from vssl_jax.data import item as item_lib

NOTES = '_notes'  # key of the report that travels with a batch


@dataclasses.dataclass(frozen=True)
class Policy:
  """How to read and when to give up. See `pipeline.default()`."""

  seed: int = 0
  retries: int = 2
  max_substitutes: int = 10
  substitute: bool = True
  isolate: bool = True
  processes: int = 1
  deadline_s: float = 20.0
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
  seconds: float


class Loader:
  """Turns tickets into batches. It can be pickled into other processes.

  A ticket is [1 + n] integers: the example's number and seeds of its clips.
  """

  def __init__(
    self, source: sources.Source, spec: clip_lib.Spec, policy: Policy
  ) -> None:
    self.source, self.spec, self.policy = source, spec, policy

  def __getstate__(self) -> dict:
    return {k: self.__dict__[k] for k in ('source', 'spec', 'policy')}

  @functools.cached_property
  def _threads(self) -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(
      self.policy.processes, thread_name_prefix='clips'
    )

  @functools.cached_property
  def _readers(self) -> contain.Readers:
    policy = self.policy
    return contain.Readers(
      self.spec,
      count=policy.processes if policy.isolate else 0,
      deadline_s=policy.deadline_s,
      memory_limit_mb=policy.memory_limit_mb,
    )

  def close(self) -> None:
    """Ends threads and child processes."""
    if '_threads' in self.__dict__:
      self._threads.shutdown(wait=True, cancel_futures=True)
      del self._threads
    if '_readers' in self.__dict__:
      self._readers.close()
      del self._readers

  def __call__(self, tickets: np.ndarray) -> dict[str, np.ndarray]:
    """Loads a batch.

    Args:
      tickets: int64 [n, 1 + words].

    Returns:
      The batch of n * spec.clips clips, clips of one video adjacent, and a
      report under NOTES: a JSON object as uint8 characters.
    """
    per, number = self.spec.clips, len(self.source)
    video = np.empty((len(tickets) * per, *self.spec.shape), np.uint8)
    jobs = [
      self._threads.submit(self._find, ticket, video[i * per : (i + 1) * per])
      for i, ticket in enumerate(tickets)
    ]
    try:
      found = [job.result() for job in jobs]
    finally:
      for job in jobs:
        job.cancel()
    substituted = np.asarray(
      [f.index != t[0] for f, t in zip(found, tickets, strict=True)]
    )
    batch = {
      'index': np.where(substituted, number, tickets[:, 0]).astype(np.int32),
      'substituted': substituted,
      'label': np.asarray([_label(f) for f in found], np.int32),
    }
    batch = {name: np.repeat(rows, per) for name, rows in batch.items()}
    batch['repeat'] = np.tile(np.arange(per, dtype=np.int32), len(tickets))
    batch['crop'] = np.concatenate([_crops(f, per) for f in found])
    batch['video'] = video
    batch[NOTES] = _notes(found)
    return batch

  def _find(self, ticket: np.ndarray, out: np.ndarray) -> _Found:
    """Reads the example of a ticket, or another one in its place."""
    wanted, entropy = int(ticket[0]), [int(word) for word in ticket[1:]]
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
    return _Found(None, None, -1, tuple(failures), seconds)

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


def _notes(found: list[_Found]) -> np.ndarray:
  """What happened in a batch, as the characters of a JSON object."""
  notes = {
    'failures': [failure for f in found for failure in f.failures],
    'lost': [f.failures[0]['wanted'] for f in found if f.clips is None],
    'short': sum(bool(f.clips and f.clips.short) for f in found),
    'seconds': sum(f.seconds for f in found),
    'videos': len(found),
  }
  return np.frombuffer(json.dumps(notes).encode(), np.uint8)


def cores() -> int:
  """CPU cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
