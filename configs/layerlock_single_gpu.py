"""LayerLock on one GPU of 24 to 80 GB and some thousand clips: ViT-B.

16 frames of 112x112 (392 tokens, 19 visible), 30k steps of 256 clips: 10k on
pixels, then 8 locks of 2,500. Beside it, for one table of three runs: `:mae`,
the same without locks (`:mae-flops`: of as many FLOPs), and `:subset`, whose
target costs nothing.
Command: bash launch/local.sh --config=configs/layerlock_single_gpu.py \
  --config.data.source=<folder or manifest>
Expected: not published at this size. Ours: not run.
"""

from vssl_jax import config as config_lib
from vssl_jax.data import options
from vssl_jax.methods import layerlock_config


def get_config(variant=''):
  if variant not in ('', 'mae', 'mae-flops', 'subset', 'pixels'):
    raise ValueError(
      f'layerlock_single_gpu.py: found :{variant}, wanted mae, mae-flops, '
      'subset, pixels or nothing'
    )
  c = config_lib.default('layerlock')
  c.batch_size = 256
  c.data.frames, c.data.stride, c.data.size = 16, 4, (112, 112)
  c.data.crop_scale = (0.3, 1.0)
  c.data.mean, c.data.std = (0.0,), (1.0,)  # pixels stay in [0, 1], as in 4DS
  c.data.workers = 4
  m = c.method
  m.encoder.size, m.total, m.vit.remat = 'B', 30_000, 'dots'
  c.optim.update(dict(lr=1.5e-4, lr_start=0.0, lr_end=1e-6, lr_batch=256))
  c.optim.update(dict(weight_decay=0.05, weight_decay_end=0.05, clip=1.0))
  c.optim.warmup = 1500
  if variant == 'mae-flops':
    m.total = layerlock_config.mae_steps(m, options.spec(c.data).shape)
  if variant in ('mae', 'mae-flops'):
    m.schedule = f'((0, {m.total}),)'
  elif variant == 'subset':
    m.positions = 'subset'
  elif variant == 'pixels':
    m.target = 'pixels'
  return c
