"""Self-supervised pretraining of video encoders in JAX."""

import logging
from typing import Any

__version__ = '0.1.0'


def load(source: str, *, dtype: str | None = None) -> Any:
  """Loads a frozen encoder: `encoder = load('runs/x'); encoder(video)`.

  Args:
    source: a run folder, a local folder or file with published weights, or a
      hub id.
    dtype: dtype of activations and matrix products, `float32` or `bfloat16`.
      None: `float32` on CPUs; on other devices the dtype of training, or
      `bfloat16` for published weights.

  Returns:
    `encoder.Encoder`, which maps uint8 clips [B, T, H, W, 3] to tokens
    [B, N, D].

  Raises:
    ValueError: the source does not exist or has an unsupported format, or its
      weights are not finite.
    CheckpointError: the run's checkpoint is corrupt.

  Example:
    >>> encoder = vssl_jax.load(folder)  # of a run, or published weights
    >>> encoder(np.zeros((1, 4, 16, 16, 3), np.uint8)).shape
    (1, 8, 16)
  """
  # Local imports, so that `import vssl_jax` stays cheap in worker processes.
  import jax

  from vssl_jax import encoder as encoder_lib

  encoder = encoder_lib.load(source, dtype=dtype)
  logging.getLogger(__name__).info(
    '%s: computes in %s on %s',
    source, encoder.module.dtype, jax.default_backend(),
  )  # fmt: skip
  return encoder
