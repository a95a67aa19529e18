"""From a list of videos to batches: the batch of step s depends on s alone.

  pipeline.make(config.data, batch_size=256, seed=0).iterator(start_step=1000)

The chain is shuffle -> repeat -> random_map -> batch -> every P-th: each
element is a whole local batch, a pure function of its number. So the clips of
step s are the same for any number of hosts, workers and restarts, and nothing
about an iterator needs to be saved.
"""

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import ml_collections
import numpy as np
from absl import flags

from vssl_jax.data import clip as clip_lib
from vssl_jax.data import ledger as ledger_lib
from vssl_jax.data import loading, sources

_WORDS = 4  # random 32-bit words that seed the clips of an example


def default() -> ml_collections.ConfigDict:
  """Every key of `config.data`."""
  return ml_collections.ConfigDict(
    dict(
      # --- where the videos are
      # A folder (folders inside it name classes), a manifest (csv, tsv,
      # space separated, jsonl), ArrayRecord shards, a TFDS directory; or
      # several of these, separated by commas.
      source='',
      weights=(),  # shares of the sources in each batch; (): by their sizes
      where='',  # rows of a manifest: 'fold=0,1' or 'fold!=3'
      path_column='',  # of a manifest; '': found by its name
      label_column='',
      split='train',  # of a TFDS directory
      classes=(),  # names in the order of their labels; (): found out
      # --- what a clip is
      frames=16,
      stride=4,  # frames from one to the next
      fps=0.0,  # frames per second instead, by time stamps (then stride=1)
      size=(224, 224),  # height, width in pixels
      channels=3,  # 1: grey
      sampling='window',  # or 'scattered': a frame from each of T equal parts
      min_frames=1,  # videos with fewer are bad; others repeat the last frame
      # --- how it is augmented
      crop='random_resized',  # or 'multi_scale', 'centre'
      crop_scale=(0.3, 1.0),  # area of random_resized, of the picture
      crop_aspect=(0.75, 4 / 3),  # width / height of random_resized
      crop_part=1.0,  # side of centre crops, of the largest that fits
      flip=True,  # left-right; off where direction is the label
      repeats=1,  # clips per video in a batch, for one opening of the file
      repeat_frames='own',  # 'shared': same frames, other crops (cheaper)
      # --- how it is read
      workers=0,  # processes that build batches; 0: threads of this one
      decode_processes=0,  # readers in each of these; 0: one per core
      isolate=True,  # readers are child processes, killed when they hang
      prefetch=2,  # batches ready in advance, per worker
      deadline_s=20.0,  # for the clips of one video
      memory_limit_mb=1024,  # of a reader
      max_pixels=2**26,  # of a picture; larger ones are refused unread
      # --- when a video cannot be read
      retries=2,  # of errors of the disk
      max_bad_fraction=0.05,  # stop above this share of unreadable videos
    )
  )


class Clips:
  """An endless, addressable stream of batches. Made by `make`.

  Attributes:
    num_examples: videos in all sources, E.
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
    distinct: bool,
  ) -> None:
    source, spec = loader.source, loader.spec
    self.num_examples = len(source)
    self.classes = list(source.classes) if source.classes else None
    self.fingerprint = source.fingerprint
    self.shapes = {
      'video': spec.shape,
      'index': (),
      'repeat': (),
      'substituted': (),
      'label': (),
      'crop': (4,),
    }
    self.distinct = distinct
    self._loader, self._tickets, self._ledger = loader, tickets, ledger
    self._process = process_index, process_count
    self._workers, self._prefetch = workers, prefetch
    self._open = []

  def iterator(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Yields the local batches of steps start_step, start_step + 1, ...

    Seeking costs the same for any step.
    """
    index, count = self._process
    batches = self._tickets[start_step * count + index :: count]
    stream = batches.map(self._loader).to_iter_dataset(
      grain.ReadOptions(num_threads=1, prefetch_buffer_size=self._prefetch)
    )
    if self._workers:
      stream = stream.mp_prefetch(
        grain.MultiprocessingOptions(
          num_workers=self._workers, per_worker_buffer_size=self._prefetch
        )
      )
    iterator = iter(stream)
    self._open.append(iterator)
    return self._watched(iterator)

  def _watched(self, iterator: Any) -> Iterator[dict[str, np.ndarray]]:
    while True:
      start = time.perf_counter()
      batch = next(iterator)
      self._ledger.take(batch, time.perf_counter() - start)
      yield batch

  def report(self) -> dict[str, float]:
    """Rates since the last report, counts since the start."""
    return self._ledger.report()

  def close(self) -> None:
    """Ends iterators, workers and readers."""
    while self._open:
      self._open.pop().close()
    self._loader.close()


def make(
  config: Mapping[str, Any],
  *,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
  folder: str | None = None,
) -> Clips:
  """Opens the sources and makes the stream of training batches.

  Args:
    config: `config.data`, see `default()`.
    batch_size: clips per step over all processes.
    seed: of order and augmentation.
    process_index: number of this process.
    process_count: processes that share each batch.
    folder: where `bad_files.jsonl` is written, or None.

  Returns:
    Clips, whose local batches hold batch_size / process_count clips:
    {'video': uint8 [B, T, H, W, C], 'index': int32 [B] (the number of videos
    where `substituted`), 'repeat': int32 [B], 'substituted': bool [B],
    'label': int32 [B] (-1 unknown), 'crop': float32 [B, 4]}.
  """
  parse_flags()
  source = find(config)
  spec = make_spec(config)
  local = videos_per_process(batch_size, process_count, spec.repeats)
  policy = make_policy(config, seed)
  loader = loading.Loader(source, spec, policy)
  tickets, distinct = _order(
    source, tuple(config['weights']), seed, local * process_count
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
    distinct=distinct,
  )


class _Ticket(grain.transforms.RandomMap):
  """Adds seeds to an example's number."""

  def random_map(self, element: int, rng: np.random.Generator) -> np.ndarray:
    words = rng.integers(0, 2**32, _WORDS, dtype=np.int64)
    return np.concatenate([np.asarray([element], np.int64), words])


def _order(
  source: sources.Joined, weights: tuple[float, ...], seed: int, videos: int
) -> tuple[grain.MapDataset, bool]:
  """The endless order of example numbers, and whether batches are distinct."""
  if not weights:
    numbers = grain.MapDataset.range(len(source)).shuffle(_fold(seed, 0))
    distinct = len(source) >= videos
    if distinct:  # after the shuffle: each epoch leaves out other videos
      numbers = numbers[: len(source) // videos * videos]
    return numbers.repeat(), distinct
  if len(weights) != len(source.parts) or min(weights) <= 0:
    raise ValueError(
      f'data.weights is {weights}; wanted one positive number for each of the '
      f'{len(source.parts)} in data.source'
    )
  parts = [
    grain.MapDataset.range(low, high).shuffle(_fold(seed, 2 + i)).repeat()
    for i, (low, high) in enumerate(
      zip(source.offsets, source.offsets[1:], strict=False)
    )
  ]
  total = sum(weights)
  shares = [weight / total for weight in weights]
  return grain.MapDataset.mix(parts, weights=shares), False


def _fold(seed: int, salt: int) -> int:
  """A 31-bit seed for one use of the run's seed."""
  return int(np.random.SeedSequence((seed, salt)).generate_state(1)[0] >> 1)


def find(config: Mapping[str, Any]) -> sources.Joined:
  """Lists the videos that `config.data` names."""
  source = config['source']
  source = source.split(',') if isinstance(source, str) else tuple(source)
  return sources.find(
    tuple(source),
    where=config['where'],
    classes=tuple(config['classes']),
    path_column=config['path_column'],
    label_column=config['label_column'],
    split=config['split'],
  )


def make_spec(config: Mapping[str, Any], **overrides: Any) -> clip_lib.Spec:
  """The clip that `config.data` describes."""
  names = {field.name for field in dataclasses.fields(clip_lib.Spec)}
  values = {name: config[name] for name in config if name in names}
  size = config['size']
  size = (size, size) if isinstance(size, int) else tuple(size)
  values.update(height=size[0], width=size[1])
  for name in ('crop_scale', 'crop_aspect'):
    values[name] = tuple(values[name])
  return clip_lib.Spec(**{**values, **overrides})


def make_policy(
  config: Mapping[str, Any], seed: int, **overrides: Any
) -> loading.Policy:
  """How `config.data` wants files to be read."""
  workers = config['workers']
  if workers < 0 or config['decode_processes'] < 0:
    raise ValueError('data.workers and data.decode_processes are 0 or more')
  spread = max(1, loading.cores() // max(workers, 1))
  names = ('retries', 'isolate', 'deadline_s', 'memory_limit_mb')
  values = {name: config[name] for name in names}
  values['processes'] = config['decode_processes'] or spread
  return loading.Policy(seed=seed, **{**values, **overrides})


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
