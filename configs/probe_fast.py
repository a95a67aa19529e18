"""A quick look at an encoder on your own labelled videos: `:knn`, `:linear`.

One centre clip per video, as the encoder was trained on (frames, stride or
rate, size), encoded once and kept in memory; a grid of
attentive heads (default), linear heads, or nearest neighbours. For up to some
ten thousand videos.
Paper: none; the heads are those of arXiv 2509.24317, appendix.
Hardware: one GPU for an hour, or a small encoder on a CPU.
Command: bash launch/local.sh --config=configs/probe_fast.py:knn \
  --config.encoder=<run folder, folder with published weights, or hub id> \
  --config.probe.train=<folder of class folders> --config.probe.test=<folder>
Expected: depends on your videos; compare encoders with it. Ours: not run.
"""

from vssl_jax import config as config_lib


def get_config(variant=''):
  if variant not in ('', 'knn', 'linear'):
    raise ValueError(f'probe_fast.py: found :{variant}, wanted :knn or :linear')
  c = config_lib.evaluation('probe')
  c.probe.protocol = variant or 'attentive'
  c.probe.augment = False
  c.probe.epochs = 5 if not variant else 20
  c.probe.lrs, c.probe.wds = (3e-3, 1e-3, 3e-4), (0.1, 0.01)
  return c
