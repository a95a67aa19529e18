"""The keys of `config.finetune`."""

import ml_collections

from vssl_jax.evals.probe import unused_options
from vssl_jax.utils import ranges

SOURCES = ranges.Tuple(ranges.Text())

KEYS = ranges.Section(  # K400's values
  # Labelled videos; ('',) for config.data.source. All other options of the
  # videos are in config.data. Training videos:
  train=(('',), SOURCES),
  train_where=('', ranges.Text()),  # rows of a manifest: 'split=train'
  # Videos that choose the best checkpoint, every epoch; ('',): `holdout` of
  # the training videos, which are then not trained on.
  valid=(('',), SOURCES),
  valid_where=('', ranges.Text()),
  holdout=(0.1, ranges.Real(0, below=1)),
  # Videos that are tested once, at the end; ('',) with the same rows as
  # training is an error.
  test=(('',), SOURCES),
  test_where=('', ranges.Text()),
  # True: videos of `valid` or `test` may be training videos; the report
  # states how many are. False: this is an error.
  allow_overlap=(False, ranges.Flag()),
  epochs=(75, ranges.Whole(1, 10**6)),
  # epochs in which the learning rate rises from optim.lr_start
  warmup_epochs=(5.0, ranges.Real(0, 1e6)),
  # Videos per step. Each is in the batch data.repeats times; the learning
  # rate rule, lr * batch_size / 256, counts it once.
  batch_size=(384, ranges.Whole(1, 2**20)),
  # Approximate clips per batch in validation and testing. Batches hold whole
  # videos and the same number of clips on every device: with 15 clips per
  # video and 8 devices, 120 clips.
  test_batch_size=(32, ranges.Whole(1, 2**20)),
  # Positions of the clips of a test video, and number of crops of each;
  # their probabilities are averaged. 'interleaved': as SSv2 is tested
  sampling=('spread', ranges.Choice(('spread', 'interleaved'))),
  clips=(5, ranges.Whole(1, 2**10)),
  views=(3, ranges.Whole(1, 2**10)),
)

default = KEYS.defaults

# Keys that fine-tuning computes, and those that they are computed from.
DERIVED = {
  'batch_size': 'use finetune.batch_size (and data.repeats)',
  'optim.warmup': 'use finetune.warmup_epochs',
  'optim.lr_batch': 'the rule is optim.lr * finetune.batch_size / 256',
  'optim.lr_power': 'the rule is optim.lr * finetune.batch_size / 256',
  'method.steps': 'use finetune.epochs',
  'method.classes': 'classes are those of finetune.train (data.classes)',
  'method.source': 'use config.encoder',
}


def unused(config: ml_collections.ConfigDict) -> dict[str, str]:
  """Returns patterns of keys that fine-tuning does not read.

  Args:
    config: a resolved config.

  Returns:
    Pattern -> the key to use instead, or the reason.
  """
  settings = config.finetune
  out = {
    **DERIVED,
    'data.holdout': 'use finetune.holdout',
    'data.examples': 'videos are counted',
    'cache_targets': 'there are no teachers',
    'probe.*': 'it belongs to the jobs probe and depth',
    'data.depth_units': unused_options.DEPTH,
    **unused_options.of_data(config.data, config.data.repeats),
  }
  if any(settings.valid) or settings.valid_where:
    out['finetune.holdout'] = (
      'the best checkpoint is chosen by finetune.valid; leave one of them out'
    )
  for name, suffix in (('source', ''), ('where', '_where')):
    keys = [f'{which}{suffix}' for which in ('train', 'test')]
    if all(any(settings[key]) for key in keys):
      out[f'data.{name}'] = f'use finetune.{keys[0]} and finetune.{keys[1]}'
  if config.encoder:
    reason = (
      'it is ignored: the encoder and its shape come with the weights of '
      'config.encoder; leave one of the two out'
    )
    names = ('family', 'clip', 'encoder.*', 'vit.*', 'hiera.*')
    return out | {f'method.{name}': reason for name in names}
  data = config.data
  if data.frames and (data.stride or data.fps) and any(data.size):
    out['method.clip'] = 'use data.frames, data.stride and data.size'
  if config.method.family == 'vit':
    reason = "method.family is 'vit'"
    return out | {'method.hiera.*': reason, 'method.q_pool': reason}
  reason = "method.family is 'hiera'"
  return out | {'method.vit.*': reason, 'method.encoder.*': reason}
