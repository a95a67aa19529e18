"""LayerLock, arXiv 2509.10156: a video MAE of 4DS's sizes that locks layers.

Published for ViT-G (2B): 160k steps on pixels, then a layer every 10k steps
until 32 of 48 are locked, some 2,048 clips of 16x224x224 a step, on a billion
clips of the authors' own. Variants: sizes `:S :B :L :H :G` (default G, the 2B
of the name), `:mae` (the baseline of as many steps, no lock), `:mae-flops` (of
as many FLOPs, the targets' included: 1.54 times the steps for G), `:pixels`
(locks with the pixel target throughout), `:subset` (the target on 5 % of the
positions), `:control` (latent target without locks, said to collapse),
`:control-block` (the same under V-JEPA's long blocks, which show 80 tokens in
place of 78: is it the mask that collapses?), `:vjepa` (ViT-L, locks under
V-JEPA's masks and average). After a size they are joined by a dash: `:L-mae`.
Command: bash launch/local.sh --config=configs/layerlock_2b.py \
  --config.data.source=<folder or manifest>
Expected: 4DS-G 63.1 -> 66.1 on SSv2 with the readout of 4DS (secondary
source). Ours: not run.
"""

from vssl_jax import config as config_lib
from vssl_jax.data import options
from vssl_jax.methods import layerlock_config

SIZES = ('S', 'B', 'L', 'H', 'G', 'e')
VARIANTS = ('mae', 'mae-flops', 'pixels', 'subset', 'control')
VARIANTS += ('control-block', 'vjepa')


def get_config(variant='G'):
  size, _, knob = (variant or 'G').partition('-')
  if variant in VARIANTS:
    size, knob = 'L' if variant == 'vjepa' else 'G', variant
  if size not in SIZES or knob not in ('', *VARIANTS):
    raise ValueError(
      f'layerlock_2b.py: found :{variant}, wanted one of {SIZES}, then perhaps '
      f'a dash and one of {VARIANTS}'
    )
  big = size in 'Ge'
  c = config_lib.default('layerlock')
  c.batch_size = 2048 if big else 1024
  c.data.frames, c.data.stride, c.data.size = 16, 4, (224, 224)
  c.data.crop_scale, c.data.flip = (0.3, 1.0), True
  c.data.mean, c.data.std = (0.0,), (1.0,)  # pixels stay in [0, 1], as in 4DS
  m = c.method
  m.encoder.size = size
  m.total = 480_000 if big else 100_000
  m.layout = 'loops' if size in 'HGe' else 'unrolled'
  m.vit.remat = 'full' if size in 'HGe' else 'dots'
  # Dozens of copies of gigabytes otherwise; add 'lock_.*[05]' to keep some.
  if size in 'HGe':
    first = 'lock_00' if knob == 'vjepa' else 'pixels'
    c.checkpoint.keep_phases = (first,)
  c.optim.update(dict(lr=1e-4 if big else 3e-4, lr_start=0.0, lr_end=1e-6))
  c.optim.update(dict(lr_batch=2048 if big else 1024, clip=1.0))
  c.optim.update(dict(weight_decay=0.05, weight_decay_end=0.05))
  if knob == 'mae-flops':
    m.total = layerlock_config.mae_steps(m, options.spec(c.data).shape)
  c.optim.warmup = min(10_000, m.total // 20)
  if knob in ('mae', 'mae-flops'):
    m.schedule = f'((0, {m.total}),)'
  elif knob == 'pixels':
    m.target = 'pixels'
  elif knob == 'subset':
    m.positions = 'subset'
  elif knob in ('control', 'control-block'):
    m.freeze = False
    m.masks = 'long' if knob == 'control-block' else m.masks
  elif knob == 'vjepa':
    m.base, m.masks = 'vjepa', 'short_long'
    m.vit.update(dict(positions='rope_3d', gelu='exact'))
    c.data.mean = c.data.std = ()  # ImageNet's
  return c
