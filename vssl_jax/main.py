"""The one entry for every job: flags -> config -> job.

    python -m vssl_jax.main                                  the demo
    python -m vssl_jax.main --config=configs/salt.py:L --config.data.source=...
    python -m vssl_jax.main --config=configs/salt.py:L --plan
    python -m vssl_jax.main --config=configs/salt.py:L --rewind=12340 --skip=99
    python -m vssl_jax.main --config=configs/salt.py:L --replay
    python -m vssl_jax.main --config=configs/layerlock_single_gpu.py --suggest

Short on purpose: what a job does is importable, so that a notebook can call
it.
"""

import argparse
import functools
import logging as logging_lib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
from absl import logging

from vssl_jax import cluster, demo
from vssl_jax import config as config_lib
from vssl_jax import flags as flags_lib
from vssl_jax.evals import (
  depth,
  finetune,
  finetune_start,
  memory,
  plans,
  unused,
)
from vssl_jax.evals import run as evaluation
from vssl_jax.show import drift, masks
from vssl_jax.train import (
  plan,
  precompile,
  replay,
  rewind,
  suggest,
  trainer,
  workdir,
)


def _train(config: ml_collections.ConfigDict, **kwargs: Any) -> int:
  """Pretrains; if it came to its end, draws masks and how layers moved."""
  status = suggest.train(config, **kwargs)
  if not status:
    drift.save_in(config.workdir)
    masks.save_in(config.workdir)
  return status


Job = Callable[..., int]
JOBS: dict[str, Job] = {
  'train': _train,
  'probe': evaluation.run,
  'depth': depth.run,
  'finetune': finetune.run,
  'demo': demo.run,
}
TRAIN_UNUSED = {
  'encoder': 'to start from weights, set the key init_from of a phase in '
  'config.method',
  'probe.*': 'it is of the jobs probe and depth (configs/probe_*.py)',
  'finetune.*': 'it is of the job finetune (configs/finetune_*.py)',
}
# Job -> config -> patterns of keys that the job does not read, and remedies.
UNUSED: dict[str, Callable[[ml_collections.ConfigDict], dict[str, str]]] = {
  'train': lambda config: (
    TRAIN_UNUSED
    | unused.of_data(config.data, config.data.repeats, tested=False)
  ),
  'probe': unused.probe,
  'depth': unused.depth,
  'finetune': finetune_start.unused,
  'demo': demo.unused,
}
# Job -> what to change where memory is short.
SMALLER = {
  'train': 'a smaller --config.batch_size, or a larger '
  '--config.optim.accumulate; --plan shows what fits',
  'probe': 'smaller --config.probe.batch_size and '
  '--config.probe.test_batch_size, or a larger --config.probe.groups',
  'finetune': 'a smaller --config.finetune.batch_size, or a larger '
  '--config.optim.accumulate; --plan shows what fits',
}
SMALLER |= {'depth': SMALLER['probe'], 'demo': SMALLER['train']}
Plan = Callable[[ml_collections.ConfigDict, str], str]
PLANS: dict[str, Plan] = {
  'train': plan.describe,
  'probe': plans.probe,
  'depth': plans.depth,
  'finetune': finetune.plan,
  'demo': plan.describe,
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one job and returns its exit status.

  Args:
    argv: flags without the program's name; those of the process when None.
  """
  logging.set_verbosity(logging.WARNING)
  _print_log()
  _keep_compiled_programs()
  args, assignments = flags(sys.argv[1:] if argv is None else argv)
  try:
    config = resolve(args.config, assignments, tuple(args.config_root))
    if args.plan:
      print(PLANS[config.job](config, args.plan))
      return 0
    cluster.join(os.environ)
    job = _job(config, args)
  except (OSError, ValueError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  if jax.process_index() == 0:
    base = config_lib.default(config.method.name)
    print(config_lib.describe(config, base), flush=True)
  try:
    # A replay can look at a run that goes on.
    with workdir.hold(config.workdir, read_only=args.replay is not None):
      return job(config)
  except OSError as error:
    cluster.say(workdir.describe(error))
  except trainer.EXPECTED as error:
    cluster.say(error)
  except (MemoryError, jax.errors.JaxRuntimeError) as error:
    if not memory.is_exhausted(error):
      raise
    reason = str(error).strip().partition('\n')[0]
    cluster.say(f'out of memory ({reason}); wanted {SMALLER[config.job]}')
  return 1


def resolve(
  page: str, assignments: Sequence[str], roots: tuple[str, ...] = ()
) -> ml_collections.ConfigDict:
  """Returns the config of a page with the command line's values in it.

  Args:
    page: `configs/x.py:variant`; '' for the demo.
    assignments: `optim.lr=1e-3` and the like.
    roots: further folders that pages may come from.

  Raises:
    ValueError: a page, key or value that does not fit.
  """
  if page:
    name, config = config_lib.load(page, roots)
  else:
    name, config = 'demo', demo.get_config()
  config = config_lib.override(config, list(assignments))
  config_lib.check(config)
  config_lib.refuse_unused(config.job, assignments, UNUSED[config.job](config))
  if not config.workdir:
    config.workdir = os.path.join('runs', name)
  return config


def _job(config: ml_collections.ConfigDict, args: argparse.Namespace) -> Job:
  """Returns what to do with a config.

  Raises:
    ValueError: flags that do not go together.
  """
  job = JOBS[config.job]
  if args.suggest:
    if config.job != 'train' or args.rewind is not None:
      raise ValueError(
        f'--suggest: found config.job {config.job!r}, wanted a pretraining, '
        'and no --rewind beside it'
      )
    return suggest.show
  if args.skip is not None and args.rewind is None:
    raise ValueError('--skip: wanted --rewind=<step> beside it')
  if args.rewind is None and args.replay is None:
    return job
  if config.job not in ('train', 'demo'):
    raise ValueError(
      f'--rewind, --replay: found config.job {config.job!r}, wanted a '
      'pretraining'
    )
  if args.replay is not None:
    if args.rewind is not None:
      raise ValueError('--replay: found --rewind beside it, wanted one of them')
    return functools.partial(replay.replay, step=args.replay)
  skip = 1 if args.skip is None else args.skip
  return functools.partial(job, back=rewind.Rewind(args.rewind, skip))


def flags(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
  """Splits the command line into flags and config assignments."""
  parser = flags_lib.parser(
    'python -m vssl_jax.main', 'Pretrains and measures video encoders.'
  )
  parser.add_argument(
    '--plan',
    nargs='?',
    const='shapes',
    help='print phases, sizes, FLOPs, memory and what it fits on, and exit; '
    '"phases" has a line for every phase, "compile" compiles the first and the '
    'last one for this machine, "tpu:v5p:4x4x4" for that slice of TPUs',
  )
  parser.add_argument(
    '--suggest',
    action='store_true',
    help='train for a short while, print the knobs that this decides (the lock '
    'schedule of LayerLock), and exit',
  )
  parser.add_argument(
    '--rewind',
    type=int,
    metavar='STEP',
    help='go back to the newest checkpoint from before this step of the log, '
    'leave out its batch, and go on',
  )
  parser.add_argument(
    '--skip',
    type=int,
    metavar='N',
    help='batches that --rewind leaves out, from its step on; 1 if not given, '
    '0 to take the same ones again',
  )
  parser.add_argument(
    '--replay',
    type=int,
    nargs='?',
    const=0,
    metavar='STEP',
    help='take a recorded step of the run again, the newest if none is named, '
    'and compare every bit; status 1 if one differs',
  )
  return flags_lib.parse(parser, argv)


class _Printer(logging_lib.Handler):
  """Prints notes of the package to stdout, and warnings to stderr."""

  def emit(self, record: logging_lib.LogRecord) -> None:
    """Prints a record."""
    warns = record.levelno >= logging_lib.WARNING
    out = sys.stderr if warns else sys.stdout
    print(self.format(record), file=out, flush=True)


def _print_log() -> None:
  """Prints what the package logs, such as which weights were loaded."""
  logger = logging_lib.getLogger('vssl_jax')
  if not any(isinstance(x, _Printer) for x in logger.handlers):
    logger.addHandler(_Printer())
    logger.setLevel(logging_lib.INFO)


def _keep_compiled_programs() -> None:
  """Keeps compiled steps between starts, unless the user has a place."""
  if not jax.config.jax_compilation_cache_dir:
    home = os.environ.get('XDG_CACHE_HOME', os.path.expanduser('~/.cache'))
    jax.config.update(
      'jax_compilation_cache_dir', os.path.join(home, 'vssl_jax', 'compiled')
    )


def run() -> None:
  """Runs `main` as a program."""
  workdir.quiet_libraries()
  # What is still compiled for a phase that will not come is not waited for.
  orderly = 0, trainer.PREEMPTED, trainer.INTERRUPTED
  cluster.end(main, orderly, precompile.busy)


if __name__ == '__main__':
  run()
