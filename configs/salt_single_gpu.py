"""SALT on one GPU of 24 to 80 GB and some thousand clips: S teaches B.

16 frames of 112x112 (392 tokens), 10k + 30k steps of 256 clips. On 24 GB set
--config.optim.accumulate=4; see `--plan`.
Command: bash launch/local.sh --config=configs/salt_single_gpu.py \
  --config.data.source=<folder or manifest>
Expected: the student's kNN passes the teacher's within 10k steps of its
phase. Ours: not run.
"""

from vssl_jax import config as config_lib


def get_config(variant=''):
  if variant:
    raise ValueError(f'salt_single_gpu.py: found :{variant}, has no variants')
  c = config_lib.default('salt')
  c.batch_size = 256
  c.data.frames, c.data.stride, c.data.size = 16, 4, (112, 112)
  c.data.workers = 4
  c.method.pixel_teacher.steps = 10_000
  c.method.pixel_teacher.encoder.size = 'S'
  c.method.latent_student.steps = 30_000
  c.method.latent_student.encoder.size = 'B'
  return c
