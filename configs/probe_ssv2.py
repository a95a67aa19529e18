"""Frozen attentive probe on Something-Something v2, `:fast` for one view.

Paper: SALT, arXiv 2509.24317, appendix (after V-JEPA 2). 20 heads, one per
learning rate and weight decay, 2 segments x 3 views; `:fast` is its 16x1x1
with one head. RandAugment comes after the crop; theirs comes before it.
Heads of a grid are trained on 90 % of the videos; the other tenth chooses the
head of `selected`. Published heads are trained on 100 % and the best on the
test set is reported: --config.probe.holdout=0 does so (`max`). `:fast` has one
head, trained on 100 %. A single view is the middle 224 of 256 pixels, several
have the whole short side: with other --config.probe.views than the page's, set
--config.data.crop_part too, .875 for one and 1 for several.
Hardware: 20 ViT-L heads take some 16 GB; --config.probe.groups=4 needs less.
Command: bash launch/local.sh --config=configs/probe_ssv2.py \
  --config.encoder=<run folder, folder with published weights, or hub id> \
  --config.probe.train=<train.csv> --config.probe.test=<validation.csv>
Expected, `max`: SALT L 74.9, H 75.4, g 76.2, G 76.1; V-JEPA 2 L 73.7, g 75.3;
DINOv2 50.7, VideoMAEv2-g 56.1; `:fast`: SALT B 66.1, L 71.3. Ours: not run.
"""

from vssl_jax import config as config_lib


def get_config(variant=''):
  if variant not in ('', 'fast'):
    raise ValueError(f'probe_ssv2.py: found :{variant}, wanted :fast')
  c = config_lib.evaluation('probe')
  # The protocol's; height and width are the encoder's (SALT: 224).
  c.data.frames, c.data.stride = 16, 4
  # In training one segment lies in each of as many parts of the video.
  c.data.sampling = 'parts'
  c.data.crop_scale, c.data.crop_aspect = (0.08, 1.0), (0.75, 4 / 3)
  c.data.flip = False  # left and right are labels here
  c.data.auto_augment, c.data.erase = 'rand-m7-n4-mstd0.5-inc1', 0.25
  c.data.workers = 8
  c.probe.segments, c.probe.views = (1, 1) if variant else (2, 3)
  if variant:
    # A single view is 224 of 256 pixels; several have the whole short side.
    c.data.crop_part = 0.875
    c.probe.lrs, c.probe.wds = (1e-3,), (0.01,)
  return c
