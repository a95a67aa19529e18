"""KDHiera, interpretation of the abstract, with no outside weights: Hiera-T.

UCF101's first training split, 9,537 clips, or own clips, in batches of 192:
teachers of size S and then the student, 100 epochs each. Values beyond that are
those of kdhiera_single_gpu.py, in proportion. Clips of another number: set
--config.method.steps and those of both teachers.
Command: bash launch/local.sh --config=configs/kdhiera_scratch.py \
  --config.data.source=<folder or manifest>
Expected: not published. Ours: not run.
"""

from vssl_jax import config as config_lib

CLIPS, BATCH = 9_537, 192
EPOCH = CLIPS // BATCH


def get_config(variant=''):
  if variant:
    raise ValueError(f'kdhiera_scratch.py: found :{variant}, wanted no variant')
  _, c = config_lib.load('configs/kdhiera_single_gpu.py:self')
  c.batch_size = BATCH
  c.data.examples = CLIPS
  c.optim.warmup = 10 * EPOCH
  m = c.method
  m.steps = 100 * EPOCH
  for name in ('image_teacher', 'video_teacher'):
    m[name].steps = 100 * EPOCH
  return c
