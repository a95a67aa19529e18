"""Who the other processes are, and how one of them ends."""

import socket
import subprocess
import sys
import time

import jax
import pytest

from vssl_jax.utils import distributed

PROGRAM = """
import sys
import jax
from jax.experimental import multihost_utils
from vssl_jax.utils import distributed

port, index, how = sys.argv[1:]

def main():
  distributed.join({
    'JAX_COORDINATOR_ADDRESS': '127.0.0.1:' + port,
    'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': index,
  })
  multihost_utils.sync_global_devices('together')
  if index == '1' and how == 'raises':
    raise KeyError('no such thing')
  if index == '1' and how == 'returns':
    distributed.print_error('what was expected')
    return 1
  multihost_utils.sync_global_devices('for ever, or the end')
  return 143

distributed.end(main, (0, 143), lambda: how == 'busy')
"""


def _pair(how, program=PROGRAM):
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = str(s.getsockname()[1])
  return [
    subprocess.Popen(
      [sys.executable, '-c', program, port, str(index), how],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(2)
  ]


def test_ctrl_c_outside_of_training_is_one_line():
  program = """
import os, signal, time
from vssl_jax.utils import distributed

def main():
  os.kill(os.getpid(), signal.SIGINT)
  time.sleep(60)

distributed.end(main, (0,))
"""
  ended = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, check=False
  )
  assert ended.returncode == 130
  assert ended.stderr == (
    'error: interrupted by Ctrl-C; the same command starts again\n'
  )


@pytest.mark.parametrize(
  'how, wanted',
  [
    ('raises', "error: process 1 of 2: KeyError: 'no such thing'"),
    ('returns', 'error: process 1 of 2: what was expected'),
  ],
)
def test_a_process_that_fails_waits_for_nobody(how, wanted):
  first, second = _pair(how)
  start = time.monotonic()
  said = second.communicate(timeout=200)[0]
  # Python's way out waits 300 s for the first, which waits for the second.
  assert time.monotonic() - start < 150
  assert second.returncode == 1, said
  assert said.strip().splitlines()[-1] == wanted
  first.kill()  # as a launcher does
  first.communicate()


@pytest.mark.parametrize('how', ['no failure', 'busy'])
def test_processes_that_were_preempted_end_together(how):
  for process in _pair(how):
    said = process.communicate(timeout=200)[0]
    assert process.returncode == 143, said


BUSY = """
import signal, sys, threading, time
from vssl_jax.utils import distributed

def main():
  threading.Thread(target=time.sleep, args=(200,)).start()
  print('on the way', flush=True)
  how = sys.argv[1]
  # A shell starts what runs in the background deaf to Ctrl-C.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  if how == 'raises':
    raise KeyError('no such thing')
  if how == 'interrupted':
    signal.raise_signal(signal.SIGINT)
  return int(how)

distributed.end(main, (0, 143), lambda: threading.active_count() > 1)
"""


@pytest.mark.parametrize(
  'how, status', [('0', 0), ('143', 143), ('raises', 1), ('interrupted', 130)]
)
def test_threads_at_work_hold_nobody_up(how, status):
  """And they change no exit status."""
  ended = subprocess.run(
    [sys.executable, '-c', BUSY, how],
    capture_output=True,
    text=True,
    timeout=150,
    check=False,
  )
  assert ended.returncode == status, ended.stderr
  assert ended.stdout == 'on the way\n'
  assert ('KeyError' in ended.stderr) == (how == 'raises')


@pytest.mark.parametrize(
  'env, wanted',
  [
    ({}, False),
    # sbatch's own shell, and an allocation without srun.
    ({'SLURM_NTASKS': '8', 'SLURM_PROCID': '0'}, False),
    ({'SLURM_NTASKS': '1', 'SLURM_STEP_NUM_TASKS': '1'}, False),
    ({'SLURM_NTASKS': '8', 'SLURM_STEP_NUM_TASKS': '8'}, True),
    ({'TPU_WORKER_HOSTNAMES': 'localhost'}, False),
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, True),
    ({'TPU_PROCESS_ADDRESSES': 'a:1,b:1'}, True),
    ({'TPU_WORKER_HOSTNAMES': 'a', 'MEGASCALE_NUM_SLICES': '2'}, True),
    ({'OMPI_COMM_WORLD_SIZE': '1'}, False),
    ({'OMPI_COMM_WORLD_SIZE': '2'}, True),
    # A pod of Kubernetes is alone, unless told.
    ({'KUBERNETES_SERVICE_HOST': '10.0.0.1'}, False),
  ],
)
def test_a_cluster_is_detected_by_its_launcher(env, wanted, monkeypatch):
  asked = []
  monkeypatch.setattr(jax.distributed, 'initialize', lambda: asked.append(1))
  assert distributed.detected(env) == wanted
  distributed.join(env)
  assert bool(asked) == wanted
  distributed.join(env | {'VSSL_CLUSTER': '0'})
  assert bool(asked) == wanted
  distributed.join(env | {'VSSL_CLUSTER': '1'})
  assert len(asked) == wanted + 1


@pytest.mark.parametrize(
  'env, wanted',
  [
    ({'VSSL_CLUSTER': 'yes'}, "found 'yes', wanted 0 or 1"),
    ({'JAX_COORDINATOR_ADDRESS': 'a:1'}, 'JAX_NUM_PROCESSES.*are not'),
  ],
)
def test_half_a_cluster_is_refused(env, wanted):
  with pytest.raises(ValueError, match=wanted):
    distributed.join(env)


def test_a_cluster_that_is_nowhere_is_refused():
  # In a process of its own: JAX asks for others before it is first used.
  ended = subprocess.run(
    [sys.executable, '-c', ALONE], capture_output=True, text=True, check=False
  )
  assert ended.returncode == 1
  assert 'VSSL_CLUSTER=0 to run alone' in ended.stderr


ALONE = """
from vssl_jax.utils import distributed
distributed.join({'VSSL_CLUSTER': '1'})
"""


LATE = """
import sys, time
import jax
from vssl_jax import sharding
from vssl_jax.utils import distributed

port, index, data = sys.argv[1:]
jax.config.update('jax_num_cpu_devices', 2)
distributed.join({
  'JAX_COORDINATOR_ADDRESS': '127.0.0.1:' + port,
  'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': index,
})
mesh = sharding.make_mesh(int(data), -1)
if index == '1':
  time.sleep(40)  # compiles, where the other found its program
batch = sharding.put_batch({'x': jax.numpy.ones(2)}, mesh)
at = sharding.replicated(mesh)
print(float(jax.jit(jax.numpy.sum, out_shardings=at)(batch['x'])), flush=True)
jax.distributed.shutdown()
"""


@pytest.mark.slow
@pytest.mark.parametrize('data', ['1', '2'])
def test_a_process_that_comes_late_is_waited_for(data):
  """CPUs give up on each other after 30 s where they have not met before."""
  pair = _pair(data, LATE)
  for process in pair:
    said = process.communicate(timeout=250)[0]
    assert process.returncode == 0 and '4.0' in said, said
