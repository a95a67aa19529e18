"""Command-line entry point of all jobs: flags -> config -> job.

    python -m vssl_jax.main                                  the demo
    python -m vssl_jax.main --config=configs/salt.py:L --config.data.source=...
    python -m vssl_jax.main --config=configs/salt.py:L --plan
    python -m vssl_jax.main --config=configs/salt.py:L --rewind=12340 --skip=99
    python -m vssl_jax.main --config=configs/salt.py:L --replay

This file is short on purpose: jobs are importable functions, so that a notebook
can call them.
"""

import argparse
import functools
import logging as logging_lib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from vssl_jax.utils import interrupts

if __name__ == '__main__':
  interrupts.leave_at_once()  # the imports below take seconds

import jax
import ml_collections
from absl import logging

from vssl_jax import config as config_lib
from vssl_jax import demo
from vssl_jax.checkpoint import workdir
from vssl_jax.evals import feature_memory
from vssl_jax.evals.depth import job as depth_job
from vssl_jax.evals.finetune import job as finetune_job
from vssl_jax.evals.probe import job as evaluation
from vssl_jax.planning import evaluations, report
from vssl_jax.train import compile_ahead, loop, replay, rewind
from vssl_jax.utils import config_io, distributed
from vssl_jax.utils import flags as flags_lib
from vssl_jax.visualize import mask_pictures, weight_drift


def _train(config: ml_collections.ConfigDict, **kwargs: Any) -> int:
  """Pretrains; if complete, saves pictures of masks and of weight drift."""
  status = loop.train(config, defaults=config_lib.defaults(config), **kwargs)
  if not status:
    weight_drift.save_in(config.workdir)
    mask_pictures.save_in(config.workdir)
  return status


def _finetune(config: ml_collections.ConfigDict) -> int:
  """Fine-tunes an encoder."""
  return finetune_job.run(config, config_lib.defaults(config))


Job = Callable[..., int]
JOBS: dict[str, Job] = {
  'train': _train,
  'probe': evaluation.run,
  'depth': depth_job.run,
  'finetune': _finetune,
  'demo': demo.run,
}
# Job -> keys to change if memory runs out.
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
  'train': report.describe,
  'probe': evaluations.probe,
  'depth': evaluations.depth,
  'finetune': evaluations.finetune,
  'demo': report.describe,
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one job and returns its exit status.

  Args:
    argv: command line without the program's name; None: `sys.argv[1:]`.
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
    distributed.join(os.environ)
    job = _job(config, args)
  except (OSError, ValueError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  if jax.process_index() == 0:
    base = config_lib.default(config.method.name)
    print(config_io.describe(config, base), flush=True)
  try:
    # A replay only reads, so it can use the folder of an active run.
    with workdir.hold(config.workdir, read_only=args.replay is not None):
      return job(config)
  except OSError as error:
    distributed.print_error(workdir.describe(error))
  except loop.EXPECTED as error:
    distributed.print_error(error)
  except (MemoryError, jax.errors.JaxRuntimeError) as error:
    if not feature_memory.is_exhausted(error):
      raise
    reason = str(error).strip().partition('\n')[0]
    distributed.print_error(
      f'out of memory ({reason}); wanted {SMALLER[config.job]}'
    )
  return 1


def resolve(
  page: str, assignments: Sequence[str], roots: tuple[str, ...] = ()
) -> ml_collections.ConfigDict:
  """Loads a config page and applies the command line.

  Args:
    page: `configs/x.py:variant`; '' for the demo.
    assignments: `key.sub=value`, such as `optim.lr=1e-3`.
    roots: additional allowed folders for pages.

  Raises:
    ValueError: an invalid page, key or value.
  """
  if page:
    return config_lib.resolve(page, assignments, roots)
  return config_lib.complete('demo', demo.get_config(), assignments)


def _job(config: ml_collections.ConfigDict, args: argparse.Namespace) -> Job:
  """Selects the function that runs a config, by its job and the flags.

  Raises:
    ValueError: incompatible flags.
  """
  job = JOBS[config.job]
  if args.skip is not None and args.rewind is None:
    raise ValueError('--skip: wanted --rewind=<step> together with it')
  if args.rewind is None and args.replay is None:
    return job
  if config.job not in ('train', 'demo'):
    raise ValueError(
      f'--rewind, --replay: found config.job {config.job!r}, wanted a '
      'pretraining'
    )
  if args.replay is not None:
    if args.rewind is not None:
      raise ValueError(
        '--replay: found --rewind together with it, wanted one of them'
      )
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
    '--rewind',
    type=int,
    metavar='STEP',
    help='go back to the newest checkpoint from before this step of the log, '
    'leave out its batch, and continue',
  )
  parser.add_argument(
    '--skip',
    type=int,
    metavar='N',
    help='batches that --rewind leaves out, from its step on; 1 if not given, '
    '0 to repeat the same ones',
  )
  parser.add_argument(
    '--replay',
    type=int,
    nargs='?',
    const=0,
    metavar='STEP',
    help='replay a recorded step of the run, the newest if none is named, and '
    'compare every bit; status 1 if one differs',
  )
  return flags_lib.parse(parser, argv)


class _Printer(logging_lib.Handler):
  """Log handler that prints warnings to stderr and other records to stdout."""

  def emit(self, record: logging_lib.LogRecord) -> None:
    """Prints a record."""
    warns = record.levelno >= logging_lib.WARNING
    stream = sys.stderr if warns else sys.stdout
    print(self.format(record), file=stream, flush=True)


def _print_log() -> None:
  """Prints the log of the package, such as which weights were loaded."""
  logger = logging_lib.getLogger('vssl_jax')
  if not any(isinstance(x, _Printer) for x in logger.handlers):
    logger.addHandler(_Printer())
    logger.setLevel(logging_lib.INFO)


def _keep_compiled_programs() -> None:
  """Enables the persistent compilation cache unless the user has set one."""
  if not jax.config.jax_compilation_cache_dir:
    home = os.environ.get('XDG_CACHE_HOME', os.path.expanduser('~/.cache'))
    jax.config.update(
      'jax_compilation_cache_dir', os.path.join(home, 'vssl_jax', 'compiled')
    )


def run() -> None:
  """Runs `main` as a program."""
  interrupts.raise_and_leave()
  workdir.quiet_libraries()
  # Background compilations for phases that will not run are not awaited.
  orderly = 0, loop.PREEMPTED, loop.INTERRUPTED
  distributed.end(main, orderly, compile_ahead.busy)


if __name__ == '__main__':
  run()
