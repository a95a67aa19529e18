"""Frozen cross-attention readout of 4DS and LayerLock: `:ssv2`, `:k700`.

Paper: 4DS, arXiv 2412.15212; LayerLock, arXiv 2509.10156. The readout is that
of the released code. How it was trained is not published: learning rates, 20
epochs, augmentation (that of probe_ssv2.py) and 2 or 4 clips x 3 views in
testing are ours, so absolute numbers are not theirs. An encoder of LayerLock
is tapped before the blocks that serve as its decoder; others are tapped as in
4DS with --config.probe.depth=0.95.
Heads are trained on 90 % of the videos; the other tenth chooses the head of
`selected`. --config.probe.holdout=0 trains them on 100 % and reports `max`.
Hardware: 3 heads of 11 M parameters beside the frozen encoder.
Command: bash launch/local.sh --config=configs/probe_4ds.py:ssv2 \
  --config.encoder=<run folder, folder with published weights, or hub id> \
  --config.probe.train=<train.csv> --config.probe.test=<validation.csv>
Expected (SSv2 / K700, from a secondary source): 4DS-G 63.1 / 52.1, with
LayerLock 66.1 / 56.3; 4DS-e 64.6 / 54.4, with LayerLock 67.1 / 57.9.
Ours: not run.
"""

from vssl_jax import config as config_lib

# stride, clips along a test video
SETS = {'ssv2': (2, 2), 'k700': (4, 4)}


def get_config(variant=''):
  if variant not in ('', *SETS):
    raise ValueError(
      f'probe_4ds.py: found :{variant}, wanted one of {list(SETS)}'
    )
  stride, clips = SETS[variant or 'ssv2']
  c = config_lib.evaluation('probe')
  # Height and width are the encoder's (224).
  c.data.frames, c.data.stride = 16, stride
  c.data.crop_scale, c.data.crop_aspect = (0.08, 1.0), (0.75, 4 / 3)
  c.data.flip = False  # left and right are labels in SSv2
  c.data.auto_augment, c.data.erase = 'rand-m7-n4-mstd0.5-inc1', 0.25
  c.data.workers = 8
  c.probe.protocol = 'readout'
  c.probe.clips, c.probe.views = clips, 3
  c.probe.epochs, c.probe.batch_size, c.probe.warmup = 20, 128, 1000
  c.probe.lrs, c.probe.wds = (1e-3, 3e-4, 1e-4), (1e-4,)
  c.probe.decay = 'matrices'
  return c
