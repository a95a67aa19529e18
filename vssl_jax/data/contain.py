"""Child processes that may be killed, for work on what strangers wrote.

A decoder is a hundred thousand lines of C. In a child it may hang (it is
killed after a deadline), abort (another is started) or want all memory (it has
a limit). Pixels come back through memory that both share, everything else as
JSON, so that nothing a child says is executed.
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
from typing import Any, BinaryIO

import numpy as np
from absl import logging

from vssl_jax.data import decode

SHARED_MEMORY = '/dev/shm'
START_S = 60.0  # a child that does not come up in this time never will


class Children:
  """Children that answer: each thread that asks gets one of its own."""

  def __init__(
    self,
    code: str,
    settings: dict[str, Any],
    *,
    deadline_s: int | float,
    memory_limit_mb: int,
    shared: int = 0,
  ) -> None:
    """Describes the children; they start when they are needed.

    Args:
      code: Python that a child runs; it calls `child.run`.
      settings: JSON that it finds in its only argument.
      deadline_s: seconds for one answer.
      memory_limit_mb: MiB that a child may use beyond its start.
      shared: bytes of memory that each child shares with its parent.
    """
    self._code, self._shared, self.deadline_s = code, shared, deadline_s
    self._settings = {
      **settings,
      'deadline_s': deadline_s,
      'memory_limit_mb': memory_limit_mb,
    }
    self._mine, self._lock = threading.local(), threading.Lock()
    self.alive, self._stopped = [], False

  def ask(
    self, request: dict[str, Any], content: bytes = b''
  ) -> tuple[dict[str, Any], np.ndarray]:
    """Has the child of this thread answer.

    Args:
      request: JSON.
      content: bytes that go with it.

    Returns:
      The answer, and the shared memory: uint8 [shared], valid until the next
      call.

    Raises:
      decode.VideoError: its own, and with the reasons timeout, died, memory.
    """
    child = getattr(self._mine, 'child', None) or self._start()
    try:
      return child.ask(request, content, self.deadline_s), child.memory
    except decode.VideoError as error:
      if error.reason in ('timeout', 'died', 'memory'):
        self._end(child)
      raise

  def _start(self) -> '_Child':
    child = _Child(self._code, self._settings, self._shared)
    with self._lock:
      self.alive.append(child)
    self._mine.child = child
    if self._stopped:
      self._end(child)
      raise RuntimeError('these readers are closed')
    return child

  def _end(self, child: '_Child') -> None:
    self._mine.child = None
    with self._lock:
      self.alive.remove(child)
    child.kill()
    child.free()

  def stop(self) -> None:
    """Ends what the children are doing, for threads that wait for them."""
    self._stopped = True
    with self._lock:
      for child in self.alive:
        child.kill()

  def close(self) -> None:
    """Frees everything; no thread may be asking any more."""
    self.stop()
    while self.alive:
      self.alive.pop().free()


class _Child:
  """One child process and the memory that it writes into."""

  def __init__(self, code: str, settings: dict[str, Any], shared: int) -> None:
    with _memory(max(shared, 1)) as file:
      self._map = mmap.mmap(file.fileno(), 0)
      self.memory = np.frombuffer(self._map, np.uint8)
      request, self._request = os.pipe()
      self._reply, reply = os.pipe()
      settings = {
        **settings,
        'memory': file.fileno(),
        'request': request,
        'reply': reply,
        'parent': os.getpid(),
      }
      paths = os.pathsep.join(filter(None, sys.path))
      self.process = subprocess.Popen(
        [sys.executable, '-P', '-c', code, json.dumps(settings)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=(file.fileno(), request, reply),
        env={**os.environ, 'PYTHONPATH': paths},
        process_group=0,  # Ctrl-C is for the parent
      )
    os.close(request)
    os.close(reply)
    try:
      self._receive(START_S)
    except decode.VideoError as error:
      self.kill()
      self.free()
      raise RuntimeError(
        f'a reader of videos could not be started ({error.detail}); '
        'data.isolate=False reads in this process instead'
      ) from error

  def ask(
    self, request: dict[str, Any], content: bytes, seconds: int | float
  ) -> dict[str, Any]:
    """Sends a request; waits for the answer."""
    try:
      _send(self._request, {**request, 'bytes': len(content)}, content)
    except BrokenPipeError as error:
      raise decode.VideoError('died', self._epitaph()) from error
    reply = self._receive(seconds)
    if 'bug' in reply:
      raise RuntimeError(f'in a reader of videos:\n{reply["bug"]}')
    if 'reason' in reply:
      raise decode.VideoError(reply['reason'], reply['detail'])
    return reply

  def _receive(self, seconds: int | float) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    text = _take(self._reply, 4, deadline)
    if text:
      (length,) = struct.unpack('<I', text)
      text = _take(self._reply, min(length, 2**20), deadline)
    if text is None:
      raise decode.VideoError('timeout', f'took more than {seconds:g} s')
    if not text:
      raise decode.VideoError('died', self._epitaph())
    return json.loads(text)

  def _epitaph(self) -> str:
    code = self.process.wait()
    name = str(code)
    with contextlib.suppress(ValueError):
      name = signal.Signals(-code).name
    return f'the reader ended with {name}'

  def kill(self) -> None:
    """Ends the child at once."""
    self.process.kill()

  def free(self) -> None:
    """Gives back what a killed child held."""
    self.process.wait()
    os.close(self._request)
    os.close(self._reply)
    self.memory = None
    self._map.close()


def _memory(size: int) -> BinaryIO:
  """Opens a file without a name, in memory where there is room for it.

  Its room is taken at once: later, a file system without room would end the
  child with SIGBUS, as if the video it reads were to blame.

  Args:
    size: bytes.

  Raises:
    OSError: no folder has room.
  """
  if os.access(SHARED_MEMORY, os.W_OK):
    try:
      return _allocated(SHARED_MEMORY, size)
    except OSError as error:
      space = os.statvfs(SHARED_MEMORY)
      logging.log_first_n(
        logging.WARNING,
        '%s has %.1f MiB free of %.1f, and a reader of videos wants %.1f (%s): '
        'clips go through files in %s, which is slower. Give it more (docker '
        'run --shm-size=8g; in Kubernetes an emptyDir with medium Memory)',
        1,
        SHARED_MEMORY,
        space.f_bavail * space.f_frsize / 2**20,
        space.f_blocks * space.f_frsize / 2**20,
        size / 2**20,
        error.strerror,
        tempfile.gettempdir(),
      )
  return _allocated(tempfile.gettempdir(), size)


def _allocated(folder: str, size: int) -> BinaryIO:
  file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 # the caller closes
  try:
    if hasattr(os, 'posix_fallocate'):
      os.posix_fallocate(file.fileno(), 0, size)
    else:
      file.truncate(size)
  except OSError:
    file.close()
    raise
  return file


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
