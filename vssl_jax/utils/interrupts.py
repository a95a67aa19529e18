"""Handles Ctrl-C: ends a program at any time with one line and status 130.

Only the standard library is imported, so that a program can call this before
the imports that take seconds.
"""

import os
import signal
import threading
import time
from typing import Any, NoReturn

INTERRUPTED = 128 + signal.SIGINT
MESSAGE = 'interrupted by Ctrl-C; the same command starts again'
GRACE_S = 10.0  # seconds for cleanup before exit


def leave_at_once() -> None:
  """Makes Ctrl-C exit immediately; for use while there is nothing to close.

  If SIGINT is ignored, as in background processes of a shell, it stays ignored.
  """
  _handle(lambda *_: _leave())


def raise_and_leave() -> None:
  """Makes Ctrl-C raise KeyboardInterrupt and exit `GRACE_S` seconds later.

  The exit is needed because Python drops exceptions that are raised inside
  callbacks, such as JAX's garbage-collector callback.
  """

  def interrupt(*_: Any) -> NoReturn:
    threading.Thread(target=_leave_later, daemon=True).start()
    raise KeyboardInterrupt

  _handle(interrupt)


def _handle(handler: Any) -> None:
  if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, handler)


def _leave_later() -> None:
  time.sleep(GRACE_S)
  _leave()


def _leave() -> NoReturn:
  os.write(2, f'error: {MESSAGE}\n'.encode())
  os._exit(INTERRUPTED)
