"""The keys of `config.probe`, and the readouts built from them.

| protocol | what is trained on the tokens | source |
|---|---|---|
| `attentive` | three blocks and a query | SALT, V-JEPA 2 |
| `readout` | one cross-attention; average over clips | 4DS, LayerLock |
| `linear` | a layer on their mean | MAE |
| `knn` | nothing | DINOv2 |
"""

from typing import Any

import ml_collections

from vssl_jax.evals.probe import head_grid
from vssl_jax.models import layers, readout
from vssl_jax.utils import knn, ranges

# Published grid: SALT (arXiv 2509.24317), appendix, systematic protocol.
LRS = (5e-3, 3e-3, 1e-3, 3e-4, 1e-4)
WDS = (0.8, 0.4, 0.1, 0.01)


SOURCES = ranges.Tuple(ranges.Text())
CLIPS = ranges.Whole(1, 2**10)

KEYS = ranges.Section(
  protocol=(
    'attentive',
    ranges.Choice(('attentive', 'readout', 'linear', 'knn')),
  ),
  # Videos to classify; ('',) for config.data.source. All other options of the
  # videos are in config.data.
  train=(('',), SOURCES),
  train_where=('', ranges.Text()),  # rows of a manifest: 'fold!=0'
  test=(('',), SOURCES),
  test_where=('', ranges.Text()),  # 'fold=0'
  # True: test videos may be among the training videos; the report states how
  # many are. False: this is an error.
  allow_overlap=(False, ranges.Flag()),
  # The tap, as a fraction of the depth as 4DS counts it: 1.0 is the input of
  # the last block. 0.0 for the encoder's default: the last block and the final
  # norm, or the block before those that served as its decoder. The report
  # states which.
  depth=(0.0, ranges.Real(0, 1)),
  epochs=(20, ranges.Whole(1, 10**6)),
  batch_size=(256, ranges.Whole(1, 2**20)),  # videos per step
  test_batch_size=(32, ranges.Whole(1, 2**20)),  # videos at once in testing
  # Clips of a video that a head reads at once. Their positions are random
  # in training and evenly spaced in testing.
  segments=(1, CLIPS),
  # Further clips along a test video, and crops of each; their
  # probabilities are averaged.
  clips=(1, CLIPS),
  views=(1, CLIPS),
  # False: training clips are centre crops, encoded once and kept in memory.
  augment=(True, ranges.Flag()),
  lrs=(LRS, ranges.Tuple(ranges.Real(high=1e3, above=0))),
  wds=(WDS, ranges.Tuple(ranges.Real(0, 1e3))),
  groups=(1, ranges.Whole(1, 10**6)),  # parts of the grid, one after the other
  # steps in which the learning rate rises from 0
  warmup=(0, ranges.Whole(0, ranges.MANY)),
  # parameters, or 'matrices': those of two axes or more
  decay=('all', ranges.Choice(head_grid.DECAYED)),
  num_heads=(16, ranges.Whole(1, 2**10)),  # of attention
  # of queries, keys and values of 'readout' and of depth
  width=(1024, ranges.Whole(1, 2**16)),
  dropout=(0.0, ranges.Real(0, below=1)),  # of attended values
  dtype=('bfloat16', ranges.Choice(layers.DTYPES)),
  # Fraction of the training videos that is held out to choose the head;
  # 0.0: all heads are trained on all videos and none is chosen, as
  # published. A single head is always trained on all of them.
  holdout=(0.1, ranges.Real(0, below=1)),
  # epochs between tests; 0: at the end only
  eval_every=(0, ranges.Whole(0, 10**6)),
  # numbers of neighbours of 'knn'; the report has one accuracy for each
  ks=((10, 20, 100, 200), ranges.Tuple(ranges.Whole(1, knn.NEAREST))),
  # --- of the job 'depth'
  # over pixels with a measured depth, in metres
  loss=('mse', ranges.Choice(('mse', 'l1'))),
  # frames and pixels that one query predicts
  patch=((2, 8, 8), ranges.Tuple(ranges.Whole(1, 2**10), lengths=(3,))),
  # test clips whose input, truth and prediction are drawn
  pictures=(8, ranges.Whole(0, 2**10)),
)

default = KEYS.defaults


def network(
  classes: int,
  config: ml_collections.ConfigDict,
  grid: tuple[int, int, int],
  frames: int,
) -> head_grid.Readout:
  """Returns the readout of a protocol.

  Args:
    classes: number of classes.
    config: `config.probe`.
    grid: tokens (t, h, w) of a clip.
    frames: frames of a clip.

  Raises:
    ValueError: no such protocol, or several segments for a protocol that reads
      one clip at a time.
  """
  protocol, dtype = config['protocol'], config['dtype']
  if protocol == 'linear':
    return readout.Linear(classes)
  if protocol == 'attentive':
    return readout.Attentive(
      classes, num_heads=config['num_heads'], dtype=dtype
    )
  if protocol != 'readout':
    raise ValueError(
      f"probe.protocol: found {protocol!r}, wanted 'attentive', 'readout', "
      "'linear' or 'knn'"
    )
  if config['segments'] > 1:
    raise ValueError(
      f'probe.segments: found {config["segments"]}, wanted 1: this readout '
      'sees one clip at a time; set probe.clips, whose predictions are averaged'
    )
  return readout.CrossAttention(
    classes, grid, frames, dtype=dtype, **attention_of(config)
  )


def attention_of(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the fields that the readouts of 4DS share."""
  return {name: config[name] for name in ('width', 'num_heads', 'dropout')}
