"""The keys of `config.probe`, and what is built from them.

| protocol | what is trained on the tokens | source |
|---|---|---|
| `attentive` | three blocks and a query | SALT, V-JEPA 2 |
| `readout` | one cross-attention; each clip votes alone | 4DS, LayerLock |
| `linear` | a layer on their mean | MAE |
| `knn` | nothing | DINOv2 |
"""

from typing import Any

import ml_collections

from vssl_jax.evals import heads
from vssl_jax.models import readout

# Published grid: SALT (arXiv 2509.24317), appendix, systematic protocol.
LRS = (5e-3, 3e-3, 1e-3, 3e-4, 1e-4)
WDS = (0.8, 0.4, 0.1, 0.01)


def default() -> ml_collections.ConfigDict:
  """Returns every key of `config.probe`, at the published values."""
  return ml_collections.ConfigDict(
    dict(
      protocol='attentive',  # 'readout', 'linear', 'knn'
      # What is classified. Everything else about the videos stands in
      # config.data; ('',) is its source.
      train=('',),
      train_where='',  # rows of a manifest: 'fold!=0'
      test=('',),
      test_where='',  # 'fold=0'
      # The tap: fraction of the blocks to run, as 4DS counts them; 0.0 is what
      # the encoder gives unasked: the last one and the final norm, or the one
      # before the blocks that served as its decoder. The report says which.
      depth=0.0,
      epochs=20,
      batch_size=256,  # videos per step
      test_batch_size=32,  # videos at once in testing
      # Clips of a video that a head sees at once. In training their places
      # are random, in testing they are spread evenly.
      segments=1,
      # Further clips along a test video, and crops of each, whose
      # probabilities are averaged.
      clips=1,
      views=1,
      # False: training clips are centre crops, encoded once and kept.
      augment=True,
      lrs=LRS,
      wds=WDS,
      groups=1,  # parts of the grid trained one after the other
      warmup=0,  # steps in which the learning rate rises from 0
      decay='all',  # parameters, or 'matrices': those of two axes or more
      num_heads=16,  # of attention
      width=1024,  # of queries, keys and values of 'readout' and of depth
      dropout=0.0,  # of what these attend to
      dtype='bfloat16',
      # Fraction of the training videos that chooses the head and that no head
      # is trained on; 0.0: all heads are trained on all videos and none is
      # chosen, as published. A single head is always trained on all of them.
      holdout=0.1,
      eval_every=0,  # epochs between tests; 0: at the end only
      ks=(10, 20, 100, 200),  # neighbours of 'knn'; the report's is k=20
      # --- of the job 'depth'
      loss='mse',  # of pixels with a measurement, in metres; 'l1'
      patch=(2, 8, 8),  # frames and pixels that one query answers for
      pictures=8,  # test clips that are drawn beside input and truth
    )
  )


def network(
  classes: int,
  config: ml_collections.ConfigDict,
  grid: tuple[int, int, int],
  frames: int,
) -> heads.Readout:
  """Returns the readout of a protocol.

  Args:
    classes: number of classes.
    config: `config.probe`.
    grid: tokens (t, h, w) of a clip.
    frames: of a clip.

  Raises:
    ValueError: no such protocol, or one that looks at one clip at a time with
      more than one segment.
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
      'sees one clip at a time; set probe.clips, whose votes are averaged'
    )
  return readout.CrossAttention(
    classes, grid, frames, dtype=dtype, **attention_of(config)
  )


def attention_of(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the fields that the readouts of 4DS share."""
  return {name: config[name] for name in ('width', 'num_heads', 'dropout')}
