"""Starts and ends the processes of a multi-process job.

`jax.distributed` is initialised only if a launcher is detected or the user
requests it: a wrong guess would wait minutes for processes that do not exist.
"""

import os
import sys
import traceback
from collections.abc import Callable, Mapping

import jax

from vssl_jax.utils import interrupts

ADDRESS = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')


def join(env: Mapping[str, str]) -> None:
  """Initialises `jax.distributed` if the job has several processes.

  Args:
    env: the environment. `VSSL_CLUSTER=1` enables JAX's automatic detection,
      which TPU VMs need; 0 disables it. `JAX_COORDINATOR_ADDRESS` is the
      address of the first process. A port is never guessed.

  Raises:
    ValueError: incompatible variables, or no other processes are detected.
  """
  cluster = env.get('VSSL_CLUSTER', '')
  if cluster not in ('', '0', '1'):
    raise ValueError(f'VSSL_CLUSTER: found {cluster!r}, wanted 0 or 1')
  if cluster == '0':
    return
  if ADDRESS[0] in env:
    missing = set(ADDRESS) - env.keys()
    if missing:
      raise ValueError(
        f'{ADDRESS[0]} is set and {sorted(missing)} are not; set them for '
        'every process, or none of the three'
      )
    address, count, index = (env[name] for name in ADDRESS)
    jax.distributed.initialize(address, int(count), int(index))
  elif cluster or detected(env):
    try:
      jax.distributed.initialize()
    except ValueError as error:
      raise ValueError(
        f'JAX cannot determine the other processes ({error}); set '
        f'{", ".join(ADDRESS)} for every process, or VSSL_CLUSTER=0 to run '
        'alone'
      ) from error


def detected(env: Mapping[str, str]) -> bool:
  """Returns whether a launcher started this process as one of several.

  Args:
    env: the environment as set by srun, mpirun or Kubernetes with TPUs. In a
      SLURM allocation, a process started without srun is a single process.
  """
  hosts = env.get('TPU_PROCESS_ADDRESSES') or env.get('TPU_WORKER_HOSTNAMES')
  counts = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')
  return (
    ',' in (hosts or '')
    or int(env.get('MEGASCALE_NUM_SLICES') or 1) > 1
    or any(int(env.get(name, 1)) > 1 for name in counts)
  )


def print_error(error: object) -> None:
  """Prints the error that ended the run; launchers search for the first one.

  Args:
    error: the message.
  """
  prefix = ''
  if jax.distributed.is_initialized():
    prefix = f'process {jax.process_index()} of {jax.process_count()}: '
  print(f'error: {prefix}{error}', file=sys.stderr, flush=True)


def end(
  main: Callable[[], int],
  orderly: tuple[int, ...],
  busy: Callable[[], bool] = lambda: False,
) -> None:
  """Runs a program and ends the process.

  If one of several processes fails, it exits immediately. A normal exit of
  Python would wait five minutes for the others, which wait for this one.

  Args:
    main: the program; returns the exit status.
    orderly: statuses with which all processes end together.
    busy: returns whether background threads are running; the process then
      exits without waiting for them.
  """
  interrupted = False
  try:
    status = main()
  except KeyboardInterrupt:
    # A training run handles the interrupt itself: it saves a checkpoint.
    print_error(interrupts.MESSAGE)
    status, interrupted = interrupts.INTERRUPTED, True
  except Exception as error:
    if not (jax.distributed.is_initialized() or busy()):
      raise
    traceback.print_exc()
    print_error(f'{type(error).__name__}: {error}')
    status = 1
  alone = interrupted or status not in orderly
  alone = alone and jax.distributed.is_initialized()
  if alone or busy():
    if not alone and jax.distributed.is_initialized():
      # Processes that end later still need the coordinator (process 0).
      jax.distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  sys.exit(status)
