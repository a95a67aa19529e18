"""Dense depth from a frozen encoder on ScanNet, as LayerLock reports it.

Paper: LayerLock, arXiv 2509.10156, with the readout of 4DS (arXiv 2412.15212):
6,272 queries of 2x8x8 pixels. How it was trained is not published: squared
error in metres, learning rates, some 40k steps and crops are ours, so absolute
numbers are not theirs; the AbsRel they print looks ten times the usual one.
Crops are mild: zooming changes how large a metre looks. No scale is fitted; a
second line has each clip's median aligned.
Heads are trained on 90 % of the examples; the other tenth chooses the head of
`selected`. --config.probe.holdout=0 trains them on 100 % and reports `best`.
Data: scenes with color/ and depth/ (millimetres), as SensReader exports them.
Hardware: 3 heads of 18 M parameters, 19.7 M scores per head of attention and
clip; one after the other (groups=3).
Command: bash launch/local.sh --config=configs/depth_scannet.py \
  --config.encoder=<run folder, folder with published weights, or hub id> \
  --config.probe.train=<train.txt: a scene's folder on each line> \
  --config.probe.test=<validation.txt>
Expected (AbsRel as printed, from a secondary source): 4DS-G 1.02, with
LayerLock 1.00; 4DS-e .94, with LayerLock .98: no gain. Ours: not run.
"""

from vssl_jax import config as config_lib


def get_config(variant=''):
  if variant:
    raise ValueError(f'depth_scannet.py: found :{variant}, has no variants')
  c = config_lib.evaluation('depth')
  # Height and width are the encoder's (224).
  c.data.frames, c.data.stride = 16, 2
  c.data.depth_units, c.data.stretch = 1000.0, 64
  c.data.crop_scale, c.data.crop_aspect = (0.7, 1.0), (0.9, 1.1)
  c.data.workers = 8
  c.probe.clips = 2
  # Some 30k stretches of 64 frames: 230 steps of 128 in an epoch.
  c.probe.epochs, c.probe.batch_size, c.probe.warmup = 170, 128, 1000
  c.probe.test_batch_size = 8
  c.probe.lrs, c.probe.wds, c.probe.groups = (1e-3, 3e-4, 1e-4), (1e-4,), 3
  c.probe.decay = 'matrices'
  return c
