"""Readers of clips: in this process, or in children that may be killed."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vssl_jax.data import augment, child, contain, rgbd
from vssl_jax.data import clip as clip_lib

# What a child runs: this package, found where this process finds it.
CHILD = 'from vssl_jax.data import reader; reader.main()'


def read(
  media: str | bytes,
  spec: clip_lib.Spec,
  entropy: Sequence[int],
  out: np.ndarray,
) -> clip_lib.Clips:
  """Reads the clips of a video, or of a stretch of frames with depth."""
  if spec.depth_units:
    return rgbd.read(media, spec, entropy, out)
  clips = clip_lib.read(media, spec, entropy, out)
  if not spec.testing:
    augment.clips(
      out, spec.auto_augment, spec.erase, entropy, spec.mean, spec.std
    )
  return clips


class Readers:
  """Reads clips."""

  def __init__(
    self,
    spec: clip_lib.Spec,
    *,
    isolate: bool,
    deadline_s: int | float,
    memory_limit_mb: int,
  ) -> None:
    """Makes readers; children start when they are needed.

    Args:
      spec: what they read.
      isolate: False reads in this process, without a deadline or a limit.
      deadline_s: seconds for the clips of one video.
      memory_limit_mb: MiB that a child may use beyond its start.
    """
    self._spec, self.children = spec, None
    if isolate:
      self.children = contain.Children(
        CHILD,
        {'spec': spec.__dict__},
        deadline_s=deadline_s,
        memory_limit_mb=memory_limit_mb,
        shared=int(np.prod((spec.clips, *spec.stored))),
      )

  def read(
    self, media: str | bytes, entropy: Sequence[int], out: np.ndarray
  ) -> clip_lib.Clips:
    """Reads the clips of one video.

    Args:
      media: path of a file, or a file's content.
      entropy: seeds of everything random.
      out: uint8 [clips, *spec.stored] to write into.

    Raises:
      decode.VideoError: also with the reasons timeout, died and memory.
    """
    if self.children is None:
      return read(media, self._spec, entropy, out)
    inside = isinstance(media, bytes)
    request = {'path': None if inside else media, 'entropy': list(entropy)}
    reply, frames = self.children.ask(request, media if inside else b'')
    out[...] = frames.reshape(out.shape)
    return clip_lib.Clips(
      video=out,
      crop=np.asarray(reply['crop'], np.float32),
      flipped=np.asarray(reply['flipped'], bool),
      short=bool(reply['short']),
    )

  def stop(self) -> None:
    """Ends what the children are doing, for threads that wait for them."""
    if self.children is not None:
      self.children.stop()

  def close(self) -> None:
    """Frees everything; no thread may be reading any more."""
    if self.children is not None:
      self.children.close()


def main() -> None:
  """The child: reads clips into the shared memory."""
  spec = clip_lib.Spec(
    **{
      name: tuple(value) if isinstance(value, list) else value
      for name, value in child.settings()['spec'].items()
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

  child.run(answer)
