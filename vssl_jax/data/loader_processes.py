"""Worker processes that load batches, and the shared memory of the batches.

A worker exits when the process that started it exits, for any reason. Batches
are passed in blocks of shared memory, whose names contain the PID of that
process. When the process is gone, its workers remove the blocks, or else the
next run that starts workers.
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
  """Returns the initializer for the worker processes of this process."""
  return functools.partial(_start, _owner())


def _owner() -> str:
  """Returns the identifier of this process: PID namespace and PID."""
  return f'{_namespace()}_{os.getpid()}'


def _namespace() -> int:
  try:
    return os.stat('/proc/self/ns/pid').st_ino
  except OSError:
    return 0


def _start(owner: str, *_: int) -> None:
  """Sets up signals, block names and exit of a worker process."""
  # On a signal to the group, the parent saves and then ends its workers.
  for signal_number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signal_number, signal.SIG_IGN)
  if hasattr(shared_memory, '_make_filename'):
    shared_memory._make_filename = functools.partial(_block_name, owner)
  threading.Thread(target=_end_with_parent, args=[owner], daemon=True).start()


def _block_name(owner: str) -> str:
  with _naming:
    return f'/vssl_{owner}_{secrets.token_hex(4)}'


def _end_with_parent(owner: str) -> None:
  """Exits this process when its parent process exits."""
  parent = multiprocessing.parent_process()
  if parent is not None:
    connection.wait([parent.sentinel])
    _naming.acquire()  # no further block gets a name
    time.sleep(0.1)  # until blocks that have a name are created
    remove_abandoned(owner)
    os._exit(1)


def remove_abandoned(ending: str | None = None) -> list[str]:
  """Removes blocks of shared memory whose process has exited.

  Args:
    ending: identifier of a process (see `_owner`) that counts as exited while
      it is still exiting, or None.

  Returns:
    Names of the removed blocks.
  """
  removed = []
  for name in os.listdir(FOLDER) if FOLDER.is_dir() else ():
    match = _BLOCK.fullmatch(name)
    if not match or int(match[1]) != _namespace():
      continue
    if f'{match[1]}_{match[2]}' == ending or not _alive(int(match[2])):
      with contextlib.suppress(OSError):  # another worker was faster
        (FOLDER / name).unlink()
        removed.append(name)
  return removed


def _alive(process: int) -> bool:
  with contextlib.suppress(OSError):
    # A process that has exited keeps its PID until its parent waits for it.
    # In a container that may never happen.
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
  """Checks that the shared memory has room for a batch of each worker.

  Args:
    batch_nbytes: size of a batch in bytes.
    workers: number of worker processes; each passes at least one batch.

  Raises:
    ValueError: there is less room; the message has the sizes and the remedy.
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
  """Returns an error with the cause of a killed worker process, if known.

  Args:
    error: error that Grain raised for a worker process that ended.

  Returns:
    A ValueError with cause and remedy for SIGKILL and SIGBUS, else `error`.
  """
  match = re.search(r'exit code -(\d+)', str(error))
  signal_number = int(match[1]) if match else 0
  if signal_number == signal.SIGKILL:
    return ValueError(
      'a worker process was killed from outside (SIGKILL), as a system or a '
      'container does when memory runs out. Give it more, or lower '
      'data.workers, data.decode_processes or data.prefetch; the same command '
      'resumes from the newest checkpoint'
    )
  if signal_number != signal.SIGBUS:
    return error
  space = os.statvfs(FOLDER)
  return ValueError(
    f'a worker process was ended because shared memory is full: {FOLDER} has '
    f'{space.f_blocks * space.f_frsize / MIB:.1f} MiB. {REMEDY}, or lower '
    'data.prefetch'
  )
