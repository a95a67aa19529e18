"""LayerLock at 4B (ViT-e, 3.8 billion parameters): the largest model published.

37 of 56 layers are locked over the last two thirds of 488k steps of 2,048
clips, the schedule of ViT-G in fractions. bfloat16, rematerialisation, all
devices share parameters and optimizer (`mesh.fsdp`); locked matrices are kept
in bfloat16. What it fits on: `--plan`, and launch/README.md. Variants:
`:mae :mae-flops :pixels :subset :control`, those of layerlock_2b.py.
Command: bash launch/local.sh --config=configs/layerlock_4b.py --plan
Expected: 4DS-e 64.6 -> 67.1 on SSv2 with the readout of 4DS (secondary
source). Ours: not run.
"""

from vssl_jax import config as config_lib
from vssl_jax.data import options
from vssl_jax.methods import layerlock_config

VARIANTS = ('mae', 'mae-flops', 'pixels', 'subset', 'control')


def get_config(variant=''):
  if variant not in ('', *VARIANTS):
    raise ValueError(
      f'layerlock_4b.py: found :{variant}, wanted one of {VARIANTS} or nothing'
    )
  mae = variant.startswith('mae')
  knob = f'-{variant}' if variant and not mae else ''
  _, c = config_lib.load(f'configs/layerlock_2b.py:e{knob}')
  c.method.total = 488_281
  c.method.frozen_dtype = 'bfloat16'
  if variant == 'mae-flops':
    clip = options.spec(c.data).shape
    c.method.total = layerlock_config.mae_steps(c.method, clip)
  if mae:
    c.method.schedule = f'((0, {c.method.total}),)'
  return c
