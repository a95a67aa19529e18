"""The knobs of training with labels, and the method that they describe."""

from collections.abc import Callable

import flax.linen as nn
import ml_collections

from vssl_jax import colours, mixing, ranges
from vssl_jax.methods import knobs, salt_config, supervised
from vssl_jax.models import classifier, hiera

KEYS = ranges.Section(  # VideoMAE's and MVD's values, ViT-B
  name=('supervised', ranges.Choice(('supervised',))),
  # The job `finetune` fills these in: from the videos, and where the encoder
  # starts from weights, from those. 0 steps: not known yet.
  steps=(0, ranges.Whole(0, ranges.MANY)),
  classes=(0, ranges.Whole(0, 2**24)),
  # folder of the weights that the encoder starts from
  source=('', ranges.Text()),
  # Frames, stride, and height or width of clips, where the encoder starts at
  # random and config.data leaves them open.
  clip=((16, 4, 224), ranges.Tuple(ranges.Whole(1, 2**14), lengths=(3,))),
  # The encoder, where it starts at random; `family` says which of the two
  # sections counts.
  family=('vit', ranges.Choice(('vit', 'hiera'))),
  encoder=knobs.encoder('B'),
  # models/vit.py explains each field.
  vit=knobs.network(
    patch=(2, 16, 16),
    positions='sinusoid_1d',
    qkv_bias='qv',
    init_family='videomae',
    dtype='bfloat16',
  ),
  # A row of hiera.SIZES; models/hiera.py explains further fields.
  hiera=ranges.Section(
    size=('B', ranges.Choice(tuple(hiera.SIZES))),
    init_family=('classifier', ranges.Choice(tuple(hiera.INITS))),
    dtype=('bfloat16', knobs.DTYPE),
  ),
  # These hold for every start.
  # of Hiera: one token of a mask unit is left; pretrained with 2
  q_pool=(3, ranges.Choice((2, 3))),
  remat=('none', knobs.NETWORK['remat']),
  attention=('auto', knobs.NETWORK['attention']),
  drop_path=(0.1, knobs.RATE),  # of the last block; linear from 0
  dropout=(0.0, knobs.RATE),  # before the linear layer
  head_scale=(0.001, knobs.WEIGHT),  # its first weights and biases times this
  # vssl_jax/mixing.py explains these.
  mixup=(0.8, knobs.WEIGHT),
  cutmix=(1.0, knobs.WEIGHT),
  probability=(1.0, knobs.SHARE),
  switch=(0.5, knobs.SHARE),
  smoothing=(0.1, knobs.SHARE),
)

default = KEYS.defaults


def build(
  config: ml_collections.ConfigDict,
  video: tuple[int, ...],
  resolve: Callable[[str], nn.Module],
  pixels: colours.Colours,
) -> supervised.Supervised:
  """Builds the method from its section of the config.

  Args:
    config: `config.method`.
    video: (T, H, W, C) of a clip.
    resolve: not used; the section says all of the encoder's fields.
    pixels: mean and deviation of the clips, where the encoder starts at
      random; one that starts from weights keeps its own.

  Raises:
    ValueError: a value outside of its range, or the number of classes or steps
      is not known.
  """
  del video, resolve
  KEYS.check(config, 'method')
  for name in ('classes', 'steps'):
    if config[name] < 1:
      raise ValueError(
        f'method.{name}: found {config[name]}, wanted at least 1; the job '
        "'finetune' finds it out, from --config.finetune.train"
      )
  encoder = _encoder(config, pixels)
  fields = ('mixup', 'cutmix', 'probability', 'switch', 'smoothing')
  return supervised.Supervised(
    supervised.Labels(
      name='labels',
      steps=config.steps,
      encoder=encoder,
      init_from={'encoder': config.source} if config.source else {},
      head=classifier.Classifier(
        config.classes,
        config.dropout,
        config.head_scale,
        # As released, also where the encoder starts from other weights.
        hiera.INITS['classifier'] if config.family == 'hiera' else 'vjepa',
      ),
      mix=mixing.Mix(**{name: config[name] for name in fields}),
    )
  )


def _encoder(
  config: ml_collections.ConfigDict, pixels: colours.Colours
) -> nn.Module:
  """Returns the encoder, without a final norm: the head has its own."""
  fields = dict(
    remat=config.remat,
    attention=config.attention,
    drop_path=config.drop_path,
    final_norm=False,
  )
  if config.family == 'vit':
    shape = pixels._asdict() | dict(config.vit)
    return salt_config.make_encoder(config.encoder, shape, **fields)
  shape = pixels._asdict() | dict(config.hiera)
  size = shape.pop('size', {})  # of weights: all fields are there
  return hiera.make(size, q_pool=config.q_pool, **fields, **shape)
