"""Weights of other people's models, read without running anything."""

from vssl_jax.weights.convert import resize
from vssl_jax.weights.export import export
from vssl_jax.weights.published import clip_shape, describe, load_published
from vssl_jax.weights.read import WeightsError
from vssl_jax.weights.source import fingerprint

__all__ = [
  'WeightsError',
  'clip_shape',
  'describe',
  'export',
  'fingerprint',
  'load_published',
  'resize',
]
