"""A fine-tuning of seconds: its config, and an encoder to start from."""

import jax
import numpy as np

from vssl_jax import config as config_lib
from vssl_jax import encoder
from vssl_jax.models import vit

SHAPE = (4, 16, 16, 3)
TINY = dict(width=16, depth=2, num_heads=2, mlp_width=32)


def config_of(videos, workdir, **wanted):
  c = config_lib.fine_tuning()
  c.workdir = str(workdir)
  c.data.update(dict(frames=4, stride=1, size=(16, 16), channels=3, workers=0))
  c.data.update(dict(isolate=False, decode_processes=1, max_bad_fraction=0.2))
  c.data.update(dict(crop_scale=(0.5, 1.0), auto_augment=''))
  c.method.encoder.update(TINY | {'size': 'Ti'})
  c.method.vit.update(dict(patch=(2, 8, 8), dtype='float32'))
  c.optim.lr = 0.3
  c.finetune.train = (str(videos / 'train'),)
  c.finetune.test = (str(videos / 'test'),)
  c.finetune.update(dict(epochs=4, warmup_epochs=0.5, holdout=0.25))
  c.finetune.update(dict(batch_size=8, test_batch_size=8, clips=2, views=3))
  c.finetune.update(wanted)
  c.checkpoint.update(dict(every=3, keep=100))
  c.log.update(dict(every=1, tensorboard=False))
  return c


def encoder_of(**fields):
  """A pre-trained encoder: a final norm, and learned positions."""
  module = vit.make(
    TINY, patch=(2, 8, 8), positions='learned', dtype='float32', **fields
  )
  key = jax.random.key(3)
  params = module.init(key, np.zeros((1, *SHAPE), np.uint8))['params']
  noisy = jax.tree.map(lambda x: x + 0.01, params)
  return encoder.Encoder(module, noisy, 'ours', SHAPE, stride=1)
