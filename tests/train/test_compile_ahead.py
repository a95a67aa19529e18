import dataclasses
import json
import pathlib
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train import small_runs, test_processes, toy
from vssl_jax import sharding
from vssl_jax.checkpoint import integrity
from vssl_jax.methods import phase as phase_lib
from vssl_jax.train import compile_ahead, loop
from vssl_jax.train import run as run_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unfit(toy.ToyPhase):
  """It cannot be traced; notes which thread tried."""

  threads: list = dataclasses.field(default_factory=list)

  def loss(self, params, teachers, batch, rng):
    self.threads.append(threading.current_thread().name)
    raise TypeError('no such loss')


def _teacher(source):
  return phase_lib.Teacher(toy.Mean(), source)


def _plan():
  """Phases that freeze, average, distil and begin anew."""
  average = {'mean': phase_lib.Ema('encoder', (0.9, 1.0))}
  return (
    toy.phase(name='one', steps=3),
    toy.phase(
      name='two',
      steps=2,
      frozen=('encoder/layer_0',),
      ema=average,
      teachers={'mean': _teacher(phase_lib.FromEma('mean'))},
    ),
    toy.phase(
      name='three',
      steps=2,
      carry=('example_memory',),
      teachers={'one': _teacher(phase_lib.FromPhase('one'))},
    ),
  )


@pytest.fixture
def run(tiny, tmp_path, monkeypatch):
  def run(phases, name='run', **config):
    monkeypatch.setattr(run_lib.methods, 'build', lambda *_: phases)
    tiny.workdir = str(tmp_path / name)
    tiny.optim.warmup = 0
    tiny.update(config)
    assert loop.train(tiny) == 0
    saved = integrity.listing(tiny.workdir, ('checkpoints',))
    leaves = max(saved, key=lambda s: s.step).manifest['leaves']
    return {name: leaf['sum'] for name, leaf in leaves.items()}

  return run


@pytest.mark.slow
def test_the_bits_are_the_same_and_the_switch_is_told(run, tmp_path, capsys):
  specs = {'seen': phase_lib.MemorySpec(())}
  plan = [dataclasses.replace(phase, memory_specs=specs) for phase in _plan()]
  phases = phase_lib.check(tuple(plan))
  ahead = run(phases, 'ahead')
  said = capsys.readouterr().out
  assert said.count('of which the switch waited') == 2
  assert 'failed' not in said
  assert run(phases, 'plain', compile_ahead=False) == ahead
  assert 'compiled ahead' not in capsys.readouterr().out
  assert not compile_ahead.busy()
  # Only the first phase's step is compiled while the run waits.
  text = (tmp_path / 'ahead' / 'metrics.jsonl').read_text()
  last = json.loads(text.splitlines()[-1])
  buckets = sum(v for k, v in last.items() if k.startswith('time/'))
  np.testing.assert_allclose(buckets, 1, atol=0.01)


def test_what_fails_ahead_fails_at_the_switch(run, tiny, capsys):
  """With the same error, and the phase before is whole."""
  unfit = toy.phase(Unfit, name='unfit', steps=2)
  with pytest.raises(TypeError, match='no such loss'):
    run((toy.phase(name='one', steps=3), unfit))
  assert unfit.threads == [compile_ahead.NAME, 'MainThread']
  said = capsys.readouterr().out
  assert 'phase unfit: compiling ahead failed (TypeError: no such loss)' in said
  whole = integrity.listing(tiny.workdir)
  assert {(s.step, s.phase) for s in whole} >= {(3, 'one')}


def _arguments(**changes):
  mesh = sharding.make_mesh(1, -1)
  split = jax.NamedSharding(mesh, jax.P('fsdp'))
  leaf = {'shape': (8, 4), 'dtype': jnp.float32, 'sharding': split} | changes
  return ({'w': jax.ShapeDtypeStruct(**leaf)}, {}, {})


@pytest.mark.parametrize(
  ('changes', 'fits'),
  [
    ({}, True),
    ({'shape': (8, 5)}, False),
    ({'dtype': jnp.bfloat16}, False),
    ({'sharding': jax.P()}, False),
    ({'sharding': jax.P('fsdp', None)}, True),
  ],
)
def test_programs_know_what_they_take(changes, fits):
  if 'sharding' in changes:
    mesh = sharding.make_mesh(1, -1)
    changes = {'sharding': jax.NamedSharding(mesh, changes['sharding'])}
  made = compile_ahead.Programs(None, None, _arguments(), 0.0)
  state = _arguments(**changes)[0]['w']
  array = jax.device_put(jnp.zeros(state.shape, state.dtype), state.sharding)
  assert made.takes(({'w': array}, {}, {})) == fits
  assert not made.takes(({'v': array}, {}, {}))
  assert not made.takes(({'w': array, 'v': array}, {}, {}))


def _deep(clips, workdir):
  """A run whose second step takes long to compile."""
  config = small_runs.tiny_config(clips, workdir)
  config.method.pixel_teacher.steps = 5000
  config.method.latent_student.encoder.depth = 48
  config.checkpoint.every = 5000
  return config


@pytest.mark.slow
def test_a_signal_ends_the_program_while_it_compiles(clips, tmp_path):
  """At once, with the status that says so."""
  config = _deep(clips, tmp_path / 'run')
  process = test_processes._start(tmp_path / 'a', config)
  test_processes._wait_for(config.workdir, 3)
  process.send_signal(signal.SIGTERM)
  start = time.monotonic()
  output = process.communicate(timeout=120)[0]
  assert process.returncode == loop.PREEMPTED, output[-3000:]
  assert time.monotonic() - start < 15
  assert 'SIGTERM: saved step' in output
  assert 'compil' not in output.partition('phase pixel_teacher')[2]
  assert len(integrity.listing(config.workdir)) == 1


@pytest.mark.slow
def test_an_error_ends_the_program_while_it_compiles(clips, tmp_path):
  config = _deep(clips, tmp_path / 'run')
  config.optim.update(dict(rule='sgd', lr=1e3, lr_start=1e3, warmup=0))
  config.optim.clip = 0.0
  config.optim.weight_decay = 0.0
  config.health.max_skipped = 3
  process = test_processes._start(tmp_path / 'a', config)
  output = process.communicate(timeout=240)[0]
  assert process.returncode == 1, output[-3000:]
  assert 'steps in a row had no update, up to step' in output
  assert pathlib.Path(config.workdir, 'skipped_0.jsonl').exists()
