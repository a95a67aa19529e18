"""Pool of worker processes that isolate the decoding of untrusted files.

A worker process that hangs is killed after a deadline. One that aborts is
replaced. Its memory is limited. Pixels are returned through shared memory and
everything else as JSON, so that no output of a worker is executed.
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

from vssl_jax.data.clips import decode

SHARED_MEMORY = '/dev/shm'
START_S = 60.0  # time limit for the start of a worker, in seconds


class WorkerPool:
  """Pool of worker processes, one for each calling thread."""

  def __init__(
    self,
    code: str,
    settings: dict[str, Any],
    *,
    deadline_s: int | float,
    memory_limit_mb: int,
    shared: int = 0,
  ) -> None:
    """Initializes the pool. A worker starts at the first call of its thread.

    Args:
      code: Python code of a worker; it calls `process_entry.run`.
      settings: settings of the workers, passed as JSON in their only argument.
      deadline_s: seconds for one reply.
      memory_limit_mb: MiB that a worker may use beyond its size at its start.
      shared: bytes of memory that each worker shares with its parent.
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
    """Sends a request to the worker of this thread and returns its reply.

    Args:
      request: request, sent as JSON.
      content: bytes sent after the request.

    Returns:
      The reply, and the shared memory: uint8 [shared], valid until the next
      call.

    Raises:
      decode.VideoError: the worker raised it, or it timed out, died or ran out
        of memory.
      RuntimeError: the worker raised another error, or could not be started.
    """
    worker = getattr(self._mine, 'worker', None) or self._start()
    try:
      return worker.ask(request, content, self.deadline_s), worker.memory
    except decode.VideoError as error:
      if error.reason in ('timeout', 'died', 'memory'):
        self._end(worker)
      raise

  def _start(self) -> '_Child':
    worker = _Child(self._code, self._settings, self._shared)
    with self._lock:
      self.alive.append(worker)
    self._mine.worker = worker
    if self._stopped:
      self._end(worker)
      raise RuntimeError('these readers are closed')
    return worker

  def _end(self, worker: '_Child') -> None:
    self._mine.worker = None
    with self._lock:
      self.alive.remove(worker)
    worker.kill()
    worker.free()

  def stop(self) -> None:
    """Kills all workers, so that threads stop waiting for their replies."""
    self._stopped = True
    with self._lock:
      for worker in self.alive:
        worker.kill()

  def close(self) -> None:
    """Frees all workers. No thread may be in `ask` any more."""
    self.stop()
    while self.alive:
      self.alive.pop().free()


class _Child:
  """One worker process and its shared memory."""

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
        f'a video reader could not be started ({error.detail}); '
        'data.isolate=False reads in this process instead'
      ) from error

  def ask(
    self, request: dict[str, Any], content: bytes, seconds: int | float
  ) -> dict[str, Any]:
    """Sends a request and waits for the reply."""
    try:
      _send(self._request, {**request, 'bytes': len(content)}, content)
    except BrokenPipeError as error:
      raise decode.VideoError('died', self._epitaph()) from error
    reply = self._receive(seconds)
    if 'bug' in reply:
      raise RuntimeError(f'in a video reader:\n{reply["bug"]}')
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
    """Kills the worker process."""
    self.process.kill()

  def free(self) -> None:
    """Frees the pipes and the memory of a killed worker."""
    self.process.wait()
    os.close(self._request)
    os.close(self._reply)
    self.memory = None
    self._map.close()


def _memory(size: int) -> BinaryIO:
  """Opens an unnamed file, in shared memory if there is room.

  The space is allocated at once. Otherwise a full file system would kill the
  worker with SIGBUS later, which would be counted as an error of the video.

  Args:
    size: size in bytes.

  Raises:
    OSError: there is no room in shared memory or the temporary folder.
  """
  if os.access(SHARED_MEMORY, os.W_OK):
    try:
      return _allocated(SHARED_MEMORY, size)
    except OSError as error:
      space = os.statvfs(SHARED_MEMORY)
      logging.log_first_n(
        logging.WARNING,
        '%s has %.1f MiB free of %.1f, and a video reader needs %.1f (%s): '
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
  """Reads bytes from a pipe; b'' at its end, None after the deadline."""
  parts = b''
  while len(parts) < size:
    seconds_left = deadline - time.monotonic()
    if seconds_left <= 0 or not select.select([pipe], [], [], seconds_left)[0]:
      return None
    part = os.read(pipe, size - len(parts))
    if not part:
      return b''
    parts += part
  return parts
