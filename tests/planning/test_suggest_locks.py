"""The command that proposes a lock schedule from a short run."""

import json
import os
import shlex
import signal

import numpy as np
import pytest

from vssl_jax import main
from vssl_jax.methods import lock_schedule
from vssl_jax.planning import suggest_locks
from vssl_jax.train import loop
from vssl_jax.utils import metrics


@pytest.fixture
def locks(clips, tmp_path):
  """Flags of a LayerLock run of seconds, whose schedule is to be found."""
  page = tmp_path / 'page.py'
  page.write_text(PAGE)
  return [
    f'--config={page}',
    f'--config_root={tmp_path}',
    f'--config.workdir={tmp_path / "run"}',
    f'--config.data.source={clips}',
  ]


PAGE = """
from vssl_jax import config as config_lib

def get_config(variant=''):
  c = config_lib.default('layerlock')
  c.batch_size = 8
  c.data.frames, c.data.stride, c.data.size = 4, 1, (16, 16)
  c.data.isolate = False
  c.data.decode_processes = 1
  small = dict(size='Ti', width=16, depth=4, num_heads=2, mlp_width=32)
  c.method.encoder.update(small)
  c.method.vit.update(dict(patch=(2, 8, 8), dtype='float32'))
  c.method.decoder_blocks = 1
  c.method.masks = 'random:0.5'
  c.method.total = 30
  c.optim.update(dict(lr=1e-2, lr_batch=8, warmup=2))
  c.log.update(dict(every=10, tensorboard=False))
  c.health.update(dict(every=10.0, clips=8))
  c.checkpoint.keep_phases = ('lock_.*',)  # none of the short run's
  return c
"""


STEPS = list(range(50, 1001, 50))


def _changes(first, interval, blocks=5):
  """Block i changes much until `first + interval * i`, then little."""
  return [
    {i: 0.1 if step <= first + interval * i else 0.02 for i in range(blocks)}
    for step in STEPS
  ]


@pytest.fixture
def log(tmp_path):
  """A log in which the norms settle later than the movement does."""
  path = tmp_path / metrics.FILE
  norms = dict.fromkeys(range(5), 1.0)

  def record(step, movement):
    values = {f'norm/block_{i:02d}': x for i, x in norms.items()}
    values |= {f'drift/block_{i:02d}': x for i, x in movement.items()}
    return {'step': step, 'phase': 'pixels', **values}

  # The panel also measures early; there is nothing to compare with yet.
  records = [record(5, {})]
  pairs = zip(_changes(300, 100), _changes(200, 50), strict=True)
  for step, (norm, movement) in zip(STEPS, pairs, strict=True):
    records.append({'step': step - 1, 'loss/pixel': 0.5})
    for i, change in norm.items():
      # By turns up and down: neither direction is settled.
      norms[i] /= 1 - change if step % 100 else 1 + change
    records.append(record(step, movement))
  path.write_text(''.join(json.dumps(x) + '\n' for x in records))
  return path


# Blocks settle one measurement, 50 of 1,000 steps, after their last change.
SETTLED = {'norm': (3500, 1000), 'movement': (2500, 500)}


@pytest.mark.parametrize('criterion', suggest_locks.CRITERIA)
def test_an_order_planted_in_a_log_gives_its_schedule(log, criterion):
  steps, changes = suggest_locks.read(log, criterion)
  assert steps == STEPS[1:]  # the first interval is a shorter one
  planted = _changes(300, 100) if criterion == 'norm' else _changes(200, 50)
  for found, wanted in zip(changes, planted[1:], strict=True):
    assert found == pytest.approx(wanted)
  found = suggest_locks.propose(changes, steps, 10_000, limit=4)
  depths, lengths = zip(*found, strict=True)
  assert depths == (0, 1, 2, 3, 4)
  first, interval = SETTLED[criterion]
  assert lengths[0] == first
  assert lengths[1:4] == (interval,) * 3
  assert sum(lengths) == 10_000


def test_a_measurement_after_a_new_start_is_not_compared(log):
  """A resumed run has no earlier weights: it logs norms, and no movement."""
  records = [json.loads(line) for line in log.read_text().splitlines()]
  resumed = [
    {k: x for k, x in r.items() if r['step'] != 500 or 'drift' not in k}
    for r in records
  ]
  whole = dict(zip(*suggest_locks.read(log, 'norm'), strict=True))
  log.write_text(''.join(json.dumps(x) + '\n' for x in resumed))
  steps, changes = suggest_locks.read(log, 'norm')
  assert steps == [step for step in STEPS[1:] if step != 500]
  assert changes == [whole[step] for step in steps]


def test_blocks_that_settle_together_are_still_locked_in_turn():
  changes = [dict.fromkeys(range(3), 1 / step) for step in STEPS]
  found = suggest_locks.propose(changes, STEPS, 1000, limit=3)
  # At a tenth of the run over the blocks, for want of a slope.
  assert found == ((0, 150), (1, 33), (2, 33), (3, 784))
  with pytest.raises(ValueError, match=r'found 2 measurements.* raise --steps'):
    suggest_locks.propose(changes[:2], STEPS[:2], 1000, limit=3)


class _Stop:
  """Sends a SIGTERM after a step, as a scheduler does."""

  def due(self, done, span_start):
    return done == 12

  def look(self, run, span, state, done):
    os.kill(os.getpid(), signal.SIGTERM)
    return []


def _printed(capsys):
  """Returns the criterion and the flag of the last line that was printed."""
  line = capsys.readouterr().out.splitlines()[-1]
  by, flag = line.split(': ', 1)
  return by, *shlex.split(flag)


@pytest.mark.slow
@pytest.mark.parametrize('criterion', suggest_locks.CRITERIA)
def test_the_command_prints_what_a_resumed_run_says(
  locks, tmp_path, capsys, monkeypatch, criterion
):
  command = [*locks, '--steps=20', f'--criterion={criterion}']
  train = loop.train
  with monkeypatch.context() as patch:
    patch.setattr(loop, 'train', lambda c: train(c, hooks=[_Stop()]))
    assert suggest_locks.run(command) == loop.PREEMPTED
  assert '--config.method.schedule' not in capsys.readouterr().out
  assert suggest_locks.run(command) == 0
  by, flag = _printed(capsys)
  log = tmp_path / 'run' / 'suggest' / metrics.FILE
  steps, changes = suggest_locks.read(log, criterion)
  # Each step, but for the first ones and the one after the new start.
  assert steps == [step for step in range(3, 21) if step != 13]
  assert all(np.isfinite(list(look.values())).all() for look in changes)
  wanted = suggest_locks.propose(changes, steps, 30, limit=2)
  assert by == f'by {criterion}'
  assert flag == f'--config.method.schedule={wanted}'
  assert not (tmp_path / 'run' / 'run.json').exists()
  # Asked again, by either criterion, it does not run again.
  before = log.read_bytes()
  for other in suggest_locks.CRITERIA:
    again = [*locks, '--steps=20', f'--criterion={other}']
    assert suggest_locks.run(again) == 0
    assert _printed(capsys)[0] == f'by {other}'
  assert log.read_bytes() == before


@pytest.mark.slow
def test_a_run_takes_the_schedule_that_was_printed(locks, tmp_path, capsys):
  assert suggest_locks.run([*locks, '--steps=20']) == 0
  by, flag = _printed(capsys)
  assert by == 'by norm'
  assert main.main([*locks, flag]) == 0
  schedule = lock_schedule.parse(flag.partition('=')[2])
  assert sum(n for _, n in schedule) == 30
  folder = tmp_path / 'run'
  names = {p.name for p in (folder / 'params').iterdir() if p.is_dir()}
  assert names == {f'lock_{k:02d}' for k, _ in schedule if k}
  assert (folder / 'drift.png').exists()


@pytest.mark.parametrize(
  ('flags', 'steps', 'criterion'),
  [
    ((), 2, 'norm'),  # a twentieth of 30
    (('--steps=7', '--criterion=movement'), 7, 'movement'),
  ],
)
def test_flags_say_how_long_and_by_what(
  locks, monkeypatch, capsys, flags, steps, criterion
):
  asked = []

  def suggest(config, *rest):
    asked.append((config.method.total, *rest))
    return 0, ((0, 20), (1, 10))

  monkeypatch.setattr(suggest_locks, 'suggest', suggest)
  assert suggest_locks.run([*locks, *flags]) == 0
  assert asked == [(30, steps, criterion)]
  assert capsys.readouterr().out == (
    f"by {criterion}: --config.method.schedule='((0, 20), (1, 10))'\n"
  )


@pytest.mark.parametrize(
  ('page', 'flag', 'message'),
  [
    ('', '--steps=-1', '--steps: found -1, wanted 0 or more'),
    ('', '--config.method.totl=9', 'did you mean --config.method.total'),
    (
      '',
      '--config.method.schedule=auto',
      "found 'auto', wanted (lock depth, steps) of each phase",
    ),
    (
      'configs/salt.py',
      '',
      "found job 'train' with method 'salt', wanted a pretraining with "
      "'layerlock'",
    ),
    ('configs/probe_fast.py', '', "found job 'probe'"),
    ('configs/layerlocks.py', '', 'did you mean configs/layerlock'),
  ],
)
def test_wrong_configs_are_told_in_one_line(
  locks, tmp_path, capsys, page, flag, message
):
  flags = [f'--config={page}', locks[2]] if page else locks
  assert suggest_locks.run([*flags, *filter(None, [flag])]) == 1
  error = capsys.readouterr().err
  assert error.startswith('error: ') and error.count('\n') == 1
  assert message in error
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([], '--config'),
    (['--config=configs/layerlock_2b.py', '--criterion=mean'], "'movement'"),
    (['--config=configs/layerlock_2b.py', '--step=9'], 'did you mean --steps'),
  ],
)
def test_wrong_flags_are_errors(capsys, flags, message):
  with pytest.raises(SystemExit) as stopped:
    suggest_locks.run(flags)
  assert stopped.value.code == 2
  assert message in capsys.readouterr().err
