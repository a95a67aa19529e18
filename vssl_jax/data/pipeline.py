"""From a list of videos to batches: the batch of step s depends on s alone.

  pipeline.make(config.data, batch_size=256, seed=0).iterator(start_step=1000)

The chain is shuffle -> repeat -> random_map -> batch -> every P-th: each
element is a whole local batch, a pure function of its number. So the clips of
step s are the same for any number of hosts, workers and restarts, and nothing
about an iterator needs to be saved.
"""

import contextlib
import functools
import os
import time
import weakref
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Int

from vssl_jax.data import holdout, loading, options, passes, sources
from vssl_jax.data import ledger as ledger_lib

_WORDS = 4  # random 32-bit words that seed the clips of an example


default, find, make_spec = options.default, options.find, options.spec
Pass = passes.Pass


class Clips:
  """An endless, addressable stream of batches. Made by `make`.

  Attributes:
    num_examples: videos in all sources, E.
    num_trained: those of them that are not held out.
    classes: class names by label, or None.
    fingerprint: hash of the list of videos.
    shapes: shape of one clip's entry by name: {'video': (T, H, W, C), ...}.
    distinct: whether a batch holds no video twice (repeats aside): true if
      there is one source, unweighted, with a batch of videos or more; then
      each epoch is cut to whole batches.
  """

  def __init__(
    self,
    loader: loading.Loader,
    tickets: grain.MapDataset,
    ledger: ledger_lib.Ledger,
    *,
    process_index: int,
    process_count: int,
    workers: int,
    prefetch: int,
    trained: int,
    distinct: bool,
  ) -> None:
    source, spec = loader.source, loader.spec
    self.num_examples = len(source)
    self.num_trained = trained
    self.classes = list(source.classes) if source.classes else None
    self.fingerprint = source.fingerprint
    self.shapes = {
      'video': spec.shape,
      'index': (),
      'repeat': (),
      'substituted': (),
      'label': (),
      'crop': (4,),
      'flip': (),
    }
    if spec.depth_units:
      self.shapes['depth'] = spec.shape[:3]
    self.distinct = distinct
    self._loader, self._tickets, self._ledger = loader, tickets, ledger
    self._process = process_index, process_count
    self._workers, self._prefetch = workers, prefetch
    self._open = weakref.WeakSet()

  def iterator(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Yields the local batches of steps start_step, start_step + 1, ...

    Seeking costs the same for any step.
    """
    index, count = self._process
    tickets = self._tickets[start_step * count + index :: count]
    iterator = loading.stream(
      tickets, self._loader, self._workers, self._prefetch
    )
    watched = self._watched(iterator)
    self._open.add(watched)
    return watched

  def _watched(self, iterator: Any) -> Iterator[dict[str, np.ndarray]]:
    try:
      while True:
        start = time.perf_counter()
        batch = loading.take(iterator)
        self._ledger.take(batch, time.perf_counter() - start)
        yield loading.own(batch)
    finally:  # also when the caller stops half-way
      iterator.close()

  def lines(self) -> Iterator[str]:
    """Yields the lines that the fingerprint is a hash of, a video each."""
    return self._loader.source.lines()

  def report(self) -> dict[str, float]:
    """Rates since the last report, counts since the start."""
    return self._ledger.report()

  def describe(self) -> str:
    """The last report in one sentence."""
    return self._ledger.describe()

  def advice(self) -> str:
    """A sentence with the remedy if the last report says 'data bound'."""
    return self._ledger.advice()

  def close(self) -> None:
    """Ends iterators, workers and readers."""
    for watched in list(self._open):
      with contextlib.suppress(ValueError):  # at work in another thread
        watched.close()
    self._loader.close()


def make(
  config: options.Options,
  *,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
  folder: str | None = None,
) -> Clips:
  """Opens the sources and makes the stream of training batches.

  Args:
    config: `config.data`, see `options.default()`.
    batch_size: clips per step over all processes.
    seed: of order and augmentation.
    process_index: number of this process.
    process_count: processes that share each batch.
    folder: where `bad_files.jsonl` is written, or None.

  Returns:
    Clips, whose local batches hold batch_size / process_count clips:
    {'video': uint8 [B, T, H, W, C], 'index': int32 [B] (the number of videos
    where `substituted`), 'repeat': int32 [B], 'substituted': bool [B],
    'label': int32 [B] (-1 unknown), 'crop': float32 [B, 4], the box that was
    cut: top, left, bottom, right as fractions of the upright picture, 'flip':
    bool [B], whether left and right changed places inside that box}.
  """
  parse_flags()
  source = _open(config, process_index)
  spec = options.spec(config)
  local = videos_per_process(batch_size, process_count, spec.repeats)
  policy = options.policy(config, seed)
  loader = loading.Loader(source, spec, policy)
  kept = holdout.numbers(len(source), config['holdout'])
  tickets, distinct = _order(
    source, kept, tuple(config['weights']), seed, local * process_count
  )
  tickets = tickets.random_map(_Ticket(), seed=_fold(seed, 1))
  ledger = ledger_lib.Ledger(
    examples=len(source),
    max_bad_fraction=config['max_bad_fraction'],
    path=folder and bad_files(folder, process_index),
    readers=policy.processes * max(config['workers'], 1),
  )
  return Clips(
    loader,
    tickets.batch(local, drop_remainder=True),
    ledger,
    process_index=process_index,
    process_count=process_count,
    workers=config['workers'],
    prefetch=config['prefetch'],
    trained=len(kept),
    distinct=distinct,
  )


def evaluation(
  config: options.Options,
  *,
  batch_size: int,
  segments: int = 1,
  views: int = 1,
  sampling: str = 'spread',
  held: bool = False,
  process_index: int = 0,
  process_count: int = 1,
  folder: str | None = None,
) -> passes.Pass:
  """Opens the sources for one pass over all videos, in order.

  Each video gives segments x views clips, cut at fixed places (`transforms.
  spread`, `.interleaved` and `.views`), never augmented.

  Args:
    config: `config.data`; crop, flip, repeats and weights are not used.
    batch_size: clips per batch over all processes.
    segments: clips along the time of a video; one is centred.
    views: crops along the longer side; one is centred.
    sampling: 'spread' or 'interleaved'.
    held: only the videos that `data.holdout` keeps from training.
    process_index: number of this process.
    process_count: processes that share each batch.
    folder: where `bad_files.jsonl` is written, or None.

  Returns:
    passes.Pass, an iterable of local batches.
  """
  parse_flags()
  source = _open(config, process_index)
  spec = options.spec(
    config, sampling=sampling, segments=segments, views=views, repeats=1
  )
  policy = options.policy(config, 0, substitute=False)
  ledger = ledger_lib.Ledger(
    examples=len(source),
    max_bad_fraction=config['max_bad_fraction'],
    path=folder and bad_files(folder, process_index),
    readers=policy.processes * max(config['workers'], 1),
    may_lose=True,
  )
  return passes.Pass(
    loading.Loader(source, spec, policy),
    ledger,
    numbers=_tested(source, config, held),
    videos=videos_per_process(batch_size, process_count, spec.clips),
    process_index=process_index,
    process_count=process_count,
    workers=config['workers'],
    prefetch=config['prefetch'],
  )


def _open(config: options.Options, process_index: int) -> sources.Joined:
  """Lists the videos; process 0 prints where, how many and what is left out."""
  source = options.find(config)
  if not process_index:
    _print_once(source.describe())
  return source


@functools.cache
def _print_once(text: str) -> None:
  """Prints what jobs repeat for every pass over the same videos."""
  print(text, flush=True)


def _tested(
  source: sources.Joined, config: options.Options, held: bool
) -> Int[np.ndarray, 'n']:
  """Numbers of the videos of a pass."""
  if not held:
    return np.arange(len(source))
  return holdout.numbers(len(source), config['holdout'], held=True)


class _Ticket(grain.transforms.RandomMap):
  """Adds seeds to an example's number."""

  def random_map(
    self, element: int | np.integer, rng: np.random.Generator
  ) -> np.ndarray:
    words = rng.integers(0, 2**32, _WORDS, dtype=np.int64)
    return np.concatenate([np.asarray([element], np.int64), words])


def _order(
  source: sources.Joined,
  kept: Int[np.ndarray, 'n'],
  weights: tuple[int | float, ...],
  seed: int,
  videos: int,
) -> tuple[grain.MapDataset, bool]:
  """The endless order of example numbers, and whether batches are distinct."""
  if not weights:
    numbers = _numbers(kept).shuffle(_fold(seed, 0))
    distinct = len(kept) >= videos
    if distinct:  # after the shuffle: each epoch leaves out other videos
      numbers = numbers[: len(kept) // videos * videos]
    return numbers.repeat(), distinct
  if len(weights) != len(source.parts) or min(weights) <= 0:
    raise ValueError(
      f'data.weights is {weights}; wanted one positive number for each of the '
      f'{len(source.parts)} in data.source'
    )
  parts = [
    _numbers(numbers).shuffle(_fold(seed, 2 + i)).repeat()
    for i, numbers in enumerate(_by_source(source, kept))
  ]
  total = sum(weights)
  shares = [weight / total for weight in weights]
  return grain.MapDataset.mix(parts, weights=shares), False


def _by_source(
  source: sources.Joined, kept: Int[np.ndarray, 'n']
) -> Iterator[Int[np.ndarray, 'm']]:
  """Yields which of the numbers are of each source.

  Raises:
    ValueError: none is, of one of them.
  """
  ends = zip(source.offsets, source.offsets[1:], strict=False)
  for i, (low, high) in enumerate(ends, start=1):
    numbers = kept[(kept >= low) & (kept < high)]
    if not len(numbers):
      raise ValueError(
        f'data.holdout: none of the {high - low} videos of source {i} in '
        'data.source is left to train on, and data.weights gives it a share; '
        'wanted a smaller fraction, or data.source and data.weights without it'
      )
    yield numbers


def _numbers(kept: Int[np.ndarray, 'n']) -> grain.MapDataset:
  """Example numbers in order; a range where none is left out."""
  low, high = int(kept[0]), int(kept[-1]) + 1
  if len(kept) == high - low:
    return grain.MapDataset.range(low, high)
  return grain.MapDataset.source(kept)


def _fold(seed: int, salt: int) -> int:
  """A 31-bit seed for one use of the run's seed."""
  return int(np.random.SeedSequence((seed, salt)).generate_state(1)[0] >> 1)


def videos_per_process(batch_size: int, processes: int, clips: int) -> int:
  """Videos in a local batch.

  Raises:
    ValueError: the batch cannot be shared out evenly.
  """
  if batch_size < 1 or batch_size % (processes * clips):
    raise ValueError(
      f'batch_size is {batch_size}; wanted a multiple of {processes} processes '
      f'times {clips} clips per video'
    )
  return batch_size // (processes * clips)


def bad_files(folder: str, process_index: int) -> str:
  """Path of the list of unreadable videos of one process."""
  name = f'_{process_index}' if process_index else ''
  return os.path.join(folder, f'bad_files{name}.jsonl')


def parse_flags() -> None:
  """Lets Grain read its flags outside absl.app.run."""
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
