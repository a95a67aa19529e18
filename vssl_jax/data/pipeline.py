"""Builds batches of clips from lists of videos, as a function of the step.

  pipeline.make(config.data, batch_size=256, seed=0).iterator(start_step=1000)

The Grain pipeline is shuffle -> repeat -> random_map -> batch -> every P-th,
for P processes. Each element is a whole local batch and a pure function of its
index. The clips of step s are therefore the same for any number of hosts,
workers and restarts, and no iterator state needs to be saved.
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

from vssl_jax.data import batching, eval_epoch, options
from vssl_jax.data import read_stats as read_stats_lib
from vssl_jax.data.sources import holdout
from vssl_jax.data.sources import source as source_lib

_WORDS = 4  # random 32-bit words that seed the clips of an example


default, find, make_spec = options.default, options.find, options.spec
Pass = eval_epoch.Pass


class Clips:
  """An endless stream of batches that starts at any step. Built by `make`.

  Attributes:
    num_examples: number of videos in all sources, E.
    num_trained: number of videos that are not held out.
    classes: class names by label, or None.
    fingerprint: hash of the list of videos.
    shapes: shapes of the entries of one clip: {'video': (T, H, W, C), ...}.
    distinct: whether no batch holds a video twice (repeats aside). True if
      there are no weights and at least a batch of videos; each epoch is then
      cut to whole batches.
  """

  def __init__(
    self,
    loader: batching.Loader,
    requests: grain.MapDataset,
    read_stats: read_stats_lib.ReadStats,
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
    self._loader, self._requests, self._read_stats = (
      loader,
      requests,
      read_stats,
    )
    self._process = process_index, process_count
    self._workers, self._prefetch = workers, prefetch
    self._open = weakref.WeakSet()

  def iterator(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Yields the local batches of steps start_step, start_step + 1, ...

    The cost of starting is the same for any step.
    """
    index, count = self._process
    requests = self._requests[start_step * count + index :: count]
    iterator = batching.stream(
      requests, self._loader, self._workers, self._prefetch
    )
    batches = self._watched(iterator)
    self._open.add(batches)
    return batches

  def _watched(self, iterator: Any) -> Iterator[dict[str, np.ndarray]]:
    try:
      while True:
        start = time.perf_counter()
        batch = batching.take(iterator)
        self._read_stats.take(batch, time.perf_counter() - start)
        yield batching.own(batch)
    finally:  # also when the caller stops early
      iterator.close()

  def lines(self) -> Iterator[str]:
    """Yields the lines that the fingerprint hashes, one per video."""
    return self._loader.source.lines()

  def report(self) -> dict[str, float]:
    """Returns rates since the last report and counts since the start."""
    return self._read_stats.report()

  def describe(self) -> str:
    """Returns a one-sentence summary of the last report."""
    return self._read_stats.describe()

  def advice(self) -> str:
    """Returns a remedy if the last report shows a wait for data, else ''."""
    return self._read_stats.advice()

  def close(self) -> None:
    """Stops iterators, worker processes and readers."""
    for batches in list(self._open):
      with contextlib.suppress(ValueError):  # in use by another thread
        batches.close()
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
  """Opens the sources and builds the stream of training batches.

  Args:
    config: `config.data`, see `options.default()`.
    batch_size: clips per step over all processes.
    seed: seed of the order and of the augmentation.
    process_index: index of this process.
    process_count: number of processes that share each batch.
    folder: run folder for `bad_files.jsonl`, or None.

  Returns:
    Clips. A local batch holds B = batch_size / process_count clips:

      video: uint8 [B, T, H, W, C]
      index: int32 [B], index of the video; E where `substituted`
      repeat: int32 [B], which of the clips of its video
      substituted: bool [B], true for a substitute clip
      label: int32 [B], -1 unknown
      crop: float32 [B, 4], crop box: top, left, bottom, right as fractions of
        the upright frame
      flip: bool [B], whether the crop is mirrored left-right
      depth: float32 [B, T, H, W] in metres, 0 where unknown (RGB-D only)

  Raises:
    ValueError: the batch cannot be divided evenly, or the weights or the
      holdout fraction do not fit the sources.
  """
  parse_flags()
  source = _open(config, process_index)
  spec = options.spec(config)
  num_videos = videos_per_process(batch_size, process_count, spec.repeats)
  policy = options.policy(config, seed)
  loader = batching.Loader(source, spec, policy)
  indices = holdout.numbers(len(source), config['holdout'])
  requests, distinct = _order(
    source, indices, tuple(config['weights']), seed, num_videos * process_count
  )
  requests = requests.random_map(_Request(), seed=_fold(seed, 1))
  read_stats = read_stats_lib.ReadStats(
    examples=len(source),
    max_bad_fraction=config['max_bad_fraction'],
    path=folder and bad_files(folder, process_index),
    readers=policy.processes * max(config['workers'], 1),
  )
  return Clips(
    loader,
    requests.batch(num_videos, drop_remainder=True),
    read_stats,
    process_index=process_index,
    process_count=process_count,
    workers=config['workers'],
    prefetch=config['prefetch'],
    trained=len(indices),
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
) -> eval_epoch.Pass:
  """Opens the sources for one evaluation pass over all videos, in order.

  Each video yields segments x views clips at fixed positions (`transforms.
  spread`, `.interleaved` and `.views`), without augmentation.

  Args:
    config: `config.data`; crop, flip, repeats and weights are not used.
    batch_size: clips per batch over all processes.
    segments: clips along the time of a video; a single one is centred.
    views: crops along the longer side; a single one is centred.
    sampling: 'spread' or 'interleaved'.
    held: whether to take only the videos held out by `data.holdout`.
    process_index: index of this process.
    process_count: number of processes that share each batch.
    folder: run folder for `bad_files.jsonl`, or None.

  Returns:
    eval_epoch.Pass, an iterable of local batches.

  Raises:
    ValueError: the batch cannot be divided evenly.
  """
  parse_flags()
  source = _open(config, process_index)
  spec = options.spec(
    config, sampling=sampling, segments=segments, views=views, repeats=1
  )
  policy = options.policy(config, 0, substitute=False)
  read_stats = read_stats_lib.ReadStats(
    examples=len(source),
    max_bad_fraction=config['max_bad_fraction'],
    path=folder and bad_files(folder, process_index),
    readers=policy.processes * max(config['workers'], 1),
    may_lose=True,
  )
  return eval_epoch.Pass(
    batching.Loader(source, spec, policy),
    read_stats,
    numbers=_tested(source, config, held),
    videos=videos_per_process(batch_size, process_count, spec.clips),
    process_index=process_index,
    process_count=process_count,
    workers=config['workers'],
    prefetch=config['prefetch'],
  )


def _open(config: options.Options, process_index: int) -> source_lib.Joined:
  """Lists the videos; process 0 prints a summary of the sources."""
  source = options.find(config)
  if not process_index:
    _print_once(source.describe())
  return source


@functools.cache
def _print_once(text: str) -> None:
  """Prints a text once, although each pass over the videos repeats it."""
  print(text, flush=True)


def _tested(
  source: source_lib.Joined, config: options.Options, held: bool
) -> Int[np.ndarray, 'n']:
  """Returns the indices of the videos of an evaluation pass."""
  if not held:
    return np.arange(len(source))
  return holdout.numbers(len(source), config['holdout'], held=True)


class _Request(grain.transforms.RandomMap):
  """Appends random seeds to the index of an example."""

  def random_map(
    self, element: int | np.integer, rng: np.random.Generator
  ) -> np.ndarray:
    words = rng.integers(0, 2**32, _WORDS, dtype=np.int64)
    return np.concatenate([np.asarray([element], np.int64), words])


def _order(
  source: source_lib.Joined,
  kept: Int[np.ndarray, 'n'],
  weights: tuple[int | float, ...],
  seed: int,
  videos: int,
) -> tuple[grain.MapDataset, bool]:
  """Returns the endless order of indices, and whether batches are distinct."""
  if not weights:
    indices = _numbers(kept).shuffle(_fold(seed, 0))
    distinct = len(kept) >= videos
    if distinct:  # after the shuffle, so that each epoch drops other videos
      indices = indices[: len(kept) // videos * videos]
    return indices.repeat(), distinct
  if len(weights) != len(source.parts) or min(weights) <= 0:
    raise ValueError(
      f'data.weights is {weights}; wanted one positive number for each of the '
      f'{len(source.parts)} in data.source'
    )
  datasets = [
    _numbers(indices).shuffle(_fold(seed, 2 + i)).repeat()
    for i, indices in enumerate(_by_source(source, kept))
  ]
  total = sum(weights)
  shares = [weight / total for weight in weights]
  return grain.MapDataset.mix(datasets, weights=shares), False


def _by_source(
  source: source_lib.Joined, kept: Int[np.ndarray, 'n']
) -> Iterator[Int[np.ndarray, 'm']]:
  """Yields the indices of the training videos of each source.

  Raises:
    ValueError: a source has no training videos.
  """
  ends = zip(source.offsets, source.offsets[1:], strict=False)
  for i, (low, high) in enumerate(ends, start=1):
    indices = kept[(kept >= low) & (kept < high)]
    if not len(indices):
      raise ValueError(
        f'data.holdout: none of the {high - low} videos of source {i} in '
        'data.source is left to train on, and data.weights gives it a share; '
        'wanted a smaller fraction, or data.source and data.weights without it'
      )
    yield indices


def _numbers(kept: Int[np.ndarray, 'n']) -> grain.MapDataset:
  """Returns a dataset of indices in order; a range if there are no gaps."""
  low, high = int(kept[0]), int(kept[-1]) + 1
  if len(kept) == high - low:
    return grain.MapDataset.range(low, high)
  return grain.MapDataset.source(kept)


def _fold(seed: int, salt: int) -> int:
  """Derives a 31-bit seed from the seed of the run, one for each salt."""
  return int(np.random.SeedSequence((seed, salt)).generate_state(1)[0] >> 1)


def videos_per_process(batch_size: int, processes: int, clips: int) -> int:
  """Returns the number of videos in a local batch.

  Args:
    batch_size: clips per step over all processes.
    processes: number of processes that share each batch.
    clips: clips per video.

  Raises:
    ValueError: the batch cannot be divided evenly.
  """
  if batch_size < 1 or batch_size % (processes * clips):
    raise ValueError(
      f'batch_size is {batch_size}; wanted a multiple of {processes} processes '
      f'times {clips} clips per video'
    )
  return batch_size // (processes * clips)


def bad_files(folder: str, process_index: int) -> str:
  """Returns the path of the list of bad files of one process."""
  name = f'_{process_index}' if process_index else ''
  return os.path.join(folder, f'bad_files{name}.jsonl')


def parse_flags() -> None:
  """Marks the flags as parsed, as Grain needs outside absl.app.run."""
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
