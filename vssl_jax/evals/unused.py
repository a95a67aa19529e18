"""Keys that the jobs `probe` and `depth` do not read, and what to use instead.

A key of these that the command line sets is refused: nothing that a user asks
for is ignored without a word.
"""

import ml_collections

FROZEN = 'it comes with the weights of config.encoder, which stay as they are'
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
  'finetune.*': 'it is of the job finetune',
  'data.holdout': 'use probe.holdout',
  'data.repeats': 'use probe.segments',
  'data.examples': 'videos are counted',
}
# Of training clips, which are made anew in every epoch with probe.augment.
RANDOM = (
  *('sampling', 'crop', 'crop_scale', 'crop_aspect', 'flip', 'weights'),
  *('auto_augment', 'erase', 'repeat_frames'),
)
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


def probe(config: ml_collections.ConfigDict) -> dict[str, str]:
  """Returns pattern of keys -> remedy for the job `probe`.

  Args:
    config: a resolved config.
  """
  protocol = config.probe.protocol
  reason = f'probe.protocol is {protocol!r}, which has no use for it'
  out = COMMON | {f'probe.{x}': reason for x in OTHERS.get(protocol, ())}
  out |= {f'probe.{x}': 'it is of the job depth' for x in DEPTH_ONLY}
  if protocol == 'knn':
    reason = 'the centre clip of each video is measured'
    return out | {f'data.{x}': reason for x in RANDOM} | _lists(config)
  return out | _random(config) | _lists(config)


def depth(config: ml_collections.ConfigDict) -> dict[str, str]:
  """Returns pattern of keys -> remedy for the job `depth`.

  Args:
    config: a resolved config.
  """
  names = ('protocol', 'ks', 'eval_every')
  out = COMMON | {f'probe.{x}': 'it is of the job probe' for x in names}
  return out | _random(config) | _lists(config)


def _random(config: ml_collections.ConfigDict) -> dict[str, str]:
  if config.probe.augment:
    return {}
  reason = 'clips are centre crops; set probe.augment=True for new ones'
  return {f'data.{name}': reason for name in RANDOM}


def _lists(config: ml_collections.ConfigDict) -> dict[str, str]:
  out = {}
  for name, suffix in (('source', ''), ('where', '_where')):
    keys = [f'{which}{suffix}' for which in ('train', 'test')]
    if all(any(config.probe[key]) for key in keys):
      out[f'data.{name}'] = f'use probe.{keys[0]} and probe.{keys[1]}'
  return out
