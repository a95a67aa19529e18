"""VideoMAE on K400: the pixel phase under a tube mask. `:S :B :L`.

Paper: arXiv 2203.12602; values from MCG-NJU/VideoMAE's scripts. K400, 1,600
epochs of 240k clips; batch 2,048 (S, B) or 512 (L); 90 % tubes.
Command: bash launch/local.sh --config=configs/videomae_k400.py:B \
  --config.data.source=<folder or manifest>
Expected after fine-tuning on K400: S 79.0, B 81.5, L 85.2. Ours: not run.
"""

from vssl_jax import config as config_lib

# Decoder width, depth, heads; batch.
SIZES = {
  'S': (192, 4, 3, 2048),
  'B': (384, 4, 6, 2048),
  'L': (512, 12, 8, 512),
}
K400 = 240_000  # clips


def get_config(variant=''):
  size = variant or 'B'
  if size not in SIZES:
    raise ValueError(
      f'videomae_k400.py: found :{size}, wanted one of {list(SIZES)}'
    )
  width, depth, heads, batch = SIZES[size]
  c = config_lib.default('salt')
  c.batch_size = batch
  c.data.frames, c.data.stride, c.data.size = 16, 4, (224, 224)
  c.data.crop, c.data.flip = 'multi_scale', False
  c.data.workers = 8
  epoch = K400 // batch
  c.optim.update(
    dict(lr=1.5e-4, lr_start=0.0, lr_end=1e-5, lr_batch=256, lr_power=1.0)
  )
  c.optim.update(
    dict(warmup=40 * epoch, weight_decay=0.05, weight_decay_end=0.05, clip=0.0)
  )
  c.optim.decay_tokens = False  # modeling_pretrain.py: no_weight_decay
  c.method.vit.update(
    dict(positions='sinusoid_1d', qkv_bias='qv', init='videomae')
  )
  c.method.phases = ('pixel_teacher',)
  phase = c.method.pixel_teacher
  # Students that are added (method.phases) are as large and train as long.
  for name in ('pixel_teacher', 'latent_student'):
    c.method[name].steps = 1600 * epoch
    c.method[name].encoder.size = size
  phase.decoder.update(
    dict(kind='videomae', width=width, depth=depth, num_heads=heads)
  )
  phase.masks, phase.mask_tokens = 'tube:0.9', 1
  return c
