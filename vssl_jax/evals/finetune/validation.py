"""Validates a fine-tuning after every epoch, and keeps the best parameters."""

import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections

from vssl_jax.checkpoint import manager
from vssl_jax.data import eval_epoch
from vssl_jax.evals.finetune import model
from vssl_jax.evals.finetune import videos as videos_lib
from vssl_jax.utils import metrics


class Hook:
  """Validates every epoch on one centre view of each video.

  The best parameters are saved as `params/best`. Ties in the number of correct
  videos go to the smaller loss, further ties to the earlier epoch.

  Args:
    config: from `setup.fill`.
    videos: videos to validate on.
    every: steps of an epoch.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    videos: videos_lib.Videos,
    every: int,
  ) -> None:
    self._config, self._videos, self._every = config, videos, every
    self._clips: eval_epoch.Pass | None = None

  def due(self, done: int, span_start: int) -> bool:
    """Returns whether an epoch ends at this step."""
    return (done - span_start) % self._every == 0

  def look(self, run: Any, span: Any, state: Any, done: int) -> list[str]:
    """Validates, logs, and saves the parameters if they are the best so far.

    Args:
      run: with mesh, logger and checkpoints.
      span: the phase and its boundaries.
      state: train state.
      done: number of finished steps.

    Returns:
      A line to print.
    """
    if self._clips is None:
      self._clips = videos_lib.one_view(self._config, self._videos)
    predictions = model.count(
      span.phase, state.params, self._clips, 1, run.mesh
    )
    score = {
      'correct': int(predictions.correct()[0]),
      'total': predictions.total,
      'loss': float(predictions.loss()[0]),
    }
    accuracy = score['correct'] / score['total']
    run.logger.write(
      done,
      {'valid/accuracy': accuracy, 'valid/loss': score['loss']},
      phase=span.phase.name,
    )
    better = _rank(score) > _rank(_before(run.checkpoints, done))
    if better:
      run.checkpoints.save_params(
        {'params': state.params},
        done,
        span.phase.name,
        name=manager.BEST,
        extra={'valid': score},
      )
    return [
      f'epoch {(done - span.start) // self._every}: {score["correct"]} of '
      f'{score["total"]} validation videos correct ({100 * accuracy:.2f} %), '
      f'loss {score["loss"]:.4f}' + (', the best so far' if better else '')
    ]

  def close(self) -> None:
    """Closes the reader of the videos."""
    if self._clips is not None:
      self._clips.close()


def _before(
  checkpoints: manager.Checkpoints, done: int
) -> dict[str, Any] | None:
  """Returns the validation of the best earlier epoch; None if there is none.

  A best checkpoint of this or a later step is from an earlier start of the run.
  It is ignored, as this start reaches it again. After a rewind that leaves
  batches out this may not happen; then the report states it. Only the manifest
  is read; the files are verified when they are loaded.
  """
  saved = checkpoints.params_of(manager.BEST)
  if saved is None or saved.step >= done:
    return None
  return saved.manifest.get('valid')  # None if it cannot be read


def _rank(found: dict[str, Any] | None) -> tuple[float, float]:
  """Returns the sort key of a validation; larger is better."""
  if found is None:
    return (-1.0, 0.0)
  return (found['correct'] / found['total'], -found['loss'])


def history(workdir: str, every: int) -> list[dict[str, Any]]:
  """Returns epoch, accuracy and loss of every logged validation.

  Args:
    workdir: the run folder.
    every: steps of an epoch.
  """
  by_step = {}
  for row in metrics.read(pathlib.Path(workdir) / metrics.FILE):
    if 'valid/accuracy' in row:
      by_step[row['step']] = {
        'epoch': row['step'] // every,
        'accuracy': row['valid/accuracy'],
        'loss': row['valid/loss'],
      }
  return [by_step[step] for step in sorted(by_step)]


def lost(report: Mapping[str, Any]) -> str:
  """Returns a remark if an epoch was better than the tested one, else ''.

  This happens if a run is rewound to before its best epoch: the files of that
  epoch are deleted, and earlier epochs have none to compare with.

  Args:
    report: from `job.evaluate`.
  """
  epoch_steps = report['steps'] // report['finetune']['epochs']
  tested = report['results']['best']['step'] // epoch_steps
  best = max(
    report['history'],
    key=lambda x: (x['accuracy'], -x['loss'], -x['epoch']),
    default=None,
  )
  if best is None or best['epoch'] == tested:
    return ''
  return (
    f'not the best of the run: epoch {best["epoch"]} had '
    f'{100 * best["accuracy"]:.2f} % and loss {best["loss"]:.4f}, tested is '
    f'epoch {tested}; the run was rewound to before its best'
  )
