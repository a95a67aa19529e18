"""The child process of `contain`: reads videos until its pipe closes."""

import contextlib
import json
import mmap
import os
import resource
import signal
import struct
import sys
import traceback

import numpy as np

from vssl_jax.data import clip as clip_lib
from vssl_jax.data import decode


def main() -> None:
  """Serves requests; the settings are the only argument."""
  settings = json.loads(sys.argv[1])
  spec = clip_lib.Spec(
    **{
      name: tuple(value) if isinstance(value, list) else value
      for name, value in settings['spec'].items()
    }
  )
  frames = np.frombuffer(mmap.mmap(settings['frames'], 0), np.uint8)
  frames = frames.reshape(spec.clips, *spec.shape)
  requests = os.fdopen(settings['request'], 'rb')
  limit(settings['memory_limit_mb'])
  # The parent kills a reader that is late. Should the parent be gone, the
  # alarm does, whatever the decoder is busy with.
  signal.signal(signal.SIGALRM, signal.SIG_DFL)
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
  _reply(settings['reply'], {})
  while head := requests.read(4):
    request = json.loads(requests.read(struct.unpack('<I', head)[0]))
    media = request['path'] or requests.read(request['bytes'])
    signal.alarm(int(settings['deadline_s']) + 5)
    answer = serve(media, spec, request['entropy'], frames)
    signal.alarm(0)
    _reply(settings['reply'], answer)


def serve(
  media: str | bytes, spec: clip_lib.Spec, entropy: list, frames: np.ndarray
) -> dict:
  """Reads the clips of one video into `frames`.

  Returns:
    What JSON can say of them: crop, flipped and short; or reason and detail;
    or bug, with a traceback.
  """
  try:
    clips = clip_lib.read(media, spec, entropy, frames)
  except decode.VideoError as error:
    return {'reason': error.reason, 'detail': error.detail}
  except MemoryError:
    return {'reason': 'memory', 'detail': 'the reader may not use more'}
  except Exception:
    return {'bug': traceback.format_exc()}
  return {
    'crop': clips.crop.tolist(),
    'flipped': clips.flipped.tolist(),
    'short': clips.short,
  }


def limit(megabytes: int) -> None:
  """Limits this process to so many MiB beyond what it has mapped now."""
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  try:
    with open('/proc/self/statm', encoding='ascii') as file:
      mapped = int(file.read().split()[0]) * resource.getpagesize()
  except OSError:
    mapped = 2**30
  size = mapped + megabytes * 2**20
  with contextlib.suppress(ValueError, OSError):
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def _reply(pipe: int, answer: dict) -> None:
  text = json.dumps(answer).encode()
  data = struct.pack('<I', len(text)) + text
  while data:
    data = data[os.write(pipe, data) :]
