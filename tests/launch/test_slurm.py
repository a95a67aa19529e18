"""launch/slurm.sbatch on a real cluster: two tasks, one run."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import pytest

from tests.train import small_runs, test_processes
from vssl_jax.data.tools import synthetic
from vssl_jax.utils import config_io

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Given after the settings: the second task finds no data.
BROKEN = """
import os
from tests.launch import test_slurm

def get_config(variant=''):
  c = test_slurm.read(__file__)
  if os.environ['SLURM_PROCID'] == '1':
    c.data.source = '/nowhere'
  return c
"""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def read(page):
  text = pathlib.Path(page).with_name('config.json').read_text()
  return config_io.from_json(json.loads(text))


class Cluster:
  """Submits from a clone whose environment is the one of these tests."""

  def __init__(self, folder):
    self.clone = folder / 'a clone'
    shutil.copytree(ROOT / 'launch', self.clone / 'launch')
    for name in ('pyproject.toml', 'setup.cfg'):
      shutil.copy(ROOT / name, self.clone)
    python = self.clone / '.venv/bin/python'
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    made = self._run('bash', '-c', 'source launch/setup.sh; stamp')
    (self.clone / '.venv/.vssl_made').write_text(f'{made}\ncpu\n')

  def _run(self, *words, **env):
    return subprocess.run(
      words,
      cwd=self.clone,
      env=os.environ | env,
      check=True,
      stdout=subprocess.PIPE,
      text=True,
    ).stdout.strip()

  def submit(self, page, config):
    self.log = self.clone / 'log'
    (self.clone / 'page.py').write_text(page)
    text = json.dumps(config_io.to_json(config))
    (self.clone / 'config.json').write_text(text)
    self.job = self._run(
      'sbatch', '--parsable', '--nodes=1', '--ntasks-per-node=2',
      '--gpus-per-node=0', '--time=20', '--output=log',
      'launch/slurm.sbatch', '--config=page.py',
      VSSL_ACCELERATOR='cpu', JAX_NUM_CPU_DEVICES='2',
    )  # fmt: skip

  def tell(self, *words):
    self._run(*words, self.job)

  def shown(self, key):
    return re.search(rf'\b{key}=(\S+)', self._run(
      'scontrol', 'show', 'job', self.job
    ))[1]  # fmt: skip

  def wait_for_step(self, config, step):
    metrics = pathlib.Path(config.workdir) / 'metrics.jsonl'
    for _ in range(1200):
      if metrics.exists() and f'"step": {step},' in metrics.read_text():
        return
      assert self.shown('JobState') in {'PENDING', 'RUNNING'}, self.said()
      time.sleep(0.5)
    raise AssertionError(self.said())

  def said(self):
    return self.log.read_text() if self.log.exists() else 'no log'

  def wait(self, *states):
    for _ in range(1200):
      if self.shown('JobState') in states:
        return self.said()
      time.sleep(0.5)
    raise AssertionError(self.said())


@pytest.fixture
def slurm(tmp_path):
  cluster = Cluster(tmp_path)
  yield cluster
  subprocess.run(['scancel', cluster.job], check=False)


@pytest.fixture
def config(tmp_path):
  synthetic.write(tmp_path / 'clips', clips=40, size=32, frames=8)
  c = small_runs.tiny_config(tmp_path / 'clips/train', tmp_path / 'run')
  c.method.phases = ('pixel_teacher',)
  c.method.pixel_teacher.steps = 300
  c.checkpoint.every = 1000
  return c


def test_two_tasks_are_one_run_that_goes_on_after_a_sigterm(slurm, config):
  slurm.submit(test_processes.PAGE, config)
  slurm.wait_for_step(config, 20)
  slurm.tell('scancel', '--signal=TERM')
  said = slurm.wait('PENDING')
  saved = re.search(r'^0: SIGTERM: saved step (\d+)', said, re.M)[1]
  assert 20 <= int(saved) < 300
  assert 'goes back into the queue' in said
  slurm.tell('scontrol', 'update', 'StartTime=now', 'JobId')
  said = slurm.wait('COMPLETED', 'FAILED')
  assert f'0: resumed {int(saved):08} (0 steps lost)' in said
  assert (slurm.shown('Restarts'), slurm.shown('ExitCode')) == ('1', '0:0')
  # Every step once, on the four devices of both tasks.
  losses = test_processes._losses(config.workdir)
  assert sorted(losses) == list(range(1, 301))
  assert not re.search(r'^1: pixel_teacher', said, re.M)


def test_a_task_that_fails_ends_the_job_with_its_message(slurm, config):
  slurm.submit(BROKEN, config)
  said = slurm.wait('COMPLETED', 'FAILED')
  # 137 where the other task, which waits for this one, had to be killed.
  assert slurm.shown('ExitCode') in {'1:0', '137:0'}
  wanted = 'first message: 1: error: process 1 of 2: data.source: there is noth'
  assert wanted in said, said[-3000:]


def test_a_task_that_dies_ends_the_job(slurm, config):
  config.method.pixel_teacher.steps = 100_000
  slurm.submit(test_processes.PAGE, config)
  slurm.wait_for_step(config, 5)
  for path in pathlib.Path('/proc').glob('[0-9]*'):
    try:
      env = (path / 'environ').read_bytes().split(b'\0')
      program = b'vssl_jax.main' in (path / 'cmdline').read_bytes()
    except OSError:
      continue
    wanted = {f'SLURM_JOB_ID={slurm.job}'.encode(), b'SLURM_PROCID=1'}
    if program and wanted | {b'SLURM_STEP_ID=0'} <= set(env):
      os.kill(int(path.name), 9)
  said = slurm.wait('COMPLETED', 'FAILED')
  assert slurm.shown('ExitCode') == '137:0'
  assert re.search(r'first message: srun: error: .* task 1: Killed', said)
