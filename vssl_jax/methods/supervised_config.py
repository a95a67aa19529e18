"""The knobs of training with labels, and the method that they describe."""

from collections.abc import Callable

import flax.linen as nn
import ml_collections

from vssl_jax import mixing
from vssl_jax.methods import salt_config, supervised
from vssl_jax.models import classifier, hiera


def default() -> ml_collections.ConfigDict:
  """Returns every knob at the values of VideoMAE and MVD, ViT-B."""
  c = ml_collections.ConfigDict()
  c.name = 'supervised'
  # The job `finetune` fills these in: from the videos, and where the encoder
  # starts from weights, from those. 0 steps: not known yet.
  c.steps = 0
  c.classes = 0
  c.source = ''  # folder of the weights that the encoder starts from
  # The encoder, where it starts at random; `family` says which of the two
  # sections counts.
  c.family = 'vit'  # 'hiera'
  c.encoder = salt_config.encoder_section()
  c.encoder.size = 'B'
  # models/vit.py explains each field.
  c.vit = ml_collections.ConfigDict(
    dict(
      patch=(2, 16, 16),
      positions='sinusoid_1d',
      qkv_bias='qv',
      init_family='videomae',
      dtype='bfloat16',
    )
  )
  # A row of hiera.SIZES; models/hiera.py explains further fields.
  c.hiera = ml_collections.ConfigDict(
    dict(size='B', init_family='classifier', dtype='bfloat16')
  )
  # These hold for every start.
  c.q_pool = 3  # of Hiera: one token of a mask unit is left; pretrained with 2
  c.remat = 'none'
  c.attention = 'auto'
  c.drop_path = 0.1  # of the last block; linear from 0
  c.dropout = 0.0  # before the linear layer
  c.head_scale = 0.001  # its first weights and biases times this
  # vssl_jax/mixing.py explains these.
  c.mixup = 0.8
  c.cutmix = 1.0
  c.probability = 1.0
  c.switch = 0.5
  c.smoothing = 0.1
  return c


def build(
  config: ml_collections.ConfigDict,
  video: tuple[int, ...],
  resolve: Callable[[str], nn.Module],
) -> supervised.Supervised:
  """Builds the method from its section of the config.

  Args:
    config: `config.method`.
    video: (T, H, W, C) of a clip.
    resolve: not used; the section says all of the encoder's fields.

  Raises:
    ValueError: the number of classes or steps is not known.
  """
  del video, resolve
  for name in ('classes', 'steps'):
    if config[name] < 1:
      raise ValueError(
        f'method.{name}: found {config[name]}, wanted at least 1; the job '
        "'finetune' finds it out, from --config.finetune.train"
      )
  if config.family not in ('vit', 'hiera'):
    raise ValueError(
      f"method.family: found {config.family!r}, wanted 'vit' or 'hiera'"
    )
  encoder = _encoder(config)
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


def _encoder(config: ml_collections.ConfigDict) -> nn.Module:
  """Returns the encoder, without a final norm: the head has its own."""
  fields = dict(
    remat=config.remat,
    attention=config.attention,
    drop_path=config.drop_path,
    final_norm=False,
  )
  if config.family == 'vit':
    return salt_config.make_encoder(config.encoder, config.vit, **fields)
  shape = dict(config.hiera)
  size = shape.pop('size', {})  # of weights: all fields are there
  return hiera.make(size, q_pool=config.q_pool, **fields, **shape)
