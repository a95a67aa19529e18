"""Which videos fine-tuning trains on, chooses by and tests on."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections

from vssl_jax.data import holdout, options, passes, pipeline
from vssl_jax.evals import lists, overlap

NONE = overlap.Overlap(0, 0)


@dataclasses.dataclass(frozen=True)
class Videos:
  """Three lists of videos with one order of classes.

  Attributes:
    train: `config.data` of the training videos, `holdout` among it.
    valid: of those that the best checkpoint is chosen by.
    test: of the test videos.
    classes: names by label.
    count: videos to train on, those held out aside.
    shared: list -> videos of it that are among the training videos.
    chosen: test videos that the best checkpoint is chosen by.
  """

  train: dict[str, Any]
  valid: dict[str, Any]
  test: dict[str, Any]
  classes: tuple[str, ...]
  count: int
  shared: dict[str, overlap.Overlap]
  chosen: overlap.Overlap = NONE

  @property
  def held(self) -> bool:
    """Whether validation takes part of the training videos."""
    return self.train['holdout'] > 0

  @property
  def chosen_by_test(self) -> bool:
    """Whether videos that are tested are validated on too."""
    return self.chosen.count > 0


def find(config: ml_collections.ConfigDict) -> Videos:
  """Lists the videos and their classes.

  Args:
    config: with `data` and `finetune`.

  Raises:
    ValueError: no labels, or training videos that are tested on.
  """
  wanted = config.finetune
  train, valid, test = (
    lists.of(config, 'finetune', name) | {'holdout': 0.0}
    for name in ('train', 'valid', 'test')
  )
  others = {'test': test}
  if any(wanted.valid) or wanted.valid_where:
    others['valid'] = valid
  shared = lists.check('finetune', train, wanted.allow_overlap, **others)
  if 'valid' not in others:
    if not 0 < wanted.holdout < 1:
      raise ValueError(
        f'finetune.holdout: found {wanted.holdout}, wanted a fraction between '
        '0 and 1; or give the videos to choose by: --config.finetune.valid'
      )
    train['holdout'] = wanted.holdout
    valid = dict(train)
  found = options.find(train)
  if not found.classes:
    raise ValueError(
      f'finetune.train: the videos of {train["source"]} have no labels; give '
      'class folders or a manifest with a label column'
    )
  for data in (train, valid, test):
    data['classes'] = found.classes
  lists.check_labels('finetune', train=train, valid=valid, test=test)
  if train['holdout']:
    lists.check_share('finetune', train, train['holdout'])
  count = len(holdout.numbers(len(found), train['holdout']))
  # Videos held out are of those to train on, which were compared above.
  chosen = NONE
  if not train['holdout']:
    chosen = overlap.find(options.find(valid), options.find(test))
  return Videos(train, valid, test, found.classes, count, shared, chosen)


def one_view(config: ml_collections.ConfigDict, videos: Videos) -> passes.Pass:
  """Opens the validation videos: one centre clip of each."""
  return _pass(config, videos.valid, 1, 1, held=videos.held)


def all_views(config: ml_collections.ConfigDict, videos: Videos) -> passes.Pass:
  """Opens the test videos with all clips and crops of each."""
  wanted = config.finetune
  return _pass(
    config, videos.test, wanted.clips, wanted.views, sampling=wanted.sampling
  )


def _pass(
  config: ml_collections.ConfigDict,
  data: Mapping[str, Any],
  segments: int,
  views: int,
  **more: Any,
) -> passes.Pass:
  """Opens a pass of about `test_batch_size` clips, of whole videos."""
  per = segments * views
  # The fewest videos that every device gets as many clips of.
  least = jax.device_count() // math.gcd(per, jax.device_count())
  least = math.lcm(least, jax.process_count())
  videos = max(config.finetune.test_batch_size // (per * least), 1) * least
  return pipeline.evaluation(
    data,
    batch_size=videos * per,
    segments=segments,
    views=views,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    folder=config.workdir,
    **more,
  )
