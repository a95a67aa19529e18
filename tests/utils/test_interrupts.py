"""Ctrl-C ends a program with one line and status 130, whenever it comes."""

import signal
import subprocess
import sys
import time

import pytest

MESSAGE = 'error: interrupted by Ctrl-C; the same command starts again\n'


@pytest.mark.parametrize('module', ['vssl_jax.main', 'vssl_jax'])
def test_while_libraries_are_imported(module):
  # -v names every import on stderr, so that the signal comes inside of one.
  with subprocess.Popen(
    [sys.executable, '-v', '-m', module, '--plan'],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  ) as program:
    for line in program.stderr:
      if line.startswith("import 'jax"):
        break
    program.send_signal(signal.SIGINT)
    rest = program.stderr.read()
  assert program.returncode == 130
  assert rest.endswith(MESSAGE)
  assert 'Traceback' not in rest


# Python prints and drops what a callback of the garbage collector raises.
LOST = """
import gc, os, signal, time
from vssl_jax.utils import interrupts

interrupts.GRACE_S = 0.1
interrupts.raise_and_leave()
def callback(phase, info):
  gc.callbacks.clear()
  os.kill(os.getpid(), signal.SIGINT)
  time.sleep(0)
gc.callbacks.append(callback)
gc.collect()
print('goes on', flush=True)
time.sleep(60)
"""


def test_where_python_drops_the_exception():
  start = time.monotonic()
  done = subprocess.run(
    [sys.executable, '-c', LOST], check=False, capture_output=True, text=True
  )
  assert done.stdout == 'goes on\n'
  assert done.returncode == 130
  assert done.stderr.endswith(MESSAGE)
  assert time.monotonic() - start < 30


def test_an_ignored_signal_stays_ignored():
  code = """
import signal
from vssl_jax.utils import interrupts

signal.signal(signal.SIGINT, signal.SIG_IGN)
interrupts.leave_at_once()
interrupts.raise_and_leave()
print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)
"""
  done = subprocess.run(
    [sys.executable, '-c', code], check=True, capture_output=True, text=True
  )
  assert done.stdout == 'True\n'
