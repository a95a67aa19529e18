"""Runs as separate programs: signals, and two processes that train together."""

import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.train import small_runs, toy
from vssl_jax.checkpoint import integrity, manager
from vssl_jax.train import loop, rewind
from vssl_jax.train import run as run_lib
from vssl_jax.utils import config_io

PAGE = """
import json, pathlib
from vssl_jax.utils import config_io

def get_config(variant=''):
  text = pathlib.Path(__file__).with_name('config.json').read_text()
  return config_io.from_json(json.loads(text))
"""

# Two processes on two cores that other tests use too.
pytestmark = pytest.mark.timeout(900)


def _start(folder, config, *flags, devices=1, **env):
  """Starts the program on a config."""
  folder.mkdir(exist_ok=True)
  (folder / 'page.py').write_text(PAGE)
  (folder / 'config.json').write_text(json.dumps(config_io.to_json(config)))
  env = dict(os.environ, JAX_NUM_CPU_DEVICES=str(devices), **env)
  return subprocess.Popen(
    [sys.executable, '-m', 'vssl_jax.main', '--config=page.py', *flags],
    cwd=folder,
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    process_group=0,
  )


def _finish(*processes):
  """Waits; returns the outputs. A process that fails shows its output."""
  outputs = [p.communicate(timeout=600)[0] for p in processes]
  for process, output in zip(processes, outputs, strict=True):
    assert process.returncode == 0, output[-3000:]
  return outputs


def _wait_for(workdir, step):
  """Waits until the run has logged a step."""
  path = pathlib.Path(workdir) / 'metrics.jsonl'
  for _ in range(2400):
    if path.exists() and f'"step": {step},' in path.read_text():
      return
    time.sleep(0.05)
  raise AssertionError(f'step {step} never came')


def _sums(workdir):
  states = [s for s in integrity.listing(workdir) if 'opt' in s.shapes()]
  newest = max(states, key=lambda s: s.step)
  leaves = newest.manifest['leaves']
  return newest.step, {name: leaf['sum'] for name, leaf in leaves.items()}


def _losses(workdir):
  text = (pathlib.Path(workdir) / 'metrics.jsonl').read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  return {x['step']: x['loss'] for x in lines if 'loss' in x}


def _one_phase(clips, workdir):
  """Readers and a worker, whom a signal to the group reaches too."""
  config = small_runs.tiny_config(clips, workdir)
  config.method.phases = ('pixel_teacher',)
  config.method.pixel_teacher.steps = 60
  config.checkpoint.every = 1000
  config.data.update(dict(isolate=True, workers=1))
  return config


@pytest.fixture(scope='module')
def whole(clips, tmp_path_factory):
  folder = tmp_path_factory.mktemp('whole')
  config = _one_phase(clips, folder / 'run')
  _finish(_start(folder / 'a', config))
  return _sums(config.workdir)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('number', 'status', 'line'),
  [
    (signal.SIGTERM, loop.PREEMPTED, 'SIGTERM: saved step '),
    (signal.SIGINT, loop.INTERRUPTED, 'Ctrl-C: saved step '),
  ],
)
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(
  clips, tmp_path, whole, number, status, line
):
  """The signal comes while steps are taken (R2); see also a second start."""
  cut = _one_phase(clips, tmp_path / 'cut')
  process = _start(tmp_path / 'b', cut)
  _wait_for(cut.workdir, random.Random(0).randrange(5, 30))
  if number == signal.SIGINT:
    process.send_signal(signal.SIGSTOP)
    second = _start(tmp_path / 'b', cut)  # the same command: refused
    refused = second.communicate(timeout=600)[0]
    process.send_signal(signal.SIGCONT)
    assert second.returncode == 1
    last = refused.splitlines()[-1]
    assert last.startswith(f'error: {cut.workdir}: process {process.pid} on ')
  os.killpg(process.pid, number)
  output = process.communicate(timeout=600)[0]
  assert process.returncode == status, output[-3000:]
  assert output.splitlines()[-1].startswith(line)
  assert 'Traceback' not in output
  step, _ = _sums(cut.workdir)
  # At most the steps in flight are lost; here none.
  assert max(_losses(cut.workdir)) == step < 60
  _finish(_start(tmp_path / 'b', cut))
  assert _sums(cut.workdir) == whole


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(clips, tmp_path, number):
  config = small_runs.tiny_config(clips, tmp_path / 'run')
  config.method.pixel_teacher.steps = 5000
  config.checkpoint.every = 1
  process = _start(tmp_path / 'a', config)
  _wait_for(config.workdir, 10)
  process.send_signal(number)
  process.send_signal(number)
  process.communicate(timeout=600)
  assert process.returncode in (-number, 128 + number)
  saver = manager.Checkpoints(config.workdir)
  assert saver.newest().step >= 9


def _free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def _pair(folder, config, *flags):
  """Starts two processes with two devices each."""
  address = f'127.0.0.1:{_free_port()}'
  return [
    _start(
      folder,
      config,
      *flags,
      devices=2,
      JAX_COORDINATOR_ADDRESS=address,
      JAX_NUM_PROCESSES='2',
      JAX_PROCESS_ID=str(i),
      JAX_CPU_COLLECTIVES_IMPLEMENTATION='gloo',
    )
    for i in range(2)
  ]


def _truncate(workdir, step):
  for saved in integrity.listing(workdir):
    if saved.step > step:
      shutil.rmtree(saved.path)
      saved.path.with_suffix('.json').unlink()


def _same_losses(workdir, want, steps):
  got = _losses(workdir)
  assert sorted(got) == list(steps)
  np.testing.assert_allclose(
    [got[s] for s in steps], [want[s] for s in steps], rtol=1e-5
  )


@pytest.fixture(scope='module')
def alone(clips, tmp_path_factory):
  """What one process with one device does, every second step kept."""
  folder = tmp_path_factory.mktemp('alone')
  config = small_runs.tiny_config(clips, folder / 'run')
  config.checkpoint.update(dict(every=2, keep=100))
  _finish(_start(folder / 'a', config))
  return config, _losses(config.workdir)


@pytest.mark.slow
def test_two_processes_train_and_resume_like_one(clips, tmp_path, alone):
  """Two processes with two devices each: same losses, also from a restart."""
  config = small_runs.tiny_config(clips, tmp_path / 'run')
  config.checkpoint.update(dict(every=2, keep=100))
  outputs = _finish(*_pair(tmp_path / 'a', config))
  assert 'pixel_teacher 6/6' in outputs[0]
  assert 'pixel_teacher' not in outputs[1]
  assert 'latent_student: compiled ahead' in outputs[0]
  _same_losses(config.workdir, alone[1], range(1, 13))
  _truncate(config.workdir, 8)
  (pathlib.Path(config.workdir) / 'metrics.jsonl').unlink()
  _finish(*_pair(tmp_path / 'a', config))
  _same_losses(config.workdir, alone[1], range(9, 13))


@pytest.mark.slow
@pytest.mark.parametrize('starts', [1, 2])
def test_a_run_goes_on_with_another_number_of_processes(
  clips, tmp_path, alone, starts
):
  """One process goes on from two's state, and two from one's (R5)."""
  config = small_runs.tiny_config(clips, tmp_path / 'run')
  config.checkpoint.update(dict(every=2, keep=100))

  def run(processes):
    if processes == 1:
      _finish(_start(tmp_path / 'a', config))
    else:
      _finish(*_pair(tmp_path / 'a', config))

  run(starts)
  _truncate(config.workdir, 8)
  (pathlib.Path(config.workdir) / 'metrics.jsonl').unlink()
  run(3 - starts)
  _same_losses(config.workdir, alone[1], range(9, 13))


# The same with phases that compile in no time.
TOY = (
  PAGE
  + """
from tests.train import toy
from vssl_jax.train import run

plan = toy.phase(steps=6), toy.phase(name='two', steps=6)
run.methods.build = lambda *_: plan
"""
)


@pytest.mark.optimized  # rounds as the tolerance was chosen for
@pytest.mark.slow
def test_two_processes_rewind_and_replay_like_one(clips, tmp_path, monkeypatch):
  monkeypatch.setattr(sys.modules[__name__], 'PAGE', TOY)
  one = small_runs.tiny_config(clips, tmp_path / 'one')
  two = small_runs.tiny_config(clips, tmp_path / 'two')
  for config in (one, two):
    config.checkpoint.update(dict(every=2, keep=100, record_every=2))
    config.optim.warmup = 0
  plan = toy.phase(steps=6), toy.phase(name='two', steps=6)
  monkeypatch.setattr(run_lib.methods, 'build', lambda *_: plan)
  assert loop.train(one) == 0
  before = _losses(one.workdir)
  assert loop.train(one, rewind.Rewind(4, 2)) == 0
  want = _losses(one.workdir)
  assert want[4] != before[4]
  _finish(*_pair(tmp_path / 'a', two))
  _same_losses(two.workdir, before, range(1, 13))
  outputs = _finish(*_pair(tmp_path / 'a', two, '--rewind=4', '--skip=2'))
  assert 'rewound to step 2' in outputs[0] and 'rewound' not in outputs[1]
  _same_losses(two.workdir, want, range(1, 13))
  outputs = _finish(*_pair(tmp_path / 'a', two, '--replay'))
  assert outputs[0].endswith('equal\n') and 'equal' not in outputs[1]


@pytest.mark.parametrize('bad', [dict(JAX_COORDINATOR_ADDRESS='127.0.0.1:1')])
def test_half_a_cluster_is_an_error(clips, tmp_path, bad):
  config = small_runs.tiny_config(clips, tmp_path / 'run')
  process = _start(tmp_path / 'a', config, **bad)
  output = process.communicate(timeout=600)[0]
  assert process.returncode == 2
  assert 'JAX_NUM_PROCESSES' in output


def test_errors_are_one_line_and_not_status_0(clips, tmp_path):
  config = small_runs.tiny_config(clips, tmp_path / 'run')
  config.data.source = str(tmp_path / 'nowhere')
  process = _start(tmp_path / 'a', config)
  output = process.communicate(timeout=600)[0]
  assert process.returncode == 1
  assert 'nowhere' in output
  assert 'Traceback' not in output


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(3))
def test_sigkill_at_any_moment_loses_only_unsaved_steps(clips, tmp_path, seed):
  whole = small_runs.tiny_config(clips, tmp_path / 'whole')
  cut = small_runs.tiny_config(clips, tmp_path / 'cut')
  for config in (whole, cut):
    config.method.pixel_teacher.steps = 40
    config.checkpoint.every = 3
  _finish(_start(tmp_path / 'a', whole))
  rng = random.Random(seed)
  for _ in range(3):
    process = _start(tmp_path / 'b', cut)
    time.sleep(rng.uniform(6, 14))
    process.kill()
    process.communicate()
  _finish(_start(tmp_path / 'b', cut))
  assert _sums(cut.workdir) == _sums(whole.workdir)
