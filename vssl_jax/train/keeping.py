"""What a run keeps on disk: whole states, and parameters of some phases."""

import difflib
import math
import re
from collections.abc import Sequence

import ml_collections

from vssl_jax import trees
from vssl_jax.methods import base
from vssl_jax.train import step

GIB = 2**30
# More names than this are told by their first and last.
SHOWN = 4


def phases(
  patterns: Sequence[str], plan: Sequence[base.Phase]
) -> tuple[str, ...]:
  """Returns the phases whose parameters are saved at their end, and stay.

  Whatever is asked for, these are the last one and those that another phase
  takes a teacher or its first parameters from.

  Args:
    patterns: regular expressions of whole names, `checkpoint.keep_phases`.
    plan: the phases of the run.

  Raises:
    ValueError: a pattern that matches no name.
  """
  names = [phase.name for phase in plan]
  for pattern in patterns:
    if not any(re.fullmatch(pattern, name) for name in names):
      near = difflib.get_close_matches(pattern, names, 1)
      raise ValueError(
        f'checkpoint.keep_phases: {pattern!r} matches none of the phases '
        f'{_few(names)}' + (f'; did you mean {near[0]!r}?' if near else '')
      )
  asked = {n for n in names if any(re.fullmatch(p, n) for p in patterns)}
  needed = _taken_from(plan) | {names[-1]}
  return tuple(name for name in names if name in asked | needed)


def _taken_from(plan: Sequence[base.Phase]) -> set[str]:
  """Returns the phases that others of the plan name as a source."""
  sources = [t.source for phase in plan for t in phase.teachers.values()]
  sources += [s for phase in plan for s in phase.init_from.values()]
  return {source[1:] for source in sources if source.startswith('@')}


def describe(
  config: ml_collections.ConfigDict,
  plan: Sequence[base.Phase],
  states: Sequence[step.TrainState],
) -> str:
  """Returns how much disk a run needs at most, in a line.

  Args:
    config: a resolved config.
    plan: the phases of the run.
    states: shapes at some of them, the largest among them.

  Raises:
    ValueError: as `phases`.
  """
  names = phases(config.checkpoint.keep_phases, plan)
  state = max(trees.nbytes(s) for s in states)
  params = max(trees.nbytes((s.params, s.ema)) for s in states)
  count = max(config.checkpoint.keep, 1)
  if config.checkpoint.keep_every:
    every = math.lcm(config.checkpoint.every, config.checkpoint.keep_every)
    count += sum(phase.steps for phase in plan) // every
  # The oldest goes when the next one is whole.
  total = (count + 1) * state + len(names) * params
  return (
    f'on disk: {count} whole states of {state / GIB:.2f} GiB and one that is '
    f'being written, parameters at the end of {_few(names)} '
    f'(checkpoint.keep_phases), {params / GIB:.2f} GiB each; at most '
    f'{total / GIB:.1f} GiB in all'
  )


def _few(names: Sequence[str]) -> str:
  if len(names) <= SHOWN:
    return ', '.join(names)
  return f'{names[0]}, {names[1]} ... {names[-1]} ({len(names)} phases)'
