"""Config keys that the jobs `probe` and `depth` do not read.

Setting one of these keys on the command line is an error, so that no option is
ignored silently.
"""

import ml_collections

FROZEN = 'it comes with the weights of config.encoder, which are frozen'
# Of both jobs.
COMMON = {
  'batch_size': 'use probe.batch_size and probe.test_batch_size',
  'method.*': FROZEN,
  'optim.*': 'use probe.lrs, probe.wds, probe.epochs and probe.warmup',
  'mesh.*': 'all devices split each batch',
  'cache_targets': 'there are no teachers',
  'compile_ahead': 'there are no phases',
  'checkpoint.*': 'nothing is saved but the report',
  'log.*': 'nothing is logged but the report',
  'health.*': 'nothing is pretrained',
  'finetune.*': 'it belongs to the job finetune',
  'data.holdout': 'use probe.holdout',
  'data.repeats': 'use probe.segments',
  'data.examples': 'videos are counted',
}
# Of training clips, which probe.augment samples again in every epoch.
RANDOM = (
  *('sampling', 'crop', 'crop_scale', 'crop_aspect', 'flip', 'weights'),
  *('auto_augment', 'erase', 'repeat_frames'),
)
DEPTH = 'it belongs to the job depth'
# Of lists of labelled videos; frames with depth come in folders.
LABELLED = ('path_column', 'label_column', 'split', 'classes')
DEPTH_ONLY = ('loss', 'patch', 'pictures')
TRAINED = (
  *('epochs', 'batch_size', 'lrs', 'wds', 'groups', 'warmup', 'decay'),
  *('num_heads', 'width', 'dropout', 'dtype', 'holdout', 'eval_every'),
  *('segments', 'clips', 'views', 'augment'),
)
# Protocol -> keys of other protocols.
OTHERS = {
  'attentive': ('width', 'dropout', 'ks'),
  'readout': ('ks',),
  'linear': ('num_heads', 'width', 'dropout', 'dtype', 'ks'),
  'knn': TRAINED,
}


def unused_by_probe(config: ml_collections.ConfigDict) -> dict[str, str]:
  """Returns pattern of keys -> remedy for the job `probe`.

  Args:
    config: a resolved config.
  """
  protocol = config.probe.protocol
  reason = f'probe.protocol is {protocol!r}, which does not use it'
  out = COMMON | {f'probe.{x}': reason for x in OTHERS.get(protocol, ())}
  out |= {f'probe.{x}': DEPTH for x in DEPTH_ONLY}
  out['data.depth_units'] = DEPTH
  if protocol == 'knn':
    reason = 'the centre clip of each video is measured'
    out |= of_data(config.data, 1)
    return out | {f'data.{x}': reason for x in RANDOM} | _lists(config)
  return out | _random(config) | _lists(config) | one_head(config.probe)


def unused_by_depth(config: ml_collections.ConfigDict) -> dict[str, str]:
  """Returns pattern of keys -> remedy for the job `depth`.

  Args:
    config: a resolved config.
  """
  names = ('protocol', 'ks', 'eval_every')
  out = COMMON | {f'probe.{x}': 'it belongs to the job probe' for x in names}
  reason = 'frames with depth come in folders and have no labels'
  out |= {f'data.{name}': reason for name in LABELLED}
  return out | _random(config) | _lists(config) | one_head(config.probe)


def of_data(
  data: ml_collections.ConfigDict, repeats: int, *, tested: bool = True
) -> dict[str, str]:
  """Returns keys of `config.data` that have no effect, given its other keys.

  Args:
    data: `config.data`.
    repeats: clips of each video in a training batch.
    tested: whether centre crops are tested as well.

  Returns:
    Key -> reason.
  """
  out = {}
  if not data.depth_units:
    reason = 'data.depth_units is 0, and no depth is read'
    out |= {'data.depth_range': reason, 'data.stretch': reason}
  reason = f'data.crop is {data.crop!r}'
  if data.crop != 'random_resized':
    out |= {'data.crop_scale': reason, 'data.crop_aspect': reason}
  if data.crop != 'centre' and not tested:
    out['data.crop_part'] = reason
  if repeats == 1:
    out['data.repeat_frames'] = 'a batch has one clip of each video'
  return out


def one_head(config: ml_collections.ConfigDict) -> dict[str, str]:
  """Returns the key that has no effect on a grid of one head.

  Args:
    config: `config.probe`.
  """
  if len(config.lrs) * len(config.wds) > 1:
    return {}
  reason = (
    'a single head leaves nothing to choose and is trained on all videos; '
    'give several of probe.lrs or probe.wds'
  )
  return {'probe.holdout': reason}


def _random(config: ml_collections.ConfigDict) -> dict[str, str]:
  out = {}
  if not config.probe.augment:
    reason = 'clips are centre crops; set probe.augment=True for new ones'
    out = {f'data.{name}': reason for name in RANDOM}
  return of_data(config.data, config.probe.segments) | out


def _lists(config: ml_collections.ConfigDict) -> dict[str, str]:
  out = {}
  for name, suffix in (('source', ''), ('where', '_where')):
    keys = [f'{which}{suffix}' for which in ('train', 'test')]
    if all(any(config.probe[key]) for key in keys):
      out[f'data.{name}'] = f'use probe.{keys[0]} and probe.{keys[1]}'
  return out
