"""Statistics of the data loader: read rates, waiting time and bad files."""

import json
import math
import os
import time

import numpy as np

from vssl_jax.data import batching
from vssl_jax.utils import jsonl

WAIT_ALARM = 0.05  # fraction of the wall time


class TooManyBadFiles(RuntimeError):
  """More videos cannot be read than `data.max_bad_fraction` allows."""


class ReadStats:
  """Accumulates the reports of the loader and limits the number of bad files.

  A run stops when bad files are more than `max_bad_fraction` of all examples.
  It also stops when they exceed this fraction of the examples drawn so far by
  more than 4 standard deviations, from 64 draws on.
  """

  def __init__(
    self,
    *,
    examples: int,
    max_bad_fraction: int | float,
    path: str | None,
    readers: int,
    may_lose: bool = False,
  ) -> None:
    """Initializes the statistics.

    Args:
      examples: number of videos.
      max_bad_fraction: fraction of the videos that may be unreadable.
      path: list of bad files to append to, or None.
      readers: number of readers that decode at the same time.
      may_lose: whether a batch may lack a video without a substitute clip.
    """
    self._examples, self._limit, self._path = examples, max_bad_fraction, path
    self._readers, self._may_lose = readers, may_lose
    self._listed = _listed(path)
    self.bad: dict[int, dict] = {}
    self.substituted = self.short = self.videos = self._bad_draws = 0
    self._rate_seconds = self._rate_videos = 0.0
    self._since, self._waited, self._clips = time.perf_counter(), 0.0, 0
    self._last: dict[str, float] = {}

  def take(self, batch: dict[str, np.ndarray], waited: float) -> None:
    """Removes the report from a batch and adds it to the statistics.

    Args:
      batch: batch of the loader; its entry NOTES is removed.
      waited: seconds that the caller waited for the batch.

    Raises:
      TooManyBadFiles: with some of the files and their reasons.
    """
    notes = json.loads(bytes(batch.pop(batching.NOTES)))
    self._waited += waited
    self._clips += len(batch['index'])
    self.videos += notes['videos']
    self._rate_videos += notes['videos']
    self._rate_seconds += notes['seconds']
    self.short += notes['short']
    self.substituted += int(batch['substituted'].sum())
    self._bad_draws += len({failure['wanted'] for failure in notes['failures']})
    new_failures = {failure['index']: failure for failure in notes['failures']}
    new_failures = {
      k: failure for k, failure in new_failures.items() if k not in self.bad
    }
    self.bad.update(new_failures)
    self._write(new_failures)
    if notes['failures']:
      self._judge(notes['lost'])

  def _write(self, failures: dict[int, dict]) -> None:
    failures = {k: f for k, f in failures.items() if k not in self._listed}
    if not self._path or not failures:
      return
    os.makedirs(os.path.dirname(self._path) or '.', exist_ok=True)
    with jsonl.append_to(self._path) as file:
      for failure in failures.values():
        entry = {k: v for k, v in failure.items() if k != 'wanted'}
        file.write(json.dumps(entry) + '\n')

  def _judge(self, lost: list[int]) -> None:
    share, draws = self._limit, self.videos
    chance = share * draws + 4 * math.sqrt(share * (1 - share) * draws)
    if len(self.bad) > share * self._examples:
      problem = f'{len(self.bad)} of all {self._examples} videos cannot be read'
    elif draws >= 64 and self._bad_draws > chance:
      problem = f'{self._bad_draws} of {draws} videos drawn cannot be read'
    elif lost and not self._may_lose:
      problem = f'no substitute could be read for example {lost[0]}'
    else:
      return
    lines = '\n'.join(
      f'  {f["file"]}: {f["reason"]}, {f["detail"]}'
      for f in list(self.bad.values())[:5]
    )
    raise TooManyBadFiles(
      f'{problem}; data.max_bad_fraction allows {share:g}.\n{lines}\n'
      f'All of them: {self._path or "set a workdir for a list"}. Repair or '
      'remove the files, or raise data.max_bad_fraction.'
    )

  def report(self) -> dict[str, float]:
    """Returns rates since the last report and counts since the start."""
    wall = max(time.perf_counter() - self._since, 1e-9)
    rate = self._rate_videos / max(self._rate_seconds, 1e-9)
    per_video = self._clips / max(self._rate_videos, 1)
    busy = max(wall - self._waited, 1e-9)
    required_rate = self._clips / busy
    report = {
      'data/decode_clips_per_s': rate * per_video,
      'data/clips_per_s': self._clips / wall,
      'data/wait_fraction': min(self._waited / wall, 1.0),
      'data/readers': self._readers,
      'data/readers_needed': math.ceil(
        required_rate / max(rate * per_video, 1e-9)
      ),
      'data/bad_files': len(self.bad),
      'data/substituted': self.substituted,
      'data/short': self.short,
    }
    self._since, self._waited, self._clips = time.perf_counter(), 0.0, 0
    self._rate_seconds = self._rate_videos = 0.0
    self._last = report
    return report

  def describe(self) -> str:
    """Returns a one-sentence summary of the last report."""
    if not self._last:
      return 'no clips were read yet'
    get = lambda name: self._last[f'data/{name}']
    return (
      f'{get("clips_per_s"):.1f} clips/s from {self._readers} readers that '
      f'decode {get("decode_clips_per_s"):.1f} clips/s each; '
      f'{get("wait_fraction"):.0%} of the time was spent waiting for clips '
      f'({get("readers_needed"):.0f} readers would keep up); '
      f'{get("bad_files"):.0f} unreadable videos'
    )

  def advice(self) -> str:
    """Returns a remedy if the last report shows a wait for data, else ''."""
    if self._last.get('data/wait_fraction', 0.0) < WAIT_ALARM:
      return ''
    return (
      f'data bound: {self.describe()}. With free cores ({batching.cores()} '
      'here) raise data.decode_processes or data.workers; otherwise make the '
      'videos cheaper to read once (python -m vssl_jax.data.tools.prepare '
      '--help), or use each for longer (data.repeats=2, '
      'data.repeat_frames=shared).'
    )


def _listed(path: str | None) -> set[int]:
  """Returns the indices that a list of bad files already holds."""
  entries = jsonl.read(path) if path else []
  return {
    entry['index'] for entry in entries if isinstance(entry.get('index'), int)
  }
