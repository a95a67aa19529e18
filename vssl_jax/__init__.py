"""Self-supervised pretraining of video encoders in JAX."""

from typing import Any

__version__ = '0.1.0'


def load(source: str) -> Any:
  """Loads a frozen encoder: `encoder = load('runs/x'); encoder(video)`.

  Args:
    source: a run folder, a local folder or file with published weights, or a
      hub id.

  Returns:
    `encoders.Encoder`, which maps uint8 clips [B, T, H, W, 3] to tokens
    [B, N, D].
  """
  # Imported here so that `import vssl_jax` stays cheap in worker processes.
  from vssl_jax import encoders

  return encoders.load(source)
