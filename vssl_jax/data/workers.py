"""Worker processes that load batches, and the shared memory they come through.

A worker ends with the process that started it, however that ends. The blocks
of shared memory that batches travel in carry the number of that process in
their name; those of a process that is gone are removed by its workers, or else
by the next start.
"""

import contextlib
import functools
import multiprocessing
import os
import pathlib
import re
import secrets
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import connection, shared_memory

FOLDER = pathlib.Path('/dev/shm')
MIB = 2**20
_BLOCK = re.compile(r'vssl_(\d+)_(\d+)_[0-9a-f]+')
_naming = threading.Lock()
REMEDY = (
  'Give it more (docker run --shm-size=8g; in Kubernetes an emptyDir with '
  'medium Memory at /dev/shm), or set data.workers=0, which needs little'
)


def initializer() -> Callable[[int, int], None]:
  """Returns what every worker process of this process calls first."""
  return functools.partial(_start, _owner())


def _owner() -> str:
  """Returns this process by its PID namespace and number."""
  return f'{_namespace()}_{os.getpid()}'


def _namespace() -> int:
  try:
    return os.stat('/proc/self/ns/pid').st_ino
  except OSError:
    return 0


def _start(owner: str, *_: int) -> None:
  """Makes this process a worker of another one."""
  # A signal to the whole group is for the parent, which saves and ends us.
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  if hasattr(shared_memory, '_make_filename'):
    shared_memory._make_filename = functools.partial(_block_name, owner)
  threading.Thread(target=_end_with_parent, args=[owner], daemon=True).start()


def _block_name(owner: str) -> str:
  with _naming:
    return f'/vssl_{owner}_{secrets.token_hex(4)}'


def _end_with_parent(owner: str) -> None:
  """Waits for the end of the parent process and ends this one."""
  parent = multiprocessing.parent_process()
  if parent is not None:
    connection.wait([parent.sentinel])
    _naming.acquire()  # no block is begun from here on
    time.sleep(0.1)  # one that has its name is made
    remove_abandoned(owner)
    os._exit(1)


def remove_abandoned(ending: str | None = None) -> list[str]:
  """Removes blocks of shared memory whose process is gone.

  Args:
    ending: a process, as in the names of its blocks, that counts as gone while
      it still ends.

  Returns:
    Their names.
  """
  removed = []
  for name in os.listdir(FOLDER) if FOLDER.is_dir() else ():
    match = _BLOCK.fullmatch(name)
    if not match or int(match[1]) != _namespace():
      continue
    if f'{match[1]}_{match[2]}' == ending or not _alive(int(match[2])):
      with contextlib.suppress(OSError):  # another worker is faster
        (FOLDER / name).unlink()
        removed.append(name)
  return removed


def _alive(process: int) -> bool:
  with contextlib.suppress(OSError):
    # One that has ended keeps its number until its parent has asked for it,
    # which in a container may be never.
    stat = pathlib.Path(f'/proc/{process}/stat').read_text()
    if stat.rpartition(')')[2].split()[0] in 'ZX':
      return False
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass
  return True


def check_space(batch_nbytes: int, workers: int) -> None:
  """Refuses workers whose batches cannot all be in shared memory.

  Args:
    batch_nbytes: size of a batch.
    workers: processes; each has one batch on its way at least.

  Raises:
    ValueError: with the size that is there and the remedy.
  """
  if not FOLDER.is_dir():
    return
  space = os.statvfs(FOLDER)
  free = space.f_bavail * space.f_frsize
  if free < batch_nbytes * workers:
    raise ValueError(
      f'data.workers={workers}: their batches of {batch_nbytes / MIB:.1f} MiB '
      f'each travel through {FOLDER}, which has {free / MIB:.1f} MiB free of '
      f'{space.f_blocks * space.f_frsize / MIB:.1f} MiB. {REMEDY}'
    )


def explain(error: RuntimeError) -> Exception:
  """Returns an error that says why a worker was killed, where that is known.

  Args:
    error: that Grain raised for a worker process that ended.
  """
  found = re.search(r'exit code -(\d+)', str(error))
  number = int(found[1]) if found else 0
  if number == signal.SIGKILL:
    return ValueError(
      'a worker process was killed from outside (SIGKILL), as a system or a '
      'container does that is short of memory. Give it more, or set lower '
      'data.workers, data.decode_processes or data.prefetch; the same command '
      'goes on from the newest checkpoint'
    )
  if number != signal.SIGBUS:
    return error
  space = os.statvfs(FOLDER)
  return ValueError(
    f'a worker process was ended because shared memory is full: {FOLDER} has '
    f'{space.f_blocks * space.f_frsize / MIB:.1f} MiB. {REMEDY}, or lower '
    'data.prefetch'
  )
