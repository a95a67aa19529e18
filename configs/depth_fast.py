"""A quick look at depth in an encoder, on your own RGB-D frames: small heads.

Clips, as the encoder was trained on, are encoded once and kept; a
cross-attention readout of 256 channels is trained on them. For small encoders
on a CPU, and to compare encoders by.
Paper: none; the readout has the form of 4DS (arXiv 2412.15212).
Hardware: a CPU for minutes with a small encoder, or a GPU.
Command: bash launch/local.sh --config=configs/depth_fast.py \
  --config.encoder=<run folder, folder with published weights, or hub id> \
  --config.probe.train=<folder of scenes> --config.probe.test=<folder>
Rooms with exact depth, where you have no data of your own:
  python -m vssl_jax.data.tools.generated_rooms --out=rooms
Expected: depends on your scenes; compare encoders with it, and look at the
row `mean`, which needs no encoder. Ours, within one room (RedKitchen of
7-Scenes, frames 0-699 to train on, 860-999 to test on), an untrained encoder
of 4 blocks, 128 wide, clips of 8x64x64, stride 2: AbsRel .185, delta_1 .637;
`mean` .186, .640; 32 seconds of one CPU core.
"""

from vssl_jax import config as config_lib


def get_config(variant=''):
  if variant:
    raise ValueError(f'depth_fast.py: found :{variant}, has no variants')
  c = config_lib.evaluation('depth')
  c.data.depth_units, c.data.stretch = 1000.0, 40
  c.probe.augment, c.probe.clips = False, 4
  c.probe.epochs, c.probe.batch_size, c.probe.test_batch_size = 30, 8, 8
  c.probe.lrs, c.probe.wds, c.probe.decay = (1e-3,), (1e-4,), 'matrices'
  c.probe.width, c.probe.num_heads, c.probe.dtype = 256, 4, 'float32'
  c.probe.patch, c.probe.holdout = (2, 16, 16), 0.0
  return c
