"""Fine-tuning on Something-Something v2, `:S :B :L :H`.

Paper: VideoMAE (arXiv 2203.12602) and MVD (arXiv 2212.04500); values from
ruiwang2021/mvd, `scripts/*/finetune_*.sh`. A frame from each of 16 parts of
the video; 2 samplings, at 1/4 and 3/4 of each part, x 3 crops. No flip: left
and right are labels here, and upstream scripts that leave it on lose 1 to 2.5
points.
Hardware: `--plan` with your encoder says what fits.
Command: bash launch/local.sh --config=configs/finetune_ssv2.py:B \
  --config.encoder=<run folder, folder with published weights, or hub id> \
  --config.finetune.train=<train.csv> --config.finetune.test=<validation.csv>
Expected, B: VideoMAE 70.8, MVD 72.5, PMD 73.7 (a secondary source).
Ours: not run.
"""

from vssl_jax import config as config_lib

# Batch, base learning rate, epochs, layer decay, drop path, dropout.
SIZES = {
  'S': (384, 1e-3, 40, 0.70, 0.1, 0.0),
  'B': (384, 5e-4, 30, 0.75, 0.1, 0.0),
  'L': (256, 5e-4, 30, 0.75, 0.3, 0.5),
  'H': (128, 5e-4, 30, 0.75, 0.3, 0.5),
}


def get_config(variant=''):
  size = variant or 'B'
  if size not in SIZES:
    raise ValueError(
      f'finetune_ssv2.py: found :{size}, wanted one of {list(SIZES)}'
    )
  batch, lr, epochs, decay, drop_path, dropout = SIZES[size]
  c = config_lib.fine_tuning()
  c.method.encoder.size = size
  c.method.drop_path, c.method.dropout = drop_path, dropout
  c.data.flip, c.data.sampling = False, 'scattered'
  c.optim.lr, c.optim.layer_decay = lr, decay
  if size == 'H':  # --min_lr of its script, times batch / 256 as lr is
    c.optim.lr_end = 1e-5
  c.finetune.update(dict(batch_size=batch, epochs=epochs))
  c.finetune.update(dict(sampling='interleaved', clips=2, views=3))
  return c
