"""Several processes that are one job: who the others are, and how one ends.

JAX joins them where a launcher is detected or the user asks for it, never
because a library could: a wrong guess would wait minutes for nobody.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping

import jax

INTERRUPTED = 128 + signal.SIGINT
ADDRESS = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')


def join(env: Mapping[str, str]) -> None:
  """Joins the other processes, where there are any; never guesses a port.

  Args:
    env: the environment. `VSSL_CLUSTER=1` asks for what JAX finds out by
      itself, which TPU VMs need; 0 forbids it. An address names the first
      process.

  Raises:
    ValueError: variables that do not go together, or nobody to join.
  """
  asked = env.get('VSSL_CLUSTER', '')
  if asked not in ('', '0', '1'):
    raise ValueError(f'VSSL_CLUSTER: found {asked!r}, wanted 0 or 1')
  if asked == '0':
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
  elif asked or detected(env):
    try:
      jax.distributed.initialize()
    except ValueError as error:
      raise ValueError(
        f'JAX cannot tell who the other processes are ({error}); set '
        f'{", ".join(ADDRESS)} for every process, or VSSL_CLUSTER=0 to run '
        'alone'
      ) from error


def detected(env: Mapping[str, str]) -> bool:
  """Returns whether a launcher started this process as one of several.

  Args:
    env: the environment as srun, mpirun or Kubernetes with TPUs sets it. In an
      allocation of SLURM, what is started without srun is alone.
  """
  hosts = env.get('TPU_PROCESS_ADDRESSES') or env.get('TPU_WORKER_HOSTNAMES')
  counts = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')
  return (
    ',' in (hosts or '')
    or int(env.get('MEGASCALE_NUM_SLICES') or 1) > 1
    or any(int(env.get(name, 1)) > 1 for name in counts)
  )


def say(error: object) -> None:
  """Prints what ended the run; launchers look for the first such line.

  Args:
    error: the message.
  """
  where = ''
  if jax.distributed.is_initialized():
    where = f'process {jax.process_index()} of {jax.process_count()}: '
  print(f'error: {where}{error}', file=sys.stderr, flush=True)


def end(
  main: Callable[[], int],
  orderly: tuple[int, ...],
  busy: Callable[[], bool] = lambda: False,
) -> None:
  """Runs a program and ends the process.

  A process that fails among others leaves at once. Python's way out would
  wait five minutes for them, while they wait for this one.

  Args:
    main: returns the exit status.
    orderly: statuses with which all processes end together.
    busy: whether threads are at work that nobody waits for.
  """
  interrupted = False
  try:
    status = main()
  except KeyboardInterrupt:
    # A run that trains saves, and does not come here.
    say('interrupted by Ctrl-C; the same command starts again')
    status, interrupted = INTERRUPTED, True
  except Exception as error:
    if not (jax.distributed.is_initialized() or busy()):
      raise
    traceback.print_exc()
    say(f'{type(error).__name__}: {error}')
    status = 1
  alone = interrupted or status not in orderly
  alone = alone and jax.distributed.is_initialized()
  if alone or busy():
    if not alone and jax.distributed.is_initialized():
      # Those who are a moment later must not find the first process gone.
      jax.distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
  sys.exit(status)
