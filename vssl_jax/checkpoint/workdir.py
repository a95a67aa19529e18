"""Creates the run folder and locks it against other starts.

The lock is a POSIX record lock on `<workdir>/.lock`. It is released whenever
its process ends, and works over NFS and on Lustre mounted with `-o flock`. On a
file system without locks, a warning is logged and the start continues. A FUSE
mount may lock within its own host only.
"""

import contextlib
import errno
import fcntl
import json
import logging as std_logging
import os
import pathlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging

FILE = '.lock'
# Folder -> thread of this process that holds the lock; a record lock does not
# exclude other threads of its process.
_held: dict[pathlib.Path, int] = {}
_mutex = threading.Lock()


class InUseError(RuntimeError):
  """Another start uses the run folder."""


@contextlib.contextmanager
def hold(
  folder: str | os.PathLike[str], read_only: bool = False
) -> Iterator[None]:
  """Creates a run folder and locks it against other starts.

  Only the first process of a job takes the lock. The lock is reentrant within
  a thread.

  Args:
    folder: the run folder.
    read_only: nothing is written, so no lock is taken.

  Raises:
    InUseError: another start holds the lock; the message names that start.
    OSError: the folder cannot be created or written.
  """
  if read_only or jax.process_index() != 0:
    yield
    return
  path = pathlib.Path(folder)
  if path.exists() and not path.is_dir():
    raise NotADirectoryError(errno.ENOTDIR, 'is not a folder', str(path))
  path.mkdir(parents=True, exist_ok=True)
  path = path.resolve()
  thread = threading.get_ident()
  with _mutex:
    nested = path in _held
    if _held.setdefault(path, thread) != thread:
      raise InUseError(_message(path, f'process {os.getpid()}, this one,'))
  if nested:
    yield
    return
  try:
    with _locked(path):
      yield
  finally:
    del _held[path]


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
  """Holds the record lock of a folder."""
  with (folder / FILE).open('a+') as file:
    try:
      fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      if error.errno in (errno.EACCES, errno.EAGAIN):
        file.seek(0)
        raise InUseError(_message(folder, _holder(file.read()))) from None
      logging.warning(
        '%s: its file system has no locks (%s). Two starts in one folder would '
        'not notice each other: start one at a time',
        folder,
        error.strerror,
      )
    note = {
      'host': socket.gethostname(),
      'pid': os.getpid(),
      'start': time.strftime('%Y-%m-%d %H:%M:%S %z'),
    }
    file.truncate(0)
    file.write(json.dumps(note))
    file.flush()
    try:
      yield
    finally:
      with contextlib.suppress(OSError):
        file.truncate(0)


def _holder(note: str) -> str:
  """Returns a description of the lock's holder from its lock file."""
  try:
    holder = json.loads(note)
    return (
      f'process {holder["pid"]} on {holder["host"]}, started {holder["start"]},'
    )
  except (ValueError, TypeError, KeyError):
    return 'another process'


def _message(folder: pathlib.Path, holder: str) -> str:
  return (
    f'{folder}: {holder} writes in this folder. Wait for it, end it, or give '
    'another --config.workdir'
  )


# Error number of the file system -> remedy.
_REMEDIES = {
  errno.ENOSPC: 'free disk space and start again',
  errno.EDQUOT: 'free disk space and start again',
  errno.EROFS: 'give a --config.workdir that can be written',
  errno.EACCES: 'give a --config.workdir and data that you may use',
  errno.EPERM: 'give a --config.workdir and data that you may use',
  errno.ENOTDIR: 'give a folder, such as another --config.workdir',
  errno.EISDIR: 'a file of the run belongs there; move that folder away',
  errno.EEXIST: 'give a folder, such as another --config.workdir',
  errno.ENAMETOOLONG: 'give a shorter --config.workdir',
  errno.ENOENT: 'was a folder of this run removed? Start again',
}


def describe(error: OSError) -> str:
  """Returns a file-system error and its remedy as one line."""
  if not error.strerror or error.filename is None:
    return str(error)
  remedy, name = _REMEDIES.get(error.errno), error.filename
  if error.errno == errno.EISDIR:  # of a rename: the path to be replaced
    name = error.filename2 or name
  message = f'{name}: {error.strerror}'
  return f'{message}; {remedy}' if remedy else message


def quiet_libraries() -> None:
  """Suppresses tracebacks of file-system errors in libraries.

  Threads and finalizers of libraries print these errors with tracebacks; the
  last line of the program reports them anyway. Errors of Orbax are raised again
  by the saver. Errors of TensorBoard's writer concern no checkpoint.
  """
  for module, name, hidden in (
    (threading, 'excepthook', _is_refusal),
    (sys, 'unraisablehook', _is_refusal),
    (sys, 'excepthook', _is_late),
  ):
    setattr(module, name, _without(hidden, getattr(module, name)))
  # "Task exception was never retrieved", for every array of a failed save.
  std_logging.getLogger('asyncio').setLevel(std_logging.CRITICAL)
  std_logging.getLogger('absl').addFilter(
    lambda record: not (record.exc_info and 'orbax' in record.pathname)
  )


def _without(
  hidden: Callable[[Any], bool], hook: Callable[..., None]
) -> Callable[..., None]:
  """Returns a hook that ignores exceptions for which `hidden` is true."""

  def filtered(*arguments: Any) -> None:
    error = getattr(arguments[0], 'exc_value', arguments[-2:][0])
    if not hidden(error):
      hook(*arguments)

  return filtered


def _is_refusal(error: Any) -> bool:
  return isinstance(error, OSError) or _is_late(error)


def _is_late(error: Any) -> bool:
  """Returns whether an error is TensorStore's, after a save has failed."""
  return isinstance(error, RuntimeError) and 'loop is closed' in str(error)
