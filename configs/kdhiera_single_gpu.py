"""KDHiera, interpretation of the abstract, on one GPU: Hiera-T, 50k clips.

16 frames of 224x224, 50 epochs of 50k clips in batches of 256. Teachers DINO
ViT-S/16 and VideoMAE ViT-B: no VideoMAE-S before fine-tuning is on the hub;
with its authors' file, --config.method.video.teacher=<file>, a clip costs less
than half. `:mae` is the control, Hiera-T MAE of as many epochs; `:self` trains
teachers of size S first, 100 epochs each, at Hiera's learning rate (3.8 times
that of videomae_k400.py), and needs no outside weights. Clips
of another number: set --config.method.steps. On 24 GB set
--config.optim.accumulate=4; see `--plan`.
Command: bash launch/local.sh --config=configs/kdhiera_single_gpu.py \
  --config.data.source=<folder or manifest>
Expected: not published. Ours: not run.
"""

from vssl_jax import config as config_lib

CLIPS, BATCH = 50_000, 256
EPOCH = CLIPS // BATCH


def get_config(variant=''):
  if variant not in ('', 'mae', 'self'):
    raise ValueError(
      f'kdhiera_single_gpu.py: found :{variant}, wanted mae, self or nothing'
    )
  page = 'hiera_mae_k400.py:B' if variant == 'mae' else 'kdhiera_k400.py:B'
  own = '-self' if variant == 'self' else ''
  _, c = config_lib.load(f'configs/{page}{own}')
  c.batch_size = BATCH
  c.data.workers, c.data.examples, c.data.repeats = 4, CLIPS, 2
  c.optim.warmup = 5 * EPOCH
  m = c.method
  m.encoder.size, m.drop_path, m.steps = 'T', 0.1, 50 * EPOCH
  if not variant:
    m.image.teacher = 'facebook/dino-vits16'
  for name in ('image_teacher', 'video_teacher'):
    m[name].encoder.size, m[name].steps = 'S', 100 * EPOCH
  return c
