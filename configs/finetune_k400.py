"""Fine-tuning on Kinetics-400, `:S :B :L :H`.

Paper: VideoMAE (arXiv 2203.12602) and MVD (arXiv 2212.04500); values from
ruiwang2021/mvd, `scripts/*/finetune_*.sh`. 16 frames spread over 64 to train
(steps of 4 and 5), every fourth to test; 5 clips x 3 crops. Copies of Kinetics
differ (19,761 to 19,907 validation videos, about a point in reports of users):
the report says how many were evaluated. Published codes choose the best
checkpoint on the videos they test on; to do as they did, give them as
--config.finetune.valid too. Else a tenth of train is held out.
Hardware: `--plan` with your encoder says what fits.
Command: bash launch/local.sh --config=configs/finetune_k400.py:B \
  --config.encoder=<run folder, folder with published weights, or hub id> \
  --config.finetune.train=<train.csv> --config.finetune.test=<validation.csv>
Expected, B: VideoMAE 81.5, MVD 82.7, PMD 83.3 (a secondary source).
Ours: not run.
"""

from vssl_jax import config as config_lib

# Batch, base learning rate, epochs, drop path, dropout before the head.
SIZES = {
  'S': (384, 5e-4, 150, 0.1, 0.0),
  'B': (384, 5e-4, 75, 0.1, 0.0),
  'L': (512, 1e-3, 50, 0.3, 0.5),
  'H': (256, 1e-3, 50, 0.3, 0.5),
}


def get_config(variant=''):
  size = variant or 'B'
  if size not in SIZES:
    raise ValueError(
      f'finetune_k400.py: found :{size}, wanted one of {list(SIZES)}'
    )
  batch, lr, epochs, drop_path, dropout = SIZES[size]
  c = config_lib.fine_tuning()
  c.method.encoder.size = size
  c.method.drop_path, c.method.dropout = drop_path, dropout
  c.optim.lr = lr
  c.finetune.update(dict(batch_size=batch, epochs=epochs))
  return c
