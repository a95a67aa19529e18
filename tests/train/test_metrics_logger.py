import dataclasses
import pathlib

import jax.numpy as jnp
import pytest

from tests.train import toy
from vssl_jax.checkpoint import integrity
from vssl_jax.train import loop
from vssl_jax.train import run as run_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failing(toy.ToyPhase):
  """Its loss is not a number at some steps, counted from 0."""

  bad: tuple = ()

  def loss(self, params, teachers, batch, rng):
    value, aux = super().loss(params, teachers, batch, rng)
    fails = jnp.any(jnp.asarray(self.bad) == rng.step)
    return jnp.where(fails, jnp.nan, value), aux


@pytest.fixture
def run(tiny, monkeypatch):
  def run(*bad):
    phases = tuple(
      toy.phase(Failing, name=name, steps=steps, bad=bad)
      for name, steps in (('one', 4), ('two', 3))
    )
    monkeypatch.setattr(run_lib.methods, 'build', lambda *_: phases)
    tiny.optim.warmup = 0
    return loop.train(tiny)

  return run


@pytest.mark.parametrize(
  ('bad', 'share', 'message'),
  [
    ((4, 5, 6), 1.0, "phase 'two': 3 of 3 steps had no update"),
    ((4, 6), 0.5, "phase 'two': 2 of 3 .*skipped_share allows 0.5"),
    ((0, 1, 3), 0.7, "phase 'one': 3 of 4 .*skipped_share allows 0.7"),
  ],
)
def test_a_phase_that_learned_nothing_stops_the_run(
  tiny, run, bad, share, message
):
  tiny.health.skipped_share = share
  with pytest.raises(run_lib.TrainingError, match=message):
    run(*bad)
  phase = 'two' if 4 in bad else 'one'
  workdir = pathlib.Path(tiny.workdir)
  # Nothing can be taken over from it, and a restart stops there again.
  assert phase not in {s.phase for s in integrity.listing(workdir, ('params',))}
  text = (workdir / 'skipped_0.jsonl').read_text()
  assert [f'"step": {s + 1},' in text for s in bad] == [True] * len(bad)
  with pytest.raises(run_lib.TrainingError, match=message):
    run(*bad)


@pytest.mark.parametrize(
  ('bad', 'said'),
  [
    ((1, 5), ["'one': 1 of 4 steps", "'two': 1 of 3 steps"]),
    ((), []),
  ],
)
def test_some_are_said_aloud(run, bad, said, capsys):
  """Counted by phase."""
  assert run(*bad) == 0
  printed = capsys.readouterr().out
  assert printed.count('had no update; their batches') == len(said)
  for words in said:
    assert words in printed


def test_a_metric_below_its_floor_is_told_once_a_phase(
  tiny, monkeypatch, capsys
):
  tiny.log.every = 1
  alarms = {'loss': (1e9, 'too good to be true'), 'grad_norm': (-1.0, 'never')}
  phases = tuple(
    toy.phase(name=name, steps=3, alarms=alarms) for name in ('one', 'two')
  )
  monkeypatch.setattr(run_lib.methods, 'build', lambda *_: phases)
  tiny.optim.warmup = 0
  assert loop.train(tiny) == 0
  told = [x for x in capsys.readouterr().out.splitlines() if 'below' in x]
  assert [x.split(':')[0] for x in told] == ['step 1', 'step 4']
  assert all('below 1e+09: too good to be true' in x for x in told)
