"""Reads clips, in this process or in a pool of isolated worker processes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vssl_jax.data.clips import augment, isolated_process, process_entry, rgbd
from vssl_jax.data.clips import clip_spec as clip_spec_lib

# Code of a worker process. It has the same Python path as this process.
WORKER_PROGRAM = 'from vssl_jax.data.clips import read_clip; read_clip.main()'


def read(
  media: str | bytes,
  spec: clip_spec_lib.Spec,
  entropy: Sequence[int],
  out: np.ndarray,
) -> clip_spec_lib.Clips:
  """Reads the clips of a video, or of a stretch of RGB-D frames.

  Args:
    media: path of a file, or a file's content; for RGB-D see `rgbd.read`.
    spec: clip specification.
    entropy: seeds of all random choices.
    out: uint8 [clips, *spec.stored] to write into.

  Raises:
    decode.VideoError: the video cannot be read; with the reason.
  """
  if spec.depth_units:
    return rgbd.read(media, spec, entropy, out)
  clips = clip_spec_lib.read(media, spec, entropy, out)
  if not spec.testing:
    augment.clips(
      out, spec.auto_augment, spec.erase, entropy, spec.mean, spec.std
    )
  return clips


class Readers:
  """Reads clips, by default in isolated worker processes."""

  def __init__(
    self,
    spec: clip_spec_lib.Spec,
    *,
    isolate: bool,
    deadline_s: int | float,
    memory_limit_mb: int,
  ) -> None:
    """Initializes the readers. Worker processes start at the first read.

    Args:
      spec: clip specification.
      isolate: False reads in this process, without deadline or memory limit.
      deadline_s: seconds for the clips of one video.
      memory_limit_mb: MiB that a worker may use beyond its size at its start.
    """
    self._spec, self.pool = spec, None
    if isolate:
      self.pool = isolated_process.WorkerPool(
        WORKER_PROGRAM,
        {'spec': spec.__dict__},
        deadline_s=deadline_s,
        memory_limit_mb=memory_limit_mb,
        shared=int(np.prod((spec.clips, *spec.stored))),
      )

  def read(
    self, media: str | bytes, entropy: Sequence[int], out: np.ndarray
  ) -> clip_spec_lib.Clips:
    """Reads the clips of one video.

    Args:
      media: path of a file, or a file's content.
      entropy: seeds of all random choices.
      out: uint8 [clips, *spec.stored] to write into.

    Raises:
      decode.VideoError: the video cannot be read, or the worker timed out,
        died or ran out of memory.
    """
    if self.pool is None:
      return read(media, self._spec, entropy, out)
    in_memory = isinstance(media, bytes)
    request = {'path': None if in_memory else media, 'entropy': list(entropy)}
    reply, frames = self.pool.ask(request, media if in_memory else b'')
    out[...] = frames.reshape(out.shape)
    return clip_spec_lib.Clips(
      video=out,
      crop=np.asarray(reply['crop'], np.float32),
      flipped=np.asarray(reply['flipped'], bool),
      short=bool(reply['short']),
    )

  def stop(self) -> None:
    """Kills all workers, so that threads stop waiting for their replies."""
    if self.pool is not None:
      self.pool.stop()

  def close(self) -> None:
    """Frees all workers. No thread may be in `read` any more."""
    if self.pool is not None:
      self.pool.close()


def main() -> None:
  """Runs a worker process, which reads clips into the shared memory."""
  spec = clip_spec_lib.Spec(
    **{
      name: tuple(value) if isinstance(value, list) else value
      for name, value in process_entry.settings()['spec'].items()
    }
  )

  def answer(
    request: dict[str, Any], content: bytes, memory: np.ndarray
  ) -> dict[str, Any]:
    frames = memory.reshape(spec.clips, *spec.stored)
    media = request['path'] or content
    clips = read(media, spec, request['entropy'], frames)
    return {
      'crop': clips.crop.tolist(),
      'flipped': clips.flipped.tolist(),
      'short': clips.short,
    }

  process_entry.run(answer)
