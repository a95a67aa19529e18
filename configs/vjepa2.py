"""V-JEPA 2 as a baseline of SALT: the teacher is an average of the student.

Paper: arXiv 2506.09985, in the form that SALT compares with (224 px, the same
schedule, masks and data). SALT does not state its baseline's momentum; ours
is V-JEPA 2's .99925. `vjepa2.py:L` (default), `:B`, `:H`.
Command: bash launch/local.sh --config=configs/vjepa2.py:L \
  --config.data.source=<folder or manifest>
Expected (SALT's table, V-3.6M, SSv2 / K400): L 68.2 / 83.8, H 73.4 / 84.6.
Probe the average: --config.encoder=<run>@latent_student/encoder.
Ours: not run.
"""

from vssl_jax import config as config_lib


def get_config(variant=''):
  size = variant or 'L'
  if size not in ('B', 'L', 'H'):
    raise ValueError(f"vjepa2.py: found :{size}, wanted one of ['B', 'L', 'H']")
  c = config_lib.default('salt')
  c.batch_size = 3072
  c.data.frames, c.data.stride, c.data.size = 16, 4, (224, 224)
  c.data.crop_scale, c.data.crop_aspect = (0.3, 1.0), (0.75, 1.35)
  c.data.workers = 8
  c.optim.warmup = 10_000
  c.optim.clip = 0.02
  c.method.phases = ('latent_student',)
  # Phases that are added (method.phases) are as large and train as long.
  for name in ('pixel_teacher', 'latent_student'):
    c.method[name].steps = 240_000
    c.method[name].encoder.size = size
  c.method.latent_student.predictor.num_heads = 12
  c.method.latent_student.teacher = '@ema/encoder'
  c.method.latent_student.ema = (0.99925, 0.99925)
  c.method.vit.remat = 'full' if size == 'H' else 'dots'
  return c
