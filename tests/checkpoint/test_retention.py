"""What is kept for good, and that nothing needed later is left out."""

import re
import shutil

import pytest

from tests.train import small_runs, toy
from vssl_jax import encoder, trees
from vssl_jax.checkpoint import integrity, retention
from vssl_jax.methods import phase
from vssl_jax.train import loop, phase_setup, rewind
from vssl_jax.train import run as run_lib

SLOW = pytest.mark.slow


def _plan():
  """The last phase learns from the first, past another."""
  teacher = {'first': phase.Teacher(toy.Mean(), phase.FromPhase('first'))}
  average = {'mean': phase.Ema('encoder', (0.9, 1.0))}
  return (
    toy.phase(name='first', steps=2, ema=average),
    toy.phase(name='second', steps=2),
    toy.phase(name='third', steps=2, teachers=teacher),
  )


@pytest.mark.parametrize(
  ('patterns', 'kept'),
  [
    (('.*',), ['first', 'second', 'third']),
    ((), ['first', 'third']),
    (('sec.*',), ['first', 'second', 'third']),
    (('fir.*', 'third'), ['first', 'third']),
  ],
)
def test_what_a_plan_needs_is_kept_whatever_is_asked_for(patterns, kept):
  assert list(retention.phases(patterns, _plan())) == kept


def test_what_starts_another_phase_is_kept_and_averages_are_no_phases():
  teacher = {'mean': phase.Teacher(toy.Mean(), phase.FromEma('first'))}
  average = {'first': phase.Ema('encoder', (0.9, 1.0))}
  plan = [
    toy.phase(name='first'),
    toy.phase(name='second'),
    toy.phase(name='third', init_from={'encoder': phase.FromPhase('second')}),
    toy.phase(name='fourth', teachers=teacher, ema=average),
  ]
  assert retention.phases((), plan) == ('second', 'fourth')


@pytest.mark.parametrize(
  ('pattern', 'message'),
  [
    ('secnd', r"'secnd' matches none of .*second.*; did you mean 'second'\?"),
    ('sec', r"keep_phases: 'sec' matches none"),  # whole names
    ('lock_.*', r'matches none of the phases first, second, third$'),
  ],
)
def test_a_pattern_that_matches_nothing_is_an_error(pattern, message):
  with pytest.raises(ValueError, match=message):
    retention.phases(('.*', pattern), _plan())


def _params(config):
  found = integrity.listing(config.workdir, ('params',))
  assert not any(integrity.damage(s) for s in found)
  return {s.phase: s.step for s in found}


def _end(config):
  states = integrity.listing(config.workdir, ('checkpoints',))
  last = max(states, key=lambda s: s.step)
  return last.step, {k: v['sum'] for k, v in last.manifest['leaves'].items()}


@pytest.fixture(scope='module')
def lean(clips, tmp_path_factory):
  """A run that was asked to keep no phase, all of its states beside."""
  config = small_runs.tiny_config(
    clips, tmp_path_factory.mktemp('lean') / 'run'
  )
  config.checkpoint.update(dict(every=1, keep=100, keep_phases=()))
  config.optim.warmup = 0
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(run_lib.methods, 'build', lambda *_: _plan())
    assert loop.train(config) == 0
    yield config


def _copy(config, folder, after=None):
  """A copy of the run, cut off after a step."""
  config = config.copy_and_resolve_references()
  shutil.copytree(config.workdir, folder / 'run')
  config.workdir = str(folder / 'run')
  for saved in integrity.listing(config.workdir):
    if after is not None and saved.step > after:
      integrity.path_of(saved.path).unlink()
      shutil.rmtree(saved.path)
  return config


def test_the_others_are_not_written(lean):
  assert _params(lean) == {'first': 2, 'third': 6}
  assert encoder.parts(lean.workdir)[:2] == ('first', 'first/mean')


@pytest.mark.parametrize('after', [3, 4, pytest.param(2, marks=SLOW)])
def test_a_run_that_was_stopped_finds_its_teacher(lean, tmp_path, after):
  """In the phase that keeps nothing, and at both its boundaries."""
  config = _copy(lean, tmp_path, after)
  assert loop.train(config) == 0
  assert _end(config) == _end(lean)
  assert _params(config) == {'first': 2, 'third': 6}


@pytest.mark.parametrize(
  'step', [4, pytest.param(2, marks=SLOW), pytest.param(6, marks=SLOW)]
)
def test_a_run_that_is_taken_back_finds_its_teacher(lean, tmp_path, step):
  """Also to before the teacher was done."""
  config = _copy(lean, tmp_path)
  assert loop.train(config, rewind.Rewind(step, 0)) == 0
  assert _end(config) == _end(lean)
  assert _params(config) == {'first': 2, 'third': 6}


def test_a_resumed_run_may_ask_for_more(lean, tmp_path):
  config = _copy(lean, tmp_path, 3)
  config.checkpoint.keep_phases = ('second',)
  assert loop.train(config) == 0
  assert _params(config) == {'first': 2, 'second': 4, 'third': 6}


def test_an_encoder_that_was_not_kept_is_said_to_be_missing(lean, tmp_path):
  config = _copy(lean, tmp_path)
  states = integrity.listing(config.workdir, ('checkpoints',))
  for saved in states:
    if saved.phase == 'second':
      integrity.path_of(saved.path).unlink()
  assert set(encoder.parts(config.workdir)) == {'first', 'first/mean', 'third'}
  with pytest.raises(
    ValueError,
    match=r"checkpoint of phase 'second'.* \['first', 'third'\]",
  ):
    encoder.find(f'{config.workdir}@second')


@pytest.mark.parametrize(
  ('settings', 'states'),
  [
    (dict(keep=3), 3),
    (dict(keep=0), 1),
    # Of the states after 2, 4 and 6 steps, that after 6 is one in three.
    (dict(keep=1, every=2, keep_every=3), 2),
  ],
)
def test_the_plan_counts_what_may_lie_on_disk(
  lean, monkeypatch, settings, states
):
  config = lean.copy_and_resolve_references()
  config.checkpoint.update(settings)
  phases = _plan()
  shapes = [
    phase_setup.build(config, span, (4, 16, 16, 3)).state
    for span in run_lib.spans(phases)
  ]
  monkeypatch.setattr(retention, 'GIB', 1)
  told = retention.describe(config, phases, shapes)
  state = trees.nbytes(shapes[0])  # with an average
  params = trees.nbytes(shapes[0].params) + trees.nbytes(shapes[0].ema)
  assert told.startswith(f'on disk: {states} complete states of {state}.00 GiB')
  assert 'at the end of first, third (checkpoint.keep_phases)' in told
  total = float(re.search(r'at most ([\d.]+) GiB', told)[1])
  assert total == (states + 1) * state + 2 * params
