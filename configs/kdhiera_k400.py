"""KDHiera, interpretation of the abstract, on K400. `:B :L :B-self :L-self`.

Paper: Cluster Computing 2025, 10.1007/s10586-025-05262-8; only its abstract
was available to us, which gives no number, so every value here is ours or
another paper's: recipe of Hiera (arXiv 2306.00989), 300 epochs of 240k clips,
batch 512; 90 % of the mask units hidden, the rest drawn by the image teacher's
class token (UMT, arXiv 2303.16058). Teachers DINO ViT-B/16 (ImageNet) and
VideoMAE ViT-B (K400) for B; DINOv2 ViT-L/14 at 196 pixels and VideoMAE ViT-L
for L. Other teachers: --config.method.image.teacher, .video.teacher: a run
folder, a folder or file with published weights, a hub id; for an MAE set
--config.method.scores=column_mean. DINOv2 ViT-L is known to attend to a few
patches of background (arXiv 2309.16588), which `mask/entropy` in the log tells;
against that, DINO for L too: --config.method.image.teacher=facebook/dino-vitb16
--config.method.image.layers='(3,6,9,12)'. `-self` needs no outside weights: its
teachers, ViT of the student's letter, are trained by the same run first, at
Hiera's learning rate (2.7 times that of videomae_k400.py).
Hardware: .71 (B) and 2.4 (L) TFLOP a clip, nine tenths of it the teachers';
see `--plan`.
Command: bash launch/local.sh --config=configs/kdhiera_k400.py:B \
  --config.data.source=<folder or manifest>
Expected: not published. Beside it, fine-tuned on K400: Hiera-B MAE 84.0,
Hiera-L MAE 87.3 (3,200 epochs), MVD-B 82.7, UMT-B 87.4. Ours: not run.
"""

from vssl_jax import config as config_lib

# Licence of VideoMAE: CC BY-NC 4.0; of DINO and DINOv2: Apache 2.0.
IMAGE = {'B': 'facebook/dino-vitb16', 'L': 'facebook/dinov2-large'}
VIDEO = {'B': 'MCG-NJU/videomae-base', 'L': 'MCG-NJU/videomae-large'}
LAYERS = {'B': (3, 6, 9, 12), 'L': (6, 12, 18, 24)}
DROP_PATH = {'B': 0.1, 'L': 0.2}
K400 = 240_000  # clips
EPOCHS, TEACHERS_EPOCHS = 300, 400
BATCH = 512


def get_config(variant=''):
  size, _, own = (variant or 'B').partition('-')
  if size not in IMAGE or own not in ('', 'self'):
    raise ValueError(
      f'kdhiera_k400.py: found :{variant}, wanted B or L, or one of them and '
      '-self'
    )
  _, c = config_lib.load(f'configs/hiera_mae_k400.py:{size}')
  epoch = K400 // BATCH
  c.data.repeats = 2
  c.optim.warmup = 40 * epoch
  m = c.method
  m.steps = EPOCHS * epoch
  m.objective, m.units, m.teachers = 'visible', 'attention', ('image', 'video')
  m.drop_path, m.decoder.depth = DROP_PATH[size], 2
  for name, source in (('image', IMAGE[size]), ('video', VIDEO[size])):
    m[name].teacher, m[name].layers = source, LAYERS[size]
    section = m[f'{name}_teacher']
    section.encoder.size, section.steps = size, TEACHERS_EPOCHS * epoch
    if own:
      m[name].teacher = f'@{name}_teacher'
  if own:
    m.scores = 'column_mean'  # an MAE of our own has no class token
  return c
