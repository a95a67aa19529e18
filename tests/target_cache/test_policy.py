"""Which targets are kept, where, and how much room they take on a device."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train import small_runs, toy
from vssl_jax.data import options
from vssl_jax.methods import phase as phase_lib
from vssl_jax.planning import memory
from vssl_jax.target_cache import policy
from vssl_jax.train import phase_setup
from vssl_jax.train import run as run_lib

VIDEO = (4, 16, 16, 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Says(toy.ToyPhase):
  """Targets are what `how` makes of the teachers' parameters and a clip."""

  how: Callable[..., Any] = None

  def targets(self, teachers, video):
    return self.how(self, teachers, video)


def _teacher(path):
  source = phase_lib.FromWeights(path)
  return phase_lib.Teacher(toy.Mean(), source, dtype='float32')


def _phase(**fields):
  wise = _teacher('somewhere')
  deaf = _teacher('elsewhere')
  return toy.phase(Says, teachers={'wise': wise, 'deaf': deaf}, **fields)


def _outline(config, how, phase=None):
  phase = dataclasses.replace(phase or _phase(), how=how)
  (span,) = run_lib.spans((phase,))
  return phase_setup.build(config, span, VIDEO, 40)


@pytest.fixture
def config(tmp_path):
  config = small_runs.tiny_config('nowhere', tmp_path / 'run')
  config.data.update(options.FIXED)
  config.optim.warmup = 0
  config.cache_targets = str(tmp_path / 'kept')
  return config


def _ask(phase, teachers, video, table=0.0):
  """A table that is added is no part of a program's text."""
  said = phase.teachers['wise'](teachers['wise'], video)
  return {'wise': said + jnp.asarray(table, jnp.float32)}


def _ask_within(phase, teachers, video, table):
  """The same, as a part of the program that is compiled alone."""
  ask = jax.jit(functools.partial(_ask, phase, table=table))
  return ask(dict(wise=teachers['wise']), video)


def _ask_twice(phase, teachers, video):
  return {n: 2 * x for n, x in _ask(phase, teachers, video).items()}


WAYS = {
  '[]': lambda teachers: teachers['wise'],
  'get': lambda teachers: teachers.get('wise'),
  'items': lambda teachers: dict(teachers.items())['wise'],
  'copy': lambda teachers: {**teachers}['wise'],
  'values': lambda teachers: tuple(teachers.values())[-1],
  'in': lambda teachers: 'wise' in teachers and teachers['wise'],
}


@pytest.mark.parametrize('way', WAYS)
def test_teachers_are_heard_however_they_are_asked(config, way):
  """The step would do without one that it needs, or keep nothing."""

  def how(phase, teachers, video):
    return {'wise': phase.teachers['wise'](WAYS[way](teachers), video)}

  shapes = _outline(config, how)
  others = set() if way in ('items', 'copy', 'values') else {'deaf'}
  assert shapes.step_teachers.keys() == others
  assert {*shapes.cached.teachers} == {'wise', 'deaf'} - others


def test_a_teacher_that_is_only_looked_for_is_heard(config):
  """Else its targets would be traced as if it were not there."""

  def how(phase, teachers, video):
    said = _ask(phase, teachers, video)['wise']
    return {'wise': said, **({'more': said} if 'deaf' in teachers else {})}

  found = _outline(config, how).cached
  assert found.shapes.keys() == {'wise', 'more'}
  assert found.teachers == ('deaf', 'wise')


@pytest.mark.parametrize('ask', [_ask, _ask_within])
def test_the_program_is_part_of_the_key_and_so_are_its_tables(config, ask):
  """And no address: two traces have one hash."""
  tables = [np.full((1, 1, 4), x, np.float32) for x in (1, 1, 2)]
  one, same, other = (functools.partial(ask, table=t) for t in tables)
  found = [_outline(config, x).cached for x in (one, same, other, _ask_twice)]
  assert found[0] == found[1]
  assert len({x.program for x in found}) == 3
  assert found[0].shapes == found[2].shapes == found[3].shapes


def test_only_phases_with_the_same_targets_share_a_folder(config):
  """Else the second would be refused when the first has been trained."""
  first, second = _phase(name='first'), _phase(name='second')
  once, again = (_outline(config, _ask, p) for p in (first, second))
  twice = _outline(config, _ask_twice, second)
  one, same, other = (
    policy.folder(config, x.span.phase, x.cached) for x in (once, again, twice)
  )
  assert one == same and one != other and one.parent == other.parent


@pytest.mark.parametrize('kept', [True, False])
def test_what_is_kept_travels_in_the_batch(config, kept):
  config.cache_targets = config.cache_targets if kept else ''
  shapes = _outline(config, _ask)
  found = memory.per_device(config, shapes, VIDEO, 1, 2)
  clip = np.zeros(VIDEO, np.uint8).nbytes
  row = np.zeros((1, 4), np.float32).nbytes if kept else 0
  assert found['batch'] == 2 * config.batch_size / 2 * (clip + row)
