"""Worker processes and readers end with the process that started them."""

import errno
import os
import pathlib
import signal
import subprocess
import sys
import time
import uuid

import numpy as np
import pytest

from vssl_jax.data import loader_processes, options, pipeline
from vssl_jax.data.clips import isolated_process

MARK = 'VSSL_TEST_MARK'
TRAINER = """
import sys, time
from vssl_jax.data import options, pipeline

if __name__ == '__main__':
  config = options.default().to_dict() | dict(
    source=sys.argv[1], frames=4, stride=1, size=(16, 16), prefetch=4,
    workers=int(sys.argv[2]), decode_processes=2,
  )
  batches = pipeline.make(config, batch_size=4, seed=0).iterator()
  next(batches)
  print('ready', flush=True)
  time.sleep(600)
"""


def _processes(mark):
  """Returns the processes that have a mark in their environment."""
  found = []
  for folder in pathlib.Path('/proc').glob('[0-9]*'):
    try:
      state = (folder / 'stat').read_text().rpartition(')')[2].split()[0]
      if f'{MARK}={mark}'.encode() in (folder / 'environ').read_bytes():
        found += [int(folder.name)] if state != 'Z' else []
    except OSError:
      pass
  return found


def _blocks(process):
  return [p.name for p in loader_processes.FOLDER.glob(f'vssl_*_{process}_*')]


def _until(empty, seconds):
  end = time.monotonic() + seconds
  while empty() and time.monotonic() < end:
    time.sleep(0.05)
  return empty()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.parametrize('count, whole_group', [(0, False), (2, False), (2, 1)])
def test_a_kill_leaves_neither_processes_nor_memory(
  film, tmp_path, count, whole_group
):
  """R18. After a whole group is killed, the next start removes its blocks."""
  for i in range(4):
    film(tmp_path / 'videos' / f'{i}.mp4')
  script, mark = tmp_path / 'train.py', uuid.uuid4().hex
  script.write_text(TRAINER)
  trainer = subprocess.Popen(
    [sys.executable, script, tmp_path / 'videos', str(count)],
    env=os.environ | {MARK: mark},
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
    process_group=0,
  )
  try:
    assert 'ready\n' in trainer.stdout
    assert len(_processes(mark)) >= 2 + 2 * count
    assert bool(_blocks(trainer.pid)) == bool(count)
    kill = os.killpg if whole_group else os.kill
    kill(trainer.pid, signal.SIGKILL)
    trainer.wait()
    assert _until(lambda: _processes(mark), 5) == []
    if whole_group:  # nobody was left to do it
      assert set(_blocks(trainer.pid)) <= set(
        loader_processes.remove_abandoned()
      )
    assert _blocks(trainer.pid) == []
  finally:
    for process in _processes(mark):
      os.kill(process, signal.SIGKILL)
    trainer.stdout.close()


def test_only_blocks_of_processes_that_are_gone_are_removed():
  ended, zombie = subprocess.Popen(['true']), subprocess.Popen(['true'])
  ended.wait()
  os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
  space, names = os.stat('/proc/self/ns/pid').st_ino, {}
  for name, kept in {
    f'vssl_{space}_{ended.pid}_00ff': False,
    f'vssl_{space}_{zombie.pid}_00ff': False,  # nobody has asked for its end
    f'vssl_{space}_{os.getpid()}_00ff': True,
    f'vssl_{space + 1}_{ended.pid}_00ff': True,  # of another container
    f'vssl_{space}_{ended.pid}_mine': True,
    f'psm_{ended.pid}': True,
  }.items():
    names[loader_processes.FOLDER / name] = kept
    (loader_processes.FOLDER / name).write_bytes(b'1')
  try:
    loader_processes.remove_abandoned()
    assert {path: path.exists() for path in names} == names
  finally:
    zombie.wait()
    for path in names:
      path.unlink(missing_ok=True)


def test_signals_to_a_whole_group_harm_neither_clips_nor_files(film, tmp_path):
  """The parent saves; its readers go on and blame no file."""
  for i in range(4):
    film(tmp_path / 'videos' / f'{i}.mp4')
  config = options.default().to_dict() | dict(
    source=str(tmp_path / 'videos'), frames=4, stride=1, size=(16, 16)
  )
  config |= dict(decode_processes=1)
  clips = pipeline.make(config, batch_size=4, seed=0, folder=str(tmp_path))
  batches = clips.iterator()
  try:
    next(batches)
    (child,) = clips._loader._readers.pool.alive
    assert os.getpgid(child.process.pid) != os.getpgid(0)
    for number in (signal.SIGINT, signal.SIGTERM):
      child.process.send_signal(number)
    for _ in range(3):
      assert not next(batches)['substituted'].any()
    assert child.process.poll() is None
  finally:
    clips.close()
  assert not (tmp_path / 'bad_files.jsonl').exists()


def test_full_shared_memory_is_named_and_files_are_not_blamed(
  film, tmp_path, monkeypatch, caplog
):
  film(tmp_path / 'videos' / 'a.mp4')
  fallocate = os.posix_fallocate

  def full(file, start, size):
    if os.readlink(f'/proc/self/fd/{file}').startswith('/dev/shm'):
      raise OSError(errno.ENOSPC, 'No space left on device')
    fallocate(file, start, size)

  monkeypatch.setattr(os, 'posix_fallocate', full)
  config = options.default().to_dict() | dict(
    source=str(tmp_path / 'videos'), frames=4, stride=1, size=(16, 16)
  )
  config |= dict(decode_processes=1)
  clips = pipeline.make(config, batch_size=1, seed=0)
  batch = next(clips.iterator())
  clips.close()
  assert np.ptp(batch['video']) > 0 and not batch['substituted'].any()
  assert '/dev/shm has ' in caplog.text and '--shm-size' in caplog.text
  monkeypatch.setattr(
    isolated_process, 'SHARED_MEMORY', str(tmp_path / 'nothing')
  )
  with isolated_process._memory(9) as file:
    assert os.fstat(file.fileno()).st_size == 9


def test_workers_without_shared_memory_are_refused_with_the_size():
  with pytest.raises(ValueError, match=r'data.workers=3: .*/dev/shm, .*MiB'):
    loader_processes.check_space(2**60, 3)
  loader_processes.check_space(1, 1)
  said = 'Worker process was terminated unexpectedly with exit code -'
  assert 'shared memory is full' in str(
    loader_processes.explain(RuntimeError(said + '7'))
  )
  killed = loader_processes.explain(RuntimeError(said + '9'))
  assert isinstance(killed, ValueError)
  assert 'memory runs out' in str(killed) and 'data.workers' in str(killed)
  for text in (f'{said}11', f'{said}77', 'another'):
    other = RuntimeError(text)
    assert loader_processes.explain(other) is other
