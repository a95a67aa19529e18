"""Fine-tuning Hiera on Kinetics-400, `:B :B+ :L :H`.

Paper: Hiera (arXiv 2306.00989), Tables 11 to 13: after 3,200 epochs of
Hiera-MAE. Starts from a Hiera of this project (Hiera-MAE or KDHiera,
interpretation of the abstract) or from its published weights; pools once more
than in pre-training, so that 392 tokens are left of 1,568. After fewer epochs
the paper decays less from block to block (--config.optim.layer_decay): .85
after 1,600, 1.0 after 800 for B, and .9 and .925 for L and H. 5 clips x 3
crops. Crops, RandAugment's two operations and the smallest learning rate are
not in its tables and are ours. No code of it trains on video.
Hardware: `--plan` with your encoder says what fits.
Command: bash launch/local.sh --config=configs/finetune_hiera_k400.py:B \
  --config.encoder=<run folder, file or folder with published weights> \
  --config.finetune.train=<train.csv> --config.finetune.test=<validation.csv>
Expected after Hiera-MAE: B 84.0, B+ 85.0, L 87.3, H 87.8; after KDHiera: not
published. Ours: not run.
"""

from vssl_jax import config as config_lib

# Base learning rate, epochs, drop path, dropout before the head, layer decay.
SIZES = {
  'B': (8e-4, 150, 0.2, 0.3, 0.8),
  'B+': (8e-4, 150, 0.2, 0.3, 0.8),
  'L': (8e-4, 100, 0.2, 0.5, 0.875),
  'H': (4e-4, 100, 0.3, 0.5, 0.875),
}


def get_config(variant=''):
  size = variant or 'B'
  if size not in SIZES:
    raise ValueError(
      f'finetune_hiera_k400.py: found :{size}, wanted one of {list(SIZES)}'
    )
  lr, epochs, drop_path, dropout, decay = SIZES[size]
  c = config_lib.fine_tuning()
  c.method.family, c.method.hiera.size = 'hiera', size
  c.method.drop_path, c.method.dropout = drop_path, dropout
  c.data.auto_augment, c.data.erase = 'rand-m7-n2-mstd0.5-inc1', 0.0
  c.data.repeat_frames, c.data.sampling = 'own', 'window'
  c.optim.update(dict(lr=lr, layer_decay=decay, clip=5.0))
  c.finetune.update(dict(batch_size=256, epochs=epochs, warmup_epochs=10.0))
  return c
