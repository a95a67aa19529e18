"""The inside of a child process of `contain`: limits, then questions."""

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

from vssl_jax.data import decode

_PR_SET_PDEATHSIG = 1

Answer = Callable[[dict[str, Any], bytes, np.ndarray], dict[str, Any]]


def settings() -> dict[str, Any]:
  """What the parent passed."""
  return json.loads(sys.argv[1])


def run(answer: Answer) -> None:
  """Answers until the parent closes its pipe.

  Args:
    answer: maps (request, content, shared uint8 memory) to JSON.
  """
  given = settings()
  end_with(given['parent'])
  memory = np.frombuffer(mmap.mmap(given['memory'], 0), np.uint8)
  requests = os.fdopen(given['request'], 'rb')
  limit(given['memory_limit_mb'])
  # The parent kills a child that is late. Should the parent be gone, the
  # alarm does, whatever the decoder is busy with.
  signal.signal(signal.SIGALRM, signal.SIG_DFL)
  # A signal to all processes of a job: the parent decides, and kills.
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  _reply(given['reply'], {})
  while head := requests.read(4):
    request = json.loads(requests.read(struct.unpack('<I', head)[0]))
    content = requests.read(request['bytes'])
    signal.alarm(int(given['deadline_s']) + 5)
    reply = attempt(answer, request, content, memory)
    signal.alarm(0)
    _reply(given['reply'], reply)


def end_with(parent: int) -> None:
  """Ends this process when its parent ends, at once on Linux.

  Elsewhere a child ends when it next reads from its pipe.

  Args:
    parent: number of the process that started this one.
  """
  with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
  if os.getppid() != parent:
    os._exit(1)


def attempt(
  answer: Answer, request: dict[str, Any], content: bytes, memory: np.ndarray
) -> dict[str, Any]:
  """An answer; or reason and detail; or bug, with a traceback."""
  try:
    return answer(request, content, memory)
  except decode.VideoError as error:
    return {'reason': error.reason, 'detail': error.detail}
  except MemoryError:
    return {'reason': 'memory', 'detail': 'the reader may not use more'}
  except Exception:
    return {'bug': traceback.format_exc()[-10_000:]}


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


def _reply(pipe: int, answer: dict[str, Any]) -> None:
  text = json.dumps(answer).encode()
  data = struct.pack('<I', len(text)) + text
  while data:
    data = data[os.write(pipe, data) :]
