"""PMD on one GPU of 24 to 80 GB and some 50,000 clips: S from B teachers.

16 frames of 224x224, 4 x 10 epochs of 50k clips in batches of 256, memory
looked at every 3 epochs. `:mvd` is the control: one phase of 90 %, 40 epochs,
and `:mvd-flops` that of as many FLOPs, 43 epochs (a clip of PMD's four phases
costs .848 TFLOP on average, of MVD's .781);
`:self` trains teachers of size S first, 100 epochs each, and needs no outside
weights. Clips of another number: set --config.method.steps and
--config.method.window. On 24 GB set --config.optim.accumulate=4; see `--plan`.
Command: bash launch/local.sh --config=configs/pmd_single_gpu.py \
  --config.data.source=<folder or manifest>
Expected: not published at this size. Ours: not run.
"""

from vssl_jax import config as config_lib

CLIPS = 50_000
EPOCH = CLIPS // 256


def get_config(variant=''):
  if variant not in ('', 'mvd', 'mvd-flops', 'self'):
    raise ValueError(
      f'pmd_single_gpu.py: found :{variant}, wanted mvd, mvd-flops, self or '
      'nothing'
    )
  page = 'mvd_k400' if variant.startswith('mvd') else 'pmd_k400'
  own = '-self' if variant == 'self' else ''
  _, c = config_lib.load(f'configs/{page}.py:S{own}')
  c.batch_size = 256
  c.data.workers, c.data.examples = 4, CLIPS
  c.optim.warmup = 4 * EPOCH
  m = c.method
  m.window, m.fresh_warmup = 3 * EPOCH, EPOCH // 2
  m.feature_loss = 'mse'  # of the control too
  m.memory_dtype = 'float32'  # 1.3 GB for so few clips
  control = {'mvd': (40 * EPOCH,), 'mvd-flops': (43 * EPOCH,)}
  m.steps = control.get(variant, (10 * EPOCH,) * 4)
  for name in ('image_teacher', 'video_teacher'):
    m[name].steps = 100 * EPOCH
  return c
