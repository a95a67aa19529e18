"""Configs of runs that take seconds."""

from vssl_jax import config as config_lib


def tiny_config(clips, workdir):
  c = config_lib.default('salt')
  c.workdir = str(workdir)
  c.batch_size = 8
  c.data.source = str(clips)
  c.data.frames, c.data.stride, c.data.size = 4, 1, (16, 16)
  c.data.isolate = False
  c.data.decode_processes = 1
  c.method.vit.update(dict(patch=(2, 8, 8), dtype='float32'))
  small = dict(size='Ti', width=16, depth=1, num_heads=2, mlp_width=32)
  for name in ('pixel_teacher', 'latent_student'):
    c.method[name].steps = 6
    c.method[name].encoder.update(small)
    c.method[name].masks = 'short:2/4'
  head = dict(width=16, depth=1, num_heads=2)
  c.method.pixel_teacher.decoder.update(head)
  c.method.latent_student.predictor.update(head)
  c.method.latent_student.teacher_dtype = 'float32'
  c.method.latent_student.polyak = 0.9
  c.optim.update(dict(lr=1e-2, lr_batch=8))
  c.checkpoint.every = 2
  c.log.update(dict(every=1, tensorboard=False))
  c.health.every = 0.0
  return c
