"""Run folders: one start at a time, and what the file system refuses."""

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest

from vssl_jax import main
from vssl_jax.checkpoint import workdir

HOLDER = """
import sys
from vssl_jax.checkpoint import workdir

with workdir.hold(sys.argv[1]):
  print('held', flush=True)
  sys.stdin.read()
"""


def test_a_second_start_is_refused_until_the_first_one_ends(tmp_path):
  folder = tmp_path / 'new' / 'run'
  holder = subprocess.Popen(
    [sys.executable, '-c', HOLDER, str(folder)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    assert holder.stdout.readline() == 'held\n'
    link = tmp_path / 'link'
    link.symlink_to(folder)
    for name in (folder, link, os.path.relpath(folder)):
      with pytest.raises(workdir.InUseError) as error, workdir.hold(name):
        pass
      pattern = (
        rf'process {holder.pid} on {re.escape(socket.gethostname())}, started '
        r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}, writes in this folder'
      )
      assert re.search(pattern, str(error.value))
      assert '\n' not in str(error.value)
    with workdir.hold(folder, read_only=True), workdir.hold(tmp_path):
      pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with workdir.hold(link):  # the lock ended with its process
      pass
  finally:
    holder.kill()
    holder.communicate()


def test_a_thread_may_hold_a_folder_again_and_another_may_not(tmp_path):
  refused = []

  def other():
    try:
      with workdir.hold(tmp_path):
        pass
    except workdir.InUseError as error:
      refused.append(str(error))

  with workdir.hold(tmp_path):
    with workdir.hold(tmp_path / '.'):
      pass
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
  assert len(refused) == 1 and f'process {os.getpid()}' in refused[0]
  other()
  assert len(refused) == 1


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, caplog):
  def refuse(*_):
    raise OSError(errno.ENOLCK, 'No locks available')

  monkeypatch.setattr(fcntl, 'lockf', refuse)
  with workdir.hold(tmp_path):
    assert f'{tmp_path}: its file system has no locks' in caplog.text


@pytest.mark.parametrize('kind', ['file', 'below a file', 'long'])
def test_a_place_that_cannot_be_a_folder_is_one_line(tmp_path, kind, capsys):
  path = tmp_path / 'file'
  path.write_text('mine')
  folder = {'below a file': path / 'x', 'long': tmp_path / ('x' * 300)}
  folder = folder.get(kind, path)
  assert main.main([f'--config.workdir={folder}']) == 1
  said = capsys.readouterr().err
  assert said.startswith('error: ') and said.count('\n') == 1
  assert 'workdir' in said and str(tmp_path) in said
  assert path.read_text() == 'mine'


def test_what_a_file_system_refuses_has_a_remedy():
  for code, remedy in {
    errno.ENOSPC: 'free disk space',
    errno.EROFS: 'give a --config.workdir that can be written',
    errno.EACCES: 'that you may use',
  }.items():
    line = workdir.describe(OSError(code, os.strerror(code), '/mnt/run'))
    assert line.startswith(f'/mnt/run: {os.strerror(code)}; ')
    assert remedy in line
  assert workdir.describe(OSError('plain')) == 'plain'


@pytest.mark.parametrize('how', ['open', 'replace'])
def test_a_folder_in_the_place_of_a_file_is_named(tmp_path, how):
  folder, partial = tmp_path / 'run.json', tmp_path / 'run.partial'
  folder.mkdir()
  partial.touch()
  with pytest.raises(IsADirectoryError) as error:
    partial.replace(folder) if how == 'replace' else folder.read_bytes()
  line = workdir.describe(error.value)
  assert line.startswith(f'{folder}: Is a directory; ')
  assert 'move that folder away' in line


NOISE = """
import asyncio, errno, sys, threading
from absl import logging
from vssl_jax.checkpoint import workdir

workdir.quiet_libraries()
full = OSError(errno.ENOSPC, 'No space left on device')

def fail(error):
  raise error

def thread(error):
  thread = threading.Thread(target=fail, args=[error])
  thread.start()
  thread.join()

class Writer:
  def __del__(self):
    raise full

writer = Writer()
del writer
thread(full)
sys.excepthook(RuntimeError, RuntimeError('Event loop is closed'), None)
print('so far nothing', file=sys.stderr)
thread(KeyError('a fault of ours'))
logging.error('a line')
raise ValueError('another')
"""


def test_only_errors_of_the_file_system_lose_their_traceback():
  ended = subprocess.run(
    [sys.executable, '-c', NOISE], capture_output=True, text=True, check=False
  )
  assert ended.stderr.startswith('so far nothing\n')
  for text in ("KeyError: 'a fault of ours'", 'a line', 'ValueError: another'):
    assert text in ended.stderr
  assert ended.returncode == 1
