"""Weights of other people's models, read without running anything."""

from vssl_jax.weights.convert import resize
from vssl_jax.weights.export import export
from vssl_jax.weights.published import clip_shape, describe, load_published
from vssl_jax.weights.read import WeightsError

__all__ = [
  'WeightsError',
  'clip_shape',
  'describe',
  'export',
  'load_published',
  'resize',
]
