"""PMD on K400: four phases of 75, 80, 85 and 90 %. `:S :B :L`.

Paper: CVPR 2026; what stands here as published comes from a reading note
(secondary source). Recipe, batches and teachers are those of MVD
(mvd_k400.py): the paper's are not known to us. 4 x 100 epochs, memory looked
at every 32. `-self` behind a size needs no outside weights: its teachers, as
large as the student, are trained by the same run first, for 400 epochs each
(ours).
Hardware: 1.19 times the FLOPs of MVD for B by our count, 1.14 as published;
the memory of 240k clips takes 3 GB beside the state, over all devices. See
`--plan`.
Command: bash launch/local.sh --config=configs/pmd_k400.py:B \
  --config.data.source=<folder or manifest>
Expected after fine-tuning on K400 / SSv2: S - / 70.7, B 83.3 / 73.7, L 86.3 /
76.4 (secondary source). Beside it: MVD-S with a B teacher - / 70.7, MVD-B with
an L teacher 83.4 / 73.7, MVD-L at 800 epochs 86.4 / 76.7. Ours: not run.
"""

from vssl_jax import config as config_lib

K400 = 240_000  # clips
PHASES, EPOCHS = 4, 100  # of each


def get_config(variant=''):
  size, _, own = (variant or 'B').partition('-')
  if size not in ('S', 'B', 'L') or own not in ('', 'self'):
    raise ValueError(
      f'pmd_k400.py: found :{variant}, wanted S, B or L, or one of them and '
      '-self'
    )
  _, c = config_lib.load(f'configs/mvd_k400.py:{size}')
  epoch = K400 // c.batch_size
  m = c.method
  m.mask_ratios = (0.75, 0.8, 0.85, 0.9)
  m.steps = (EPOCHS * epoch,) * PHASES
  m.lambda_pg, m.lambda_df, m.lambda_al = 0.05, 1.0, 1.0
  m.feature_loss = 'mse'
  m.window, m.fresh_warmup = 32 * epoch, 5 * epoch
  m.memory_dtype = 'float16'  # 3 GB of memory, and not 6
  if own:
    for name in ('image', 'video'):
      m[name].teacher = f'@{name}_teacher'
      m[f'{name}_teacher'].encoder.size = size
      m[f'{name}_teacher'].steps = PHASES * EPOCHS * epoch
  return c
