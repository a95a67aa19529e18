"""The keys of `config.finetune`."""

import ml_collections


def default() -> ml_collections.ConfigDict:
  """Returns every key of `config.finetune`, at K400's values."""
  return ml_collections.ConfigDict(
    dict(
      # Videos with labels; everything else about them stands in config.data,
      # whose source is that of ('',). What is trained on:
      train=('',),
      train_where='',  # rows of a manifest: 'split=train'
      # What the best checkpoint is chosen by, every epoch; ('',): `holdout` of
      # the training videos, which are then not trained on.
      valid=('',),
      valid_where='',
      holdout=0.1,
      # What is tested once, in the end; ('',) with the same rows as training
      # is an error.
      test=('',),
      test_where='',
      epochs=75,
      warmup_epochs=5.0,  # in which the learning rate rises from lr_start
      # Videos per step. Each is in the batch data.repeats times, which the
      # rule of the learning rate, lr * batch_size / 256, does not count.
      batch_size=384,
      # About as many clips at once in validation and testing: of whole videos,
      # as many on every device. At 15 clips a video and on 8 devices: 120.
      test_batch_size=32,
      # Where the clips of a test video lie, and how many crops of each; their
      # probabilities are averaged.
      sampling='spread',  # 'interleaved': as SSv2 is tested
      clips=5,
      views=3,
    )
  )
