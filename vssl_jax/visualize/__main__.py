"""`python -m vssl_jax.visualize <run folder>`: writes the report of a run."""

import argparse
import sys
from collections.abc import Sequence

from vssl_jax.checkpoint import manager
from vssl_jax.visualize import report


def run(argv: Sequence[str] | None = None) -> int:
  """Writes the report and returns the program's exit status."""
  parser = argparse.ArgumentParser(
    prog='python -m vssl_jax.visualize',
    description='Writes <run folder>/report/index.html: curves, masks, '
    'reconstructions and features of a run.',
    allow_abbrev=False,
  )
  parser.add_argument('folder', help="a run's folder")
  parser.add_argument(
    'others', nargs='*', help='more runs, whose curves are drawn too'
  )
  parser.add_argument('--clips', type=int, default=3, help='clips to draw')
  args = parser.parse_args(sys.argv[1:] if argv is None else argv)
  try:
    print(report.write(args.folder, args.others, args.clips))
  except (ValueError, OSError, manager.CheckpointError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(run())
