"""PMD on UCF101 with no outside weights: teachers and student of size S.

The 9,537 clips of the first training split in batches of 192: an image and a
video teacher, 100 epochs each, then 4 x 50 epochs of the student, memory looked
at every 16. Values beyond that are those of pmd_k400.py, in proportion.
Fine-tune with finetune_ucf101.py.
Command: bash launch/local.sh --config=configs/pmd_scratch_ucf101.py \
  --config.data.source=<folder or manifest>
Expected: not published. Ours: not run.
"""

from vssl_jax import config as config_lib

CLIPS, BATCH = 9_537, 192
EPOCH = CLIPS // BATCH


def get_config(variant=''):
  if variant:
    raise ValueError(
      f'pmd_scratch_ucf101.py: found :{variant}, wanted no variant'
    )
  _, c = config_lib.load('configs/pmd_k400.py:S-self')
  c.batch_size = BATCH
  c.data.workers, c.data.examples = 4, CLIPS
  c.optim.warmup = 20 * EPOCH
  m = c.method
  m.steps = (50 * EPOCH,) * 4
  m.window, m.fresh_warmup = 16 * EPOCH, 2 * EPOCH
  m.memory_dtype = 'float32'  # .2 GB for so few clips
  for name in ('image_teacher', 'video_teacher'):
    m[name].steps = 100 * EPOCH
  return c
