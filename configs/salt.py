"""SALT at the paper's settings: `salt.py:B`, `:L` (default), `:H`, `:g`, `:G`.

Paper: arXiv 2509.24317. Data: K710, SSv2 and a subset of Panda-70M, 3.6 M
clips in all, drawn uniformly. Teacher ViT-B for B, ViT-L for the others.
Hardware: 80k + 160k steps of 3,072 clips are 1.2e21 FLOPs by the paper's rule
for L (1.4e21 by true token counts), 2.6e21 (3.3e21) for G; see `--plan`.
Command: bash launch/local.sh --config=configs/salt.py:L \
  --config.data.source=<folder or manifest>
Expected (frozen attentive probe, SSv2 / K400): B 66.1 / 70.9 (one view),
L 74.9 / 85.4, H 75.4 / 86.0, g 76.2 / 86.8, G 76.1 / 87.2. Ours: not run.
"""

from vssl_jax import config as config_lib

TEACHERS = {'B': 'B', 'L': 'L', 'H': 'L', 'g': 'L', 'G': 'L'}


def get_config(variant=''):
  size = variant or 'L'
  if size not in TEACHERS:
    raise ValueError(f'salt.py: found :{size}, wanted one of {list(TEACHERS)}')
  c = config_lib.default('salt')
  c.batch_size = 3072
  c.data.frames, c.data.stride, c.data.size = 16, 4, (224, 224)
  c.data.crop_scale, c.data.crop_aspect = (0.3, 1.0), (0.75, 1.35)
  c.data.workers = 8
  c.optim.warmup = 10_000
  c.method.pixel_teacher.steps = 80_000
  c.method.pixel_teacher.encoder.size = TEACHERS[size]
  c.method.latent_student.steps = 160_000
  c.method.latent_student.encoder.size = size
  c.method.vit.remat = 'full' if size in 'HgG' else 'dots'
  return c
