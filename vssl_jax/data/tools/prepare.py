"""Transcodes videos into shards for fast reading in training.

  python -m vssl_jax.data.tools.prepare --source=/my/videos --out=/my/shards

Every video is transcoded to a short side of at most 256 pixels and a key frame
every 16 frames, and written to ArrayRecord files. To train on them, set
--config.data.source=/my/shards. To resume after an interruption, run the same
command. Bad files are skipped and listed in failed.jsonl with the reason.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tqdm
from array_record.python import array_record_module

from vssl_jax.data import batching
from vssl_jax.data.clips import decode, isolated_process
from vssl_jax.data.sources import example as example_lib
from vssl_jax.data.sources import json_files
from vssl_jax.data.sources import shards as shards_lib
from vssl_jax.data.sources import source as source_lib
from vssl_jax.data.tools import transcode

OPTIONS = 'group_size:1,uncompressed'  # one video per seek, already compressed
SETTINGS = 'settings.json'
FAILED = 'failed.jsonl'


@dataclasses.dataclass(frozen=True)
class Result:
  """Result of transcoding one video: its new content, or the error."""

  index: int
  name: str
  label: str | None = None
  media: bytes | None = None
  reason: str = ''
  detail: str = ''
  size: int = 0  # bytes of the original


class TranscodePool:
  """Pool of worker processes that transcode videos, one thread for each."""

  def __init__(
    self,
    source: source_lib.Source,
    target: transcode.Target,
    *,
    workers: int,
    deadline_s: int | float,
    memory_limit_mb: int,
  ) -> None:
    self._source, self._workers = source, workers
    self._pool = isolated_process.WorkerPool(
      transcode.WORKER_PROGRAM,
      {'target': dataclasses.asdict(target)},
      deadline_s=deadline_s,
      memory_limit_mb=memory_limit_mb,
    )
    self._threads = concurrent.futures.ThreadPoolExecutor(workers)
    self._folder = tempfile.TemporaryDirectory(prefix='prepare')

  def __enter__(self) -> 'TranscodePool':
    return self

  def __exit__(self, *unused: object) -> None:
    self._pool.stop()
    self._threads.shutdown(cancel_futures=True)
    self._pool.close()
    self._folder.cleanup()

  def results(self, numbers: Iterable[int]) -> Iterator[Result]:
    """Yields the results of examples in order; computes a few in advance."""
    numbers, waiting = iter(numbers), collections.deque()
    while True:
      for index in itertools.islice(numbers, 4 * self._workers - len(waiting)):
        waiting.append(self._threads.submit(self._rewrite, index))
      if not waiting:
        return
      yield waiting.popleft().result()

  def _rewrite(self, number: int) -> Result:
    name = f'example {number}'
    path = os.path.join(self._folder.name, str(number))
    try:
      item = self._source.item(number)
      name, in_memory = item.name, isinstance(item.media, bytes)
      request = {'path': None if in_memory else item.media, 'out': path}
      self._pool.ask(request, item.media if in_memory else b'')
      size = len(item.media) if in_memory else os.path.getsize(item.media)
      with open(path, 'rb') as file:
        media = file.read()
    except decode.VideoError as error:
      return Result(number, name, reason=error.reason, detail=error.detail)
    finally:
      if os.path.exists(path):
        os.unlink(path)
    classes = self._source.classes
    label = classes[item.label] if classes and item.label >= 0 else None
    return Result(number, name, label, media, size=size)


def prepare(
  source: source_lib.Joined,
  out: str,
  target: transcode.Target,
  *,
  shard_videos: int = 256,
  workers: int = 0,
  deadline_s: int | float = 600.0,
  memory_limit_mb: int = 2048,
  progress: Callable[[Result], None] = lambda result: None,
) -> dict[str, Any]:
  """Transcodes videos into shards; resumes an interrupted call.

  Args:
    source: source of the videos.
    out: folder for the shards.
    target: format of the videos.
    shard_videos: videos per shard.
    workers: videos transcoded at a time; 0: one per core.
    deadline_s: time limit for one video in seconds.
    memory_limit_mb: memory limit for one video in MiB.
    progress: function called after each video.

  Returns:
    {'written', 'failed': [...], 'before', 'after' (bytes), 'shards'}.

  Raises:
    ValueError: `out` holds shards of other videos or settings.
  """
  os.makedirs(out, exist_ok=True)
  _settle(out, source, target, shard_videos)
  total = -(-len(source) // shard_videos)
  parts = [
    (shard_index, range(n, min(n + shard_videos, len(source))))
    for shard_index, n in enumerate(range(0, len(source), shard_videos))
    if not _is_done(out, shard_index, total)
  ]
  with TranscodePool(
    source,
    target,
    workers=workers or batching.cores(),
    deadline_s=deadline_s,
    memory_limit_mb=memory_limit_mb,
  ) as pool:
    results = pool.results(i for _, indices in parts for i in indices)
    for shard_index, indices in parts:
      part = itertools.islice(results, len(indices))
      _write_shard(out, shard_index, total, part, progress)
  return _summary(out, source, total)


def _is_done(out: str, number: int, total: int) -> bool:
  """Returns whether a shard and its report exist and are complete."""
  try:
    report = json_files.load(_report_path(out, number, total))
    count = report['written']
    if not {'failed', 'before', 'after'} <= report.keys():
      return False
    if count:
      return shards_lib.count(_shard_path(out, number, total)) == count
  except (OSError, ValueError, KeyError, TypeError):
    return False
  return True


def _settle(
  out: str, source: source_lib.Joined, target: transcode.Target, per: int
) -> None:
  """Writes the settings to a new folder, or checks those of an existing one."""
  settings = {
    'videos': source.fingerprint,
    'shard_videos': per,
    **dataclasses.asdict(target),
  }
  path = os.path.join(out, SETTINGS)
  if os.path.exists(path):
    try:
      saved = json_files.load(path)
    except ValueError as error:
      raise ValueError(
        f'{error}; the settings of the shards in {out} are unknown: remove '
        'that folder, or choose another --out'
      ) from error
    changed = [
      f'{key} was {saved.get(key)!r}, is {settings.get(key)!r}'
      for key in sorted({*saved, *settings})
      if saved.get(key) != settings.get(key)
    ]
    if changed:
      raise ValueError(
        f'{out} holds shards of other settings ({"; ".join(changed)}); choose '
        'another --out, or remove that folder'
      )
  _write_json(path, settings)


def _write_shard(
  out: str,
  number: int,
  total: int,
  results: Iterable[Result],
  progress: Callable[[Result], None],
) -> None:
  """Writes a shard, then its report, which marks the shard as complete."""
  path = _shard_path(out, number, total)
  partial = os.path.join(out, f'.{number}.partial')
  writer = array_record_module.ArrayRecordWriter(partial, OPTIONS)
  report = {'written': 0, 'failed': [], 'before': 0, 'after': 0}
  for result in results:
    if result.media is None:
      report['failed'].append(
        {
          'index': result.index,
          'file': result.name,
          'reason': result.reason,
          'detail': result.detail,
        }
      )
    else:
      writer.write(shards_lib.pack(result.media, result.name, result.label))
      report['written'] += 1
      report['before'] += result.size
      report['after'] += len(result.media)
    progress(result)
  writer.close()
  if report['written']:
    os.replace(partial, path)
  else:
    os.unlink(partial)
  _write_json(_report_path(out, number, total), report)


def _summary(out: str, source: source_lib.Joined, total: int) -> dict[str, Any]:
  """Sums the reports; writes the index and the list of failures."""
  summary = {'written': 0, 'failed': [], 'before': 0, 'after': 0, 'shards': 0}
  for shard_index in range(total):
    report = json_files.load(_report_path(out, shard_index, total))
    for key in ('written', 'failed', 'before', 'after'):
      summary[key] += report[key]
  shards = [
    os.path.basename(_shard_path(out, shard_index, total))
    for shard_index in range(total)
    if os.path.exists(_shard_path(out, shard_index, total))
  ]
  summary['shards'] = len(shards)
  with open(os.path.join(out, FAILED), 'w', encoding='utf-8') as file:
    file.writelines(json.dumps(failure) + '\n' for failure in summary['failed'])
  index = {'classes': list(source.classes or ()), 'shards': shards}
  _write_json(os.path.join(out, shards_lib.INDEX), index)
  return summary


def _shard_path(out: str, number: int, total: int) -> str:
  return os.path.join(out, f'videos-{number:05}-of-{total:05}.array_record')


def _report_path(out: str, number: int, total: int) -> str:
  return os.path.join(out, f'report-{number:05}-of-{total:05}.json')


def _write_json(path: str, content: dict[str, Any]) -> None:
  """Writes a JSON file atomically."""
  with open(f'{path}.partial', 'w', encoding='utf-8') as file:
    json.dump(content, file)
  os.replace(f'{path}.partial', path)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m vssl_jax.data.tools.prepare',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add('--source', required=True, help='as config.data.source')
  add('--out', required=True, help='folder for the shards')
  add('--where', default='', help='rows of a manifest, as config.data.where')
  add('--short_side', type=int, default=256, help='pixels (256)')
  add('--gop', type=int, default=16, help='frames between key frames (16)')
  add('--fps', type=float, default=0.0, help='frames/s; 0 keeps all (0)')
  add('--quality', type=int, default=20, help='x264 crf, lower is better (20)')
  add('--preset', default='veryfast', help='of x264 (veryfast)')
  add('--shard_videos', type=int, default=256, help='videos per shard (256)')
  add('--workers', type=int, default=0, help='videos at a time; 0: by cores')
  add('--deadline_s', type=float, default=600.0, help='for a video (600)')
  add('--memory_limit_mb', type=int, default=2048, help='for a video (2048)')
  return parser


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command and returns its exit status."""
  options = _parser().parse_args(arguments)
  try:
    return _run(options)
  except (OSError, ValueError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2


def _run(options: argparse.Namespace) -> int:
  """Writes the shards, prints a summary and returns the exit status."""
  source = source_lib.find(
    source_lib.split(options.source), where=options.where
  )
  print(source.describe(), flush=True)
  target = transcode.Target(
    short_side=options.short_side,
    gop=options.gop,
    fps=options.fps,
    quality=options.quality,
    preset=options.preset,
  )
  num_done = 0
  with tqdm.tqdm(total=len(source), unit='video') as bar:

    def progress(result: Result) -> None:
      nonlocal num_done
      num_done += 1
      if result.media is None:
        name = example_lib.printable(result.name)
        bar.write(f'{name}: {result.reason}, {result.detail}')
      bar.update()

    summary = prepare(
      source,
      options.out,
      target,
      shard_videos=options.shard_videos,
      workers=options.workers,
      deadline_s=options.deadline_s,
      memory_limit_mb=options.memory_limit_mb,
      progress=progress,
    )
    bar.update(len(source) - num_done)  # videos of an earlier call
  failed = summary['failed']
  reasons = collections.Counter(failure['reason'] for failure in failed)
  print(
    f'{summary["written"]} of {len(source)} videos in {summary["shards"]} '
    f'shards, {summary["before"] / 1e6:.1f} -> {summary["after"] / 1e6:.1f} MB'
  )
  if failed:
    counts = ', '.join(f'{n} {reason}' for reason, n in reasons.most_common())
    path = os.path.join(options.out, FAILED)
    print(f'{len(failed)} left out ({counts}): {path}')
  print(f'train on them with --config.data.source={options.out}')
  return 0 if summary['written'] else 1


if __name__ == '__main__':
  sys.exit(main())
