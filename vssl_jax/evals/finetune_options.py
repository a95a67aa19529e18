"""The keys of `config.finetune`."""

from vssl_jax import ranges

SOURCES = ranges.Tuple(ranges.Text())

KEYS = ranges.Section(  # K400's values
  # Videos with labels; everything else about them stands in config.data,
  # whose source is that of ('',). What is trained on:
  train=(('',), SOURCES),
  train_where=('', ranges.Text()),  # rows of a manifest: 'split=train'
  # What the best checkpoint is chosen by, every epoch; ('',): `holdout` of
  # the training videos, which are then not trained on.
  valid=(('',), SOURCES),
  valid_where=('', ranges.Text()),
  holdout=(0.1, ranges.Real(0, below=1)),
  # What is tested once, in the end; ('',) with the same rows as training
  # is an error.
  test=(('',), SOURCES),
  test_where=('', ranges.Text()),
  # Go on although videos of `valid` or `test` are trained on; the report
  # states how many. False refuses.
  allow_overlap=(False, ranges.Flag()),
  epochs=(75, ranges.Whole(1, 10**6)),
  # in which the learning rate rises from lr_start
  warmup_epochs=(5.0, ranges.Real(0, 1e6)),
  # Videos per step. Each is in the batch data.repeats times, which the
  # rule of the learning rate, lr * batch_size / 256, does not count.
  batch_size=(384, ranges.Whole(1, 2**20)),
  # About as many clips at once in validation and testing: of whole videos,
  # as many on every device. At 15 clips a video and on 8 devices: 120.
  test_batch_size=(32, ranges.Whole(1, 2**20)),
  # Where the clips of a test video lie, and how many crops of each; their
  # probabilities are averaged. 'interleaved': as SSv2 is tested
  sampling=('spread', ranges.Choice(('spread', 'interleaved'))),
  clips=(5, ranges.Whole(1, 2**10)),
  views=(3, ranges.Whole(1, 2**10)),
)

default = KEYS.defaults
