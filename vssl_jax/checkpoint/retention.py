"""Retention: which train states and phase parameters a run keeps on disk."""

import difflib
import math
import re
from collections.abc import Sequence
from typing import Any

import ml_collections

from vssl_jax import trees
from vssl_jax.methods import phase as phase_lib

GIB = 2**30
# Longer lists of names are shortened to the first two and the last.
SHOWN = 4


def phases(
  patterns: Sequence[str], plan: Sequence[phase_lib.Phase]
) -> tuple[str, ...]:
  """Returns the phases whose parameters are saved at their end and kept.

  These always include the last phase and the phases that another one uses as a
  teacher or in `init_from`.

  Args:
    patterns: `checkpoint.keep_phases`, regular expressions of whole names.
    plan: the phases of the run.

  Raises:
    ValueError: a pattern matches no name.
  """
  names = [phase.name for phase in plan]
  for pattern in patterns:
    if not any(re.fullmatch(pattern, name) for name in names):
      near = difflib.get_close_matches(pattern, names, 1)
      raise ValueError(
        f'checkpoint.keep_phases: {pattern!r} matches none of the phases '
        f'{_few(names)}' + (f'; did you mean {near[0]!r}?' if near else '')
      )
  matched = {n for n in names if any(re.fullmatch(p, n) for p in patterns)}
  required = _taken_from(plan) | {names[-1]}
  return tuple(name for name in names if name in matched | required)


def _taken_from(plan: Sequence[phase_lib.Phase]) -> set[str]:
  """Returns the phases that other phases use as a source."""
  sources = [t.source for phase in plan for t in phase.teachers.values()]
  sources += [s for phase in plan for s in phase.init_from.values()]
  return {x.name for x in sources if isinstance(x, phase_lib.FromPhase)}


def describe(
  config: ml_collections.ConfigDict,
  plan: Sequence[phase_lib.Phase],
  states: Sequence[Any],
) -> str:
  """Returns one line on the maximum disk usage of a run.

  Args:
    config: a resolved config.
    plan: the phases of the run.
    states: shapes of the train states of some phases, with the largest.

  Raises:
    ValueError: see `phases`.
  """
  names = phases(config.checkpoint.keep_phases, plan)
  state = max(trees.nbytes(s) for s in states)
  params = max(trees.nbytes((s.params, s.ema)) for s in states)
  count = max(config.checkpoint.keep, 1)
  if config.checkpoint.keep_every:
    every = math.lcm(config.checkpoint.every, config.checkpoint.keep_every)
    count += sum(phase.steps for phase in plan) // every
  # The oldest is removed after the next one is complete.
  total = (count + 1) * state + len(names) * params
  return (
    f'on disk: {count} complete states of {state / GIB:.2f} GiB and one that '
    f'is being written, parameters at the end of {_few(names)} '
    f'(checkpoint.keep_phases), {params / GIB:.2f} GiB each; at most '
    f'{total / GIB:.1f} GiB in total'
  )


def _few(names: Sequence[str]) -> str:
  if len(names) <= SHOWN:
    return ', '.join(names)
  return f'{names[0]}, {names[1]} ... {names[-1]} ({len(names)} phases)'
