"""Readers of clips: this process, or child processes that may be killed."""

from collections.abc import Sequence

import numpy as np

from vssl_jax.data import clip as clip_lib


class Readers:
  """Reads clips."""

  def __init__(
    self,
    spec: clip_lib.Spec,
    *,
    count: int,
    deadline_s: float,
    memory_limit_mb: int,
  ) -> None:
    self._spec = spec

  def read(
    self, media: str | bytes, entropy: Sequence[int], out: np.ndarray
  ) -> clip_lib.Clips:
    """Reads the clips of one video into `out`."""
    return clip_lib.read(media, self._spec, entropy, out)

  def close(self) -> None:
    """Ends the children."""
