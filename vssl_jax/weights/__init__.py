"""Weights of other people's models, read without running anything."""

from vssl_jax.weights.convert import resize
from vssl_jax.weights.export import export
from vssl_jax.weights.modules import Encoder, from_fields, to_fields
from vssl_jax.weights.published import clip_shape, describe, load_published
from vssl_jax.weights.read import WeightsError
from vssl_jax.weights.source import fingerprint

__all__ = [
  'Encoder',
  'WeightsError',
  'clip_shape',
  'describe',
  'export',
  'fingerprint',
  'from_fields',
  'load_published',
  'resize',
  'to_fields',
]
