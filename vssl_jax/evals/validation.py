"""Looks at a fine-tuning after every epoch, and keeps the best of it."""

import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections

from vssl_jax.data import passes
from vssl_jax.evals import finetune_videos, finetuned
from vssl_jax.train import checkpoint, metrics


class Watcher:
  """Validates every epoch on one centre view of each video.

  The parameters that did best are kept under `params/best`. Of equal numbers
  of right answers, those that give the true classes more probability win; of
  equal ones the earlier.

  Args:
    config: as `finetune_start.fill` returns it.
    videos: to validate on.
    every: steps of an epoch.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    videos: finetune_videos.Videos,
    every: int,
  ) -> None:
    self._config, self._videos, self._every = config, videos, every
    self._clips: passes.Pass | None = None

  def due(self, done: int, span_start: int) -> bool:
    """Returns whether an epoch has ended."""
    return (done - span_start) % self._every == 0

  def look(self, run: Any, span: Any, state: Any, done: int) -> list[str]:
    """Validates, logs, and saves the parameters if they are the best so far.

    Args:
      run: with mesh, logger and checkpoints.
      span: the phase and its boundaries.
      state: train state.
      done: steps done.
    """
    if self._clips is None:
      self._clips = finetune_videos.one_view(self._config, self._videos)
    found = finetuned.count(span.phase, state.params, self._clips, 1, run.mesh)
    now = {
      'correct': int(found.correct()[0]),
      'total': found.total,
      'loss': float(found.loss()[0]),
    }
    accuracy = now['correct'] / now['total']
    run.logger.write(
      done,
      {'valid/accuracy': accuracy, 'valid/loss': now['loss']},
      phase=span.phase.name,
    )
    better = _rank(now) > _rank(_before(run.checkpoints, done))
    if better:
      run.checkpoints.save_params(
        {'params': state.params},
        done,
        span.phase.name,
        name=checkpoint.BEST,
        extra={'valid': now},
      )
    return [
      f'epoch {(done - span.start) // self._every}: {now["correct"]} of '
      f'{now["total"]} validation videos right ({100 * accuracy:.2f} %), loss '
      f'{now["loss"]:.4f}' + (', the best so far' if better else '')
    ]

  def close(self) -> None:
    """Ends what reads the videos."""
    if self._clips is not None:
      self._clips.close()


def _before(
  checkpoints: checkpoint.Checkpoints, done: int
) -> dict[str, Any] | None:
  """Returns what the best of earlier epochs reached.

  One of this or a later step is what a start before this one left, which is
  found again; after a rewind that leaves batches out it may not be, and the
  report says so. Its manifest is all that is read: whoever loads it sees
  whether its files are whole.
  """
  saved = checkpoints.params_of(checkpoint.BEST)
  if saved is None or saved.step >= done:
    return None
  return saved.manifest.get('valid')  # none where it cannot be read


def _rank(found: dict[str, Any] | None) -> tuple[float, float]:
  """Returns what decides between two looks; the larger is better."""
  if found is None:
    return (-1.0, 0.0)
  return (found['correct'] / found['total'], -found['loss'])


def history(workdir: str, every: int) -> list[dict[str, Any]]:
  """Returns epoch, accuracy and loss of every validation that was logged.

  Args:
    workdir: the run's folder.
    every: steps of an epoch.
  """
  found = {}
  for row in metrics.read(pathlib.Path(workdir) / metrics.FILE):
    if 'valid/accuracy' in row:
      found[row['step']] = {
        'epoch': row['step'] // every,
        'accuracy': row['valid/accuracy'],
        'loss': row['valid/loss'],
      }
  return [found[step] for step in sorted(found)]


def lost(report: Mapping[str, Any]) -> str:
  """Returns what to say of an epoch that was better than the one kept, or ''.

  There is one when a run was rewound to before its best: the files of that
  went, and of the epochs before it none were there to compare with.

  Args:
    report: as `finetune.evaluate` makes it.
  """
  every = report['steps'] // report['finetune']['epochs']
  kept = report['results']['best']['step'] // every
  best = max(
    report['history'],
    key=lambda x: (x['accuracy'], -x['loss'], -x['epoch']),
    default=None,
  )
  if best is None or best['epoch'] == kept:
    return ''
  return (
    f'not the best of the run: epoch {best["epoch"]} had '
    f'{100 * best["accuracy"]:.2f} % and loss {best["loss"]:.4f}, tested is '
    f'epoch {kept}; the run went back to before its best'
  )
