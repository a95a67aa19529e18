"""Readers of clips: this process, or child processes that may be killed.

A decoder is a hundred thousand lines of C that read what strangers wrote. In a
child it may hang (it is killed after a deadline), abort (another is started)
or want all memory (it has a limit). The frames come back through memory that
both share, everything else as JSON, so that nothing a child says is executed.
"""

import contextlib
import json
import mmap
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence

import numpy as np

from vssl_jax.data import clip as clip_lib
from vssl_jax.data import decode

# What a child runs: the package, found where this process finds it.
CHILD = 'from vssl_jax.data import reader; reader.main()'
START_S = 60.0  # a child that does not come up in this time never will


class Readers:
  """Reads clips: each thread that asks gets a child of its own."""

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
    self._spec, self._isolate = spec, isolate
    self._settings = deadline_s, memory_limit_mb
    self._mine, self._lock = threading.local(), threading.Lock()
    self._all, self._stopped = [], False

  def read(
    self, media: str | bytes, entropy: Sequence[int], out: np.ndarray
  ) -> clip_lib.Clips:
    """Reads the clips of one video.

    Args:
      media: path of a file, or a file's content.
      entropy: seeds of everything random.
      out: uint8 [clips, T, H, W, C] to write into.

    Raises:
      decode.VideoError: also with the reasons timeout, died and memory.
    """
    if not self._isolate:
      return clip_lib.read(media, self._spec, entropy, out)
    child = getattr(self._mine, 'child', None) or self._start()
    try:
      return child.read(media, entropy, out)
    except decode.VideoError as error:
      if error.reason in ('timeout', 'died', 'memory'):
        self._end(child)
      raise

  def _start(self) -> '_Child':
    child = _Child(self._spec, *self._settings)
    with self._lock:
      self._all.append(child)
    self._mine.child = child
    if self._stopped:
      self._end(child)
      raise RuntimeError('these readers are closed')
    return child

  def _end(self, child: '_Child') -> None:
    self._mine.child = None
    with self._lock:
      self._all.remove(child)
    child.kill()
    child.free()

  def stop(self) -> None:
    """Ends what the children are doing, for threads that wait for them."""
    self._stopped = True
    with self._lock:
      for child in self._all:
        child.kill()

  def close(self) -> None:
    """Frees everything; no thread may be reading any more."""
    self.stop()
    while self._all:
      self._all.pop().free()


class _Child:
  """One child process with the memory it writes frames into."""

  def __init__(
    self, spec: clip_lib.Spec, deadline_s: int | float, memory_limit_mb: int
  ) -> None:
    self._deadline = deadline_s
    shape = (spec.clips, *spec.shape)
    with tempfile.TemporaryFile(dir=_memory_folder()) as file:
      file.truncate(int(np.prod(shape)))
      self._memory = mmap.mmap(file.fileno(), 0)
      self._frames = np.frombuffer(self._memory, np.uint8).reshape(shape)
      request, self._request = os.pipe()
      self._reply, reply = os.pipe()
      settings = {
        'spec': spec.__dict__,
        'frames': file.fileno(),
        'request': request,
        'reply': reply,
        'deadline_s': deadline_s,
        'memory_limit_mb': memory_limit_mb,
      }
      self._process = subprocess.Popen(
        [sys.executable, '-P', '-c', CHILD, json.dumps(settings)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=(file.fileno(), request, reply),
        env={
          **os.environ,
          'PYTHONPATH': os.pathsep.join(filter(None, sys.path)),
        },
      )
    os.close(request)
    os.close(reply)
    try:
      self._receive(START_S, 'did not start')
    except decode.VideoError as error:
      self.kill()
      self.free()
      raise RuntimeError(
        f'a reader of videos could not be started ({error.detail}); '
        'data.isolate=False reads in this process instead'
      ) from error

  def read(
    self, media: str | bytes, entropy: Sequence[int], out: np.ndarray
  ) -> clip_lib.Clips:
    """Has the child read a video; copies its frames to `out`."""
    content = media if isinstance(media, bytes) else b''
    request = {
      'path': None if isinstance(media, bytes) else media,
      'bytes': len(content),
      'entropy': list(entropy),
    }
    try:
      _send(self._request, request, content)
    except BrokenPipeError as error:
      raise decode.VideoError('died', self._epitaph()) from error
    reply = self._receive(self._deadline, 'took')
    if 'bug' in reply:
      raise RuntimeError(f'in a reader of videos:\n{reply["bug"]}')
    if 'reason' in reply:
      raise decode.VideoError(reply['reason'], reply['detail'])
    out[...] = self._frames
    return clip_lib.Clips(
      video=out,
      crop=np.asarray(reply['crop'], np.float32),
      flipped=np.asarray(reply['flipped'], bool),
      short=bool(reply['short']),
    )

  def _receive(self, seconds: int | float, what: str) -> dict:
    deadline = time.monotonic() + seconds
    text = _take(self._reply, 4, deadline)
    if text:
      (length,) = struct.unpack('<I', text)
      text = _take(self._reply, min(length, 2**20), deadline)
    if text is None:
      raise decode.VideoError('timeout', f'{what} more than {seconds:g} s')
    if not text:
      raise decode.VideoError('died', self._epitaph())
    return json.loads(text)

  def _epitaph(self) -> str:
    code = self._process.wait()
    name = str(code)
    with contextlib.suppress(ValueError):
      name = signal.Signals(-code).name
    return f'the reader ended with {name}'

  def kill(self) -> None:
    """Ends the child at once."""
    self._process.kill()

  def free(self) -> None:
    """Gives back what a killed child held."""
    self._process.wait()
    os.close(self._request)
    os.close(self._reply)
    self._frames = None
    self._memory.close()


def _memory_folder() -> str | None:
  """A folder in memory where there is one."""
  return '/dev/shm' if os.access('/dev/shm', os.W_OK) else None


def _send(pipe: int, header: dict, content: bytes = b'') -> None:
  text = json.dumps(header).encode()
  data = memoryview(struct.pack('<I', len(text)) + text + content)
  while data:
    data = data[os.write(pipe, data) :]


def _take(pipe: int, size: int, deadline: float) -> bytes | None:
  """Reads bytes of a pipe: b'' at its end, None after the deadline."""
  parts = b''
  while len(parts) < size:
    rest = deadline - time.monotonic()
    if rest <= 0 or not select.select([pipe], [], [], rest)[0]:
      return None
    part = os.read(pipe, size - len(parts))
    if not part:
      return b''
    parts += part
  return parts
