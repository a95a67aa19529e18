"""Command-line parsing for programs that take a config."""

import argparse
import difflib
from collections.abc import Sequence


def parser(
  program: str, description: str, *, needs_page: bool = False
) -> argparse.ArgumentParser:
  """Returns a parser with `--config`, `--workdir` and `--config_root`.

  Args:
    program: the command before the flags, for the usage message.
    description: one sentence that describes the program.
    needs_page: whether `--config` is required.
  """
  result = argparse.ArgumentParser(
    prog=program,
    description=f'{description} Every key of vssl_jax/config.py can be set as '
    '--config.<key>=<value>.',
    allow_abbrev=False,
  )
  result.add_argument(
    '--config',
    default='',
    required=needs_page,
    help='page.py or page.py:variant' + ('' if needs_page else '; else demo'),
  )
  result.add_argument(
    '--workdir', default='', help='the run folder: --config.workdir'
  )
  result.add_argument(
    '--config_root',
    action='append',
    default=[],
    help='a further folder that pages may come from (a page is code)',
  )
  return result


def parse(
  parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
  """Splits a command line into flags and config assignments.

  Exits with status 2 if a flag does not exist.

  Args:
    parser: from `parser()`, with the program's own flags added.
    argv: the command line without the program's name.

  Returns:
    The flags, and `<key>=<value>` of every `--config.<key>=<value>` or
    `--config.<key> <value>`.
  """
  args, rest = parser.parse_known_args(argv)
  flag_names = ['--help', *(f'--{name}' for name in vars(args))]
  assignments = []
  while rest:
    flag = rest.pop(0)
    if not flag.startswith('--config.'):
      near = difflib.get_close_matches(flag.partition('=')[0], flag_names, 1)
      hint = f'; did you mean {near[0]}?' if near else ''
      parser.error(f'no such flag: {flag}{hint}')
    if '=' not in flag and rest and not rest[0].startswith('--'):
      flag += '=' + rest.pop(0)
    assignments.append(flag.removeprefix('--config.'))
  if args.workdir:
    if any(x.startswith('workdir=') for x in assignments):
      parser.error(
        '--workdir: found --config.workdir together with it; give one'
      )
    assignments.append(f'workdir={args.workdir}')
  return args, assignments
