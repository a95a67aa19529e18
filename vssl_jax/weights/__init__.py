"""Loads and exports published weights without executing code from files."""

from vssl_jax.weights.classifiers import Classifier
from vssl_jax.weights.classifiers import load as load_classifier
from vssl_jax.weights.export import export
from vssl_jax.weights.modules import Encoder, from_fields, to_fields
from vssl_jax.weights.published import (
  clip_shape,
  clip_timing,
  describe,
  load_published,
)
from vssl_jax.weights.readers.tensors import WeightsError
from vssl_jax.weights.source import fingerprint

__all__ = [
  'Classifier',
  'Encoder',
  'WeightsError',
  'clip_shape',
  'clip_timing',
  'describe',
  'export',
  'fingerprint',
  'from_fields',
  'load_classifier',
  'load_published',
  'to_fields',
]
