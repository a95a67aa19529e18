"""Fine-tuning Hiera-L on Something-Something v2.

Paper: Hiera (arXiv 2306.00989), Tables 11 to 13: SGD, 16 frames, one from each
of 16 parts of the video; 3 crops of one clip. No flip: left and right are
labels here. Momentum, crops, RandAugment's two operations and the smallest
learning rate are not in its tables and are ours. Other sizes:
--config.encoder, and --config.method.hiera.size where it starts at random.
Hardware: `--plan` with your encoder says what fits.
Command: bash launch/local.sh --config=configs/finetune_hiera_ssv2.py \
  --config.encoder=<run folder, file or folder with published weights> \
  --config.finetune.train=<train.csv> --config.finetune.test=<validation.csv>
Expected after Hiera-MAE: L 74.7 (pre-trained on K400), 74.9 (on SSv2); after
KDHiera, interpretation of the abstract: not published. Ours: not run.
"""

from vssl_jax import config as config_lib


def get_config(variant=''):
  if variant:
    raise ValueError(
      f'finetune_hiera_ssv2.py: found :{variant}, has no variants'
    )
  c = config_lib.fine_tuning()
  c.method.family, c.method.hiera.size = 'hiera', 'L'
  c.method.drop_path, c.method.dropout = 0.1, 0.5
  c.data.flip, c.data.sampling = False, 'scattered'
  c.data.auto_augment, c.data.erase = 'rand-m7-n2-mstd0.5-inc1', 0.0
  c.data.repeats = 1
  c.optim.update(dict(rule='sgd', lr=0.16, layer_decay=0.875))
  c.optim.update(dict(weight_decay=1e-4, weight_decay_end=1e-4))
  c.finetune.update(dict(batch_size=256, epochs=40, warmup_epochs=3.0))
  c.finetune.update(dict(sampling='interleaved', clips=1, views=3))
  return c
