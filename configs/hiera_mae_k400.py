"""Hiera-MAE on K400: pixels of hidden mask units. `:B :B+ :L :H`.

Paper: arXiv 2306.00989, Tables 11 to 13. 3,200 epochs of 240k clips, four
clips a video counted as four; batch 512; 90 % of the units hidden; decoder of
8 blocks, 512 wide. 16 frames, 4 apart.
Hardware: .42 (B) and .60 (L) TFLOP a clip; see `--plan`.
Command: bash launch/local.sh --config=configs/hiera_mae_k400.py:B \
  --config.data.source=<folder or manifest>
Expected after fine-tuning on K400: B 84.0, B+ 85.0, L 87.3, H 87.8; L after
400, 800 and 1,600 epochs 84.0, 85.5, 86.4. Ours: not run.
"""

from vssl_jax import config as config_lib

# Drop path; base learning rate at batch 512.
SIZES = {
  'B': (0.1, 8e-4),
  'B+': (0.2, 8e-4),
  'L': (0.2, 8e-4),
  'H': (0.4, 3.2e-4),
}
K400 = 240_000  # clips
EPOCHS = 3200
BATCH = 512


def get_config(variant=''):
  size = variant or 'B'
  if size not in SIZES:
    raise ValueError(
      f'hiera_mae_k400.py: found :{size}, wanted one of {list(SIZES)}'
    )
  drop_path, lr = SIZES[size]
  c = config_lib.default('kdhiera')
  c.batch_size = BATCH
  c.data.examples = K400
  c.data.frames, c.data.stride, c.data.size = 16, 4, (224, 224)
  c.data.crop_scale, c.data.flip = (0.5, 1.0), True
  c.data.repeats, c.data.workers = 4, 8
  epoch = K400 // BATCH
  c.optim.update(
    dict(lr=lr, lr_start=0.0, lr_end=0.0, lr_batch=BATCH, lr_power=0.5)
  )
  c.optim.update(
    dict(warmup=120 * epoch, weight_decay=0.05, weight_decay_end=0.05, clip=0.0)
  )
  m = c.method
  m.steps = EPOCHS * epoch
  m.encoder.size, m.drop_path = size, drop_path
  m.objective, m.units, m.teachers = 'pixels', 'random', ()
  m.decoder.depth = 8
  return c
