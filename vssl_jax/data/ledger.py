"""Counts what the loader reports: rates, waits, files that cannot be read."""

import json
import math
import os
import time

import numpy as np

from vssl_jax import jsonl
from vssl_jax.data import loading

WAIT_ALARM = 0.05  # fraction of the time


class TooManyBadFiles(RuntimeError):
  """More videos cannot be read than `data.max_bad_fraction` allows."""


class Ledger:
  """Takes the report out of each batch and keeps the books.

  A run stops when the examples found bad are more than `max_bad_fraction` of
  all there are, or when those of the examples drawn so far are so many that
  chance (4 standard deviations, 64 draws or more) does not explain them.
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
    """Opens the books.

    Args:
      examples: videos there are.
      max_bad_fraction: of them that may be unreadable.
      path: list of unreadable videos to append to, or None.
      readers: that decode at the same time.
      may_lose: whether a batch may lack a video without a substitute.
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
    """Removes the report from a batch and enters it.

    Args:
      batch: of the loader; loses its notes.
      waited: seconds that the caller had to wait for it.

    Raises:
      TooManyBadFiles: naming some of them with their reasons.
    """
    notes = json.loads(bytes(batch.pop(loading.NOTES)))
    self._waited += waited
    self._clips += len(batch['index'])
    self.videos += notes['videos']
    self._rate_videos += notes['videos']
    self._rate_seconds += notes['seconds']
    self.short += notes['short']
    self.substituted += int(batch['substituted'].sum())
    self._bad_draws += len({f['wanted'] for f in notes['failures']})
    fresh = {f['index']: f for f in notes['failures']}
    fresh = {k: f for k, f in fresh.items() if k not in self.bad}
    self.bad.update(fresh)
    self._write(fresh)
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
      why = f'{len(self.bad)} of all {self._examples} videos cannot be read'
    elif draws >= 64 and self._bad_draws > chance:
      why = f'{self._bad_draws} of {draws} videos drawn cannot be read'
    elif lost and not self._may_lose:
      why = f'no substitute could be read for example {lost[0]}'
    else:
      return
    some = '\n'.join(
      f'  {f["file"]}: {f["reason"]}, {f["detail"]}'
      for f in list(self.bad.values())[:5]
    )
    raise TooManyBadFiles(
      f'{why}; data.max_bad_fraction allows {share:g}.\n{some}\n'
      f'All of them: {self._path or "set a workdir for a list"}. Repair or '
      'remove the files, or raise data.max_bad_fraction.'
    )

  def report(self) -> dict[str, float]:
    """Figures since the last report (counts since the start)."""
    wall = max(time.perf_counter() - self._since, 1e-9)
    rate = self._rate_videos / max(self._rate_seconds, 1e-9)
    per_video = self._clips / max(self._rate_videos, 1)
    busy = max(wall - self._waited, 1e-9)
    wanted = self._clips / busy
    report = {
      'data/decode_clips_per_s': rate * per_video,
      'data/clips_per_s': self._clips / wall,
      'data/wait_fraction': min(self._waited / wall, 1.0),
      'data/workers': self._readers,
      'data/workers_needed': math.ceil(wanted / max(rate * per_video, 1e-9)),
      'data/bad_files': len(self.bad),
      'data/substituted': self.substituted,
      'data/short': self.short,
    }
    self._since, self._waited, self._clips = time.perf_counter(), 0.0, 0
    self._rate_seconds = self._rate_videos = 0.0
    self._last = report
    return report

  def describe(self) -> str:
    """The last report in one sentence."""
    if not self._last:
      return 'no clips were read yet'
    get = lambda name: self._last[f'data/{name}']
    return (
      f'{get("clips_per_s"):.1f} clips/s from {self._readers} readers that '
      f'decode {get("decode_clips_per_s"):.1f} clips/s each; '
      f'{get("wait_fraction"):.0%} of the time went by waiting for clips '
      f'({get("workers_needed"):.0f} readers would keep up); '
      f'{get("bad_files"):.0f} unreadable videos'
    )

  def advice(self) -> str:
    """What to do if the last report shows a wait for data, else ''."""
    if self._last.get('data/wait_fraction', 0.0) < WAIT_ALARM:
      return ''
    return (
      f'data bound: {self.describe()}. With free cores ({loading.cores()} '
      'here) raise data.decode_processes or data.workers; otherwise make the '
      'videos cheaper to read once (python -m vssl_jax.data.prepare --help), '
      'or use each for longer (data.repeats=2, data.repeat_frames=shared).'
    )


def _listed(path: str | None) -> set[int]:
  """Numbers that a list of unreadable videos holds already."""
  entries = jsonl.read(path) if path else []
  return {x['index'] for x in entries if isinstance(x.get('index'), int)}
