"""Config keys and builder of supervised training."""

from collections.abc import Callable

import ml_collections

from vssl_jax.methods import config_checks, mixup, salt_config, supervised
from vssl_jax.methods import phase as phase_lib
from vssl_jax.models import Module, classifier
from vssl_jax.models.hiera import encoder as encoder_lib
from vssl_jax.utils import colours, ranges

KEYS = ranges.Section(  # VideoMAE's and MVD's values, ViT-B
  name=('supervised', ranges.Choice(('supervised',))),
  # The job `finetune` sets these from the videos, and from the weights that the
  # encoder is initialised from, if any. 0 steps: not known yet.
  steps=(0, ranges.Whole(0, ranges.MANY)),
  classes=(0, ranges.Whole(0, 2**24)),
  # folder of the weights that initialise the encoder
  source=('', ranges.Text()),
  # (frames, stride, side in pixels) of clips, for a randomly initialised
  # encoder if config.data does not set them.
  clip=((16, 4, 224), ranges.Tuple(ranges.Whole(1, 2**14), lengths=(3,))),
  # For a randomly initialised encoder: `family` selects the section `vit` (with
  # `encoder`) or `hiera`.
  family=('vit', ranges.Choice(('vit', 'hiera'))),
  encoder=config_checks.encoder('B'),
  # See models/vit.py for each field.
  vit=config_checks.network(
    patch=(2, 16, 16),
    positions='sinusoid_1d',
    qkv_bias='qv',
    init_family='videomae',
    dtype='bfloat16',
  ),
  # One of hiera.SIZES; see models/hiera/encoder.py for the other fields.
  hiera=ranges.Section(
    size=('B', ranges.Choice(tuple(encoder_lib.SIZES))),
    init_family=('classifier', ranges.Choice(tuple(encoder_lib.INITS))),
    dtype=('bfloat16', config_checks.DTYPE),
  ),
  # The keys below apply to every initialisation.
  # Hiera: 3 leaves one token per mask unit; pretraining uses 2
  q_pool=(3, ranges.Choice((2, 3))),
  remat=('none', config_checks.NETWORK['remat']),
  attention=('auto', config_checks.NETWORK['attention']),
  drop_path=(0.1, config_checks.RATE),  # of the last block; linear from 0
  dropout=(0.0, config_checks.RATE),  # before the linear layer
  head_scale=(
    0.001,
    config_checks.WEIGHT,
  ),  # factor on the head's initial weights and biases
  # See vssl_jax/methods/mixup.py.
  mixup=(0.8, config_checks.WEIGHT),
  cutmix=(1.0, config_checks.WEIGHT),
  probability=(1.0, config_checks.SHARE),
  switch=(0.5, config_checks.SHARE),
  smoothing=(0.1, config_checks.SHARE),
)

default = KEYS.defaults


def build(
  config: ml_collections.ConfigDict,
  video: tuple[int, ...],
  resolve: Callable[[str], Module],
  pixels: colours.Colours,
) -> tuple[phase_lib.Phase, ...]:
  """Builds the phase from the method's section of the config.

  Args:
    config: `config.method`.
    video: (T, H, W, C) of a clip.
    resolve: not used; the section has all fields of the encoder.
    pixels: mean and standard deviation of the pixels, for a randomly
      initialised encoder; an encoder initialised from weights keeps its own.

  Raises:
    ValueError: a value is out of range, or the number of classes or steps is
      not known.
  """
  del video, resolve
  KEYS.check(config, 'method')
  for name in ('classes', 'steps'):
    if config[name] < 1:
      raise ValueError(
        f'method.{name}: found {config[name]}, wanted at least 1; the job '
        "'finetune' sets it from --config.finetune.train"
      )
  encoder = _encoder(config, pixels)
  fields = ('mixup', 'cutmix', 'probability', 'switch', 'smoothing')
  init_from = {}
  if config.source:
    init_from['encoder'] = phase_lib.parse_source(config.source)
  return (
    supervised.SupervisedPhase(
      name='labels',
      steps=config.steps,
      encoder=encoder,
      init_from=init_from,
      head=classifier.Classifier(
        config.classes,
        config.dropout,
        config.head_scale,
        # As released, also for an encoder initialised from other weights.
        encoder_lib.INITS['classifier']
        if config.family == 'hiera'
        else 'vjepa',
      ),
      mix=mixup.Mix(**{name: config[name] for name in fields}),
    ),
  )


def _encoder(
  config: ml_collections.ConfigDict, pixels: colours.Colours
) -> Module:
  """Returns the encoder without a final norm; the head has a layer norm."""
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
  size = shape.pop('size', {})  # from weights: no size, all fields are set
  return encoder_lib.make(size, q_pool=config.q_pool, **fields, **shape)
