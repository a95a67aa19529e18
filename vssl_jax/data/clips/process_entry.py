"""Main loop and resource limits of a worker process of `isolated_process`."""

import contextlib
import ctypes
import json
import mmap
import os
import resource
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from vssl_jax.data.clips import decode

_PR_SET_PDEATHSIG = 1

Answer = Callable[[dict[str, Any], bytes, np.ndarray], dict[str, Any]]


def settings() -> dict[str, Any]:
  """Returns the settings that the parent process passed."""
  return json.loads(sys.argv[1])


def run(answer: Answer) -> None:
  """Answers requests until the parent process closes its pipe.

  Args:
    answer: function of (request, content, shared uint8 memory) that returns a
      reply for JSON.
  """
  options = settings()
  end_with(options['parent'])
  memory = np.frombuffer(mmap.mmap(options['memory'], 0), np.uint8)
  requests = os.fdopen(options['request'], 'rb')
  limit(options['memory_limit_mb'])
  # The parent kills a worker that misses its deadline. If the parent is gone,
  # the alarm kills it, even inside of the decoder.
  signal.signal(signal.SIGALRM, signal.SIG_DFL)
  # Signals to all processes of a job are handled by the parent alone.
  for signal_number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signal_number, signal.SIG_IGN)
  _reply(options['reply'], {})
  while length_bytes := requests.read(4):
    request = json.loads(requests.read(struct.unpack('<I', length_bytes)[0]))
    content = requests.read(request['bytes'])
    signal.alarm(int(options['deadline_s']) + 5)
    reply = attempt(answer, request, content, memory)
    signal.alarm(0)
    _reply(options['reply'], reply)


def end_with(parent: int) -> None:
  """Makes this process exit when its parent exits, immediately on Linux.

  On other systems a worker exits when it next reads from its pipe.

  Args:
    parent: PID of the process that started this one.
  """
  with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  if os.getppid() != parent:
    os._exit(1)


def attempt(
  answer: Answer, request: dict[str, Any], content: bytes, memory: np.ndarray
) -> dict[str, Any]:
  """Returns the reply; on an error its reason and detail, or a traceback."""
  try:
    return answer(request, content, memory)
  except decode.VideoError as error:
    return {'reason': error.reason, 'detail': error.detail}
  except MemoryError:
    return {'reason': 'memory', 'detail': 'the reader may not use more'}
  except Exception:
    return {'bug': traceback.format_exc()[-10_000:]}


def limit(megabytes: int) -> None:
  """Limits the memory of this process, in MiB beyond its current size."""
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  try:
    with open('/proc/self/statm', encoding='ascii') as file:
      mapped = int(file.read().split()[0]) * resource.getpagesize()
  except OSError:
    mapped = 2**30
  size = mapped + megabytes * 2**20
  with contextlib.suppress(ValueError, OSError):
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def _reply(pipe: int, answer: dict[str, Any]) -> None:
  text = json.dumps(answer).encode()
  data = struct.pack('<I', len(text)) + text
  while data:
    data = data[os.write(pipe, data) :]
