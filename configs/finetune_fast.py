r"""Fine-tuning in small: trials on a CPU, on your own or generated videos.

Clips as the encoder was trained on. Where none is given, a small encoder at
random initialisation and clips of 8x32x32 (method.clip). One augmentation per
video and no mixing. To see that videos, labels and folder fit together before
a large machine is asked for.
Paper: none. Hardware: a CPU for minutes.
Command: bash launch/local.sh --config=configs/finetune_fast.py \
  --config.finetune.train=<folder of class folders> \
  --config.finetune.test=<folder>
Labelled videos, where you have none of your own:
  python -c "from vssl_jax.data.tools import synthetic; \
    synthetic.write('videos', clips={'train': 400, 'test': 200})"
Expected: depends on your videos. Ours, on the generated motions, where single
frames say nothing: from random initialisation 10.0 % of 200 test clips, which
is chance (360 clips trained on, 440 steps, some 30 CPU-seconds). So few labels
do not teach motion; give an encoder that was pre-trained on it.
"""

from vssl_jax import config as config_lib


def get_config(variant=''):
  if variant:
    raise ValueError(f'finetune_fast.py: found :{variant}, has no variants')
  c = config_lib.fine_tuning()
  c.data.workers = 0
  c.method.clip = (8, 1, 32)
  c.data.update(dict(crop='centre', flip=False, auto_augment='', erase=0.0))
  c.data.repeats = 1
  c.method.encoder.update(dict(size='Ti', width=64, depth=3, num_heads=4))
  c.method.encoder.mlp_width = 256
  c.method.vit.update(dict(patch=(2, 8, 8), dtype='float32'))
  c.method.update(dict(mixup=0.0, cutmix=0.0, drop_path=0.0))
  c.optim.update(dict(lr=2e-2, layer_decay=0.75))
  c.finetune.update(dict(batch_size=16, epochs=20, warmup_epochs=2.0))
  c.finetune.update(dict(clips=2, views=1))
  c.log.every = 50
  return c
