"""MVD on K400: masked features of an image and a video teacher. `:S :B :L`.

Paper: arXiv 2212.04500; values from ruiwang2021/mvd's scripts. 400 epochs of
240k clips; batch 1,024 (S, B) or 512 (L); 90 % tubes; teachers MAE (ImageNet)
and VideoMAE (K400) of size B for S and B, of size L for L. Other teachers:
--config.method.image.teacher, .video.teacher: a run folder, a folder or file
with published weights, a hub id.
Hardware: some 1.1 (B) TFLOP a clip, 1e20 FLOPs in all; see `--plan`.
Command: bash launch/local.sh --config=configs/mvd_k400.py:B \
  --config.data.source=<folder or manifest>
Expected after fine-tuning on K400: S 80.6, B 82.7, L 86.0. Ours: not run.
"""

from vssl_jax import config as config_lib

BATCH = {'S': 1024, 'B': 1024, 'L': 512}
# Licence of both: CC BY-NC 4.0.
IMAGE = {'B': 'facebook/vit-mae-base', 'L': 'facebook/vit-mae-large'}
VIDEO = {'B': 'MCG-NJU/videomae-base', 'L': 'MCG-NJU/videomae-large'}
K400 = 240_000  # clips
EPOCHS = 400


def get_config(variant=''):
  size = variant or 'B'
  if size not in BATCH:
    raise ValueError(f'mvd_k400.py: found :{variant}, wanted {list(BATCH)}')
  c = config_lib.default('pmd')
  c.batch_size = BATCH[size]
  c.data.examples = K400
  c.data.frames, c.data.stride, c.data.size = 16, 4, (224, 224)
  c.data.crop, c.data.flip = 'multi_scale', False
  c.data.workers = 8
  epoch = K400 // c.batch_size
  c.optim.update(
    dict(lr=1.5e-4, lr_start=0.0, lr_end=1e-4, lr_batch=256, lr_power=1.0)
  )
  c.optim.update(
    dict(warmup=40 * epoch, weight_decay=0.05, weight_decay_end=0.05, clip=0.0)
  )
  m = c.method
  m.encoder.size = m.decoder.size = size
  teachers = 'L' if size == 'L' else 'B'
  m.image.teacher, m.video.teacher = IMAGE[teachers], VIDEO[teachers]
  # Where this run trains them itself (@image_teacher, @video_teacher).
  for section in (m.image_teacher, m.video_teacher):
    section.encoder.size, section.steps = teachers, EPOCHS * epoch
  m.mask_ratios, m.steps = (0.9,), (EPOCHS * epoch,)
  m.lambda_pg = m.lambda_df = m.lambda_al = 0.0
  m.feature_loss = 'smooth_l1'
  return c
