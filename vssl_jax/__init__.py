"""Self-supervised pretraining of video encoders in JAX."""

import logging
from typing import Any

__version__ = '0.1.0'


def load(source: str, *, dtype: str | None = None) -> Any:
  """Loads a frozen encoder: `encoder = load('runs/x'); encoder(video)`.

  Args:
    source: a run folder, a local folder or file with published weights, or a
      hub id.
    dtype: of activations and matrix products, `float32` or `bfloat16`. None:
      `float32` on CPUs, and elsewhere the one that the encoder was trained
      in, `bfloat16` for published weights.

  Returns:
    `encoders.Encoder`, which maps uint8 clips [B, T, H, W, 3] to tokens
    [B, N, D].
  """
  # Imported here so that `import vssl_jax` stays cheap in worker processes.
  import jax

  from vssl_jax import encoders

  encoder = encoders.load(source, dtype=dtype)
  logging.getLogger(__name__).info(
    '%s: computes in %s on %s',
    source, encoder.module.dtype, jax.default_backend(),
  )  # fmt: skip
  return encoder
