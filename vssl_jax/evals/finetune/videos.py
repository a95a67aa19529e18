"""Video lists of a fine-tuning: training, validation and test."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections

from vssl_jax.data import eval_epoch, options, pipeline
from vssl_jax.data.sources import holdout
from vssl_jax.evals import split_overlap, splits

NONE = split_overlap.Overlap(0, 0)


@dataclasses.dataclass(frozen=True)
class Videos:
  """Three lists of videos with one order of classes.

  Attributes:
    train: `config.data` of the training videos, including `holdout`.
    valid: `config.data` of the videos that choose the best checkpoint.
    test: `config.data` of the test videos.
    classes: names by label.
    count: number of training videos, without those held out.
    shared: list -> its videos that are among the training videos.
    chosen: test videos that the best checkpoint is chosen by.
  """

  train: dict[str, Any]
  valid: dict[str, Any]
  test: dict[str, Any]
  classes: tuple[str, ...]
  count: int
  shared: dict[str, split_overlap.Overlap]
  chosen: split_overlap.Overlap = NONE

  @property
  def held(self) -> bool:
    """Whether the validation videos are held-out training videos."""
    return self.train['holdout'] > 0

  @property
  def chosen_by_test(self) -> bool:
    """Whether some test videos are also validation videos."""
    return self.chosen.count > 0


def find(config: ml_collections.ConfigDict) -> Videos:
  """Finds the videos and their classes.

  Args:
    config: with `data` and `finetune`.

  Raises:
    ValueError: no labels, or training videos among the others.
  """
  settings = config.finetune
  train, valid, test = (
    splits.of(config, 'finetune', name) | {'holdout': 0.0}
    for name in ('train', 'valid', 'test')
  )
  others = {'test': test}
  if any(settings.valid) or settings.valid_where:
    others['valid'] = valid
  shared = splits.check('finetune', train, settings.allow_overlap, **others)
  if 'valid' not in others:
    if not 0 < settings.holdout < 1:
      raise ValueError(
        f'finetune.holdout: found {settings.holdout}, wanted a fraction '
        'between 0 and 1; or give the videos to choose by: '
        '--config.finetune.valid'
      )
    train['holdout'] = settings.holdout
    valid = dict(train)
  source = options.find(train)
  if not source.classes:
    raise ValueError(
      f'finetune.train: the videos of {train["source"]} have no labels; give '
      'class folders or a manifest with a label column'
    )
  for data in (train, valid, test):
    data['classes'] = source.classes
  splits.check_labels('finetune', train=train, valid=valid, test=test)
  if train['holdout']:
    splits.check_share('finetune', train, train['holdout'])
  count = len(holdout.numbers(len(source), train['holdout']))
  # Held-out videos come from the training videos, which were compared above.
  chosen = NONE
  if not train['holdout']:
    chosen = split_overlap.find(options.find(valid), options.find(test))
  return Videos(train, valid, test, source.classes, count, shared, chosen)


def one_view(
  config: ml_collections.ConfigDict, videos: Videos
) -> eval_epoch.Pass:
  """Opens the validation videos with one centre clip of each."""
  return _pass(config, videos.valid, 1, 1, held=videos.held)


def all_views(
  config: ml_collections.ConfigDict, videos: Videos
) -> eval_epoch.Pass:
  """Opens the test videos with all clips and crops of each."""
  settings = config.finetune
  return _pass(
    config,
    videos.test,
    settings.clips,
    settings.views,
    sampling=settings.sampling,
  )


def _pass(
  config: ml_collections.ConfigDict,
  data: Mapping[str, Any],
  segments: int,
  views: int,
  **more: Any,
) -> eval_epoch.Pass:
  """Opens a pass over whole videos, about `test_batch_size` clips per batch."""
  clips_per_video = segments * views
  # The fewest videos whose clips divide evenly over the devices.
  min_videos = jax.device_count() // math.gcd(
    clips_per_video, jax.device_count()
  )
  min_videos = math.lcm(min_videos, jax.process_count())
  videos = (
    max(config.finetune.test_batch_size // (clips_per_video * min_videos), 1)
    * min_videos
  )
  return pipeline.evaluation(
    data,
    batch_size=videos * clips_per_video,
    segments=segments,
    views=views,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    folder=config.workdir,
    **more,
  )
