"""A run that spiked is taken back, and goes on as if it had not."""

import dataclasses
import json
import pathlib
import shutil

import jax.numpy as jnp
import pytest

from tests.train import small_runs, toy
from vssl_jax import main
from vssl_jax.checkpoint import integrity
from vssl_jax.data import pipeline
from vssl_jax.train import loop, rewind
from vssl_jax.train import run as run_lib
from vssl_jax.utils import metrics

BAD = 7  # the batch that does harm: step 8 of the log
STEPS = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spiking(toy.ToyPhase):
  """Its loss is large on one batch, known by its clips."""

  poison: tuple = ()

  def loss(self, params, teachers, batch, rng):
    value, aux = super().loss(params, teachers, batch, rng)
    bad = jnp.all(batch.index == jnp.asarray(self.poison))
    return value * jnp.where(bad, 1e4, 1.0), aux


@pytest.fixture(scope='module')
def spiked(clips, tmp_path_factory):
  """A run of two phases with a spike in the second; every state is kept."""
  config = small_runs.tiny_config(
    clips, tmp_path_factory.mktemp('spiked') / 'a'
  )
  config.checkpoint.update(dict(every=1, keep=100))
  config.optim.update(dict(clip=0.0, warmup=0))
  stream = pipeline.make(config.data.to_dict(), batch_size=8, seed=0)
  poison = tuple(next(stream.iterator(BAD))['index'].tolist())
  stream.close()
  phases = tuple(
    toy.phase(Spiking, name=name, steps=steps, poison=poison)
    for name, steps in (('one', 5), ('two', 7))
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(run_lib.methods, 'build', lambda *_: phases)
    assert loop.train(config) == 0
    yield config


@pytest.fixture
def run(spiked, tmp_path):
  """A copy of it to do things to."""
  config = spiked.copy_and_resolve_references()
  config.workdir = str(tmp_path / 'run')
  shutil.copytree(spiked.workdir, config.workdir)
  return config


def _keep(config, *steps):
  for saved in integrity.listing(config.workdir, ('checkpoints',)):
    if saved.step not in steps:
      shutil.rmtree(saved.path)
      integrity.path_of(saved.path).unlink()


def _end(config):
  saved = integrity.listing(config.workdir, ('checkpoints',))
  last = max(saved, key=lambda s: s.step)
  return last.step, {k: v['sum'] for k, v in last.manifest['leaves'].items()}


def _record(config):
  return json.loads((pathlib.Path(config.workdir) / 'run.json').read_text())


def _losses(config):
  lines = metrics.read(pathlib.Path(config.workdir) / 'metrics.jsonl')
  found = {x['step']: x['loss'] for x in lines if 'loss' in x}
  assert len(found) == sum('loss' in x for x in lines), 'a step twice'
  return found


@pytest.fixture(scope='module')
def mended(spiked, tmp_path_factory):
  """The bits that every way to rewind must end with."""
  config = spiked.copy_and_resolve_references()
  config.workdir = str(tmp_path_factory.mktemp('mended') / 'run')
  shutil.copytree(spiked.workdir, config.workdir)
  assert loop.train(config, rewind.Rewind(BAD + 1, 2)) == 0
  return config


def test_the_spike_is_there_and_then_it_is_not(spiked, mended):
  before, after = _losses(spiked), _losses(mended)
  assert max(before, key=before.get) == BAD + 1
  assert before[BAD + 1] > 100
  assert sorted(after) == list(range(1, STEPS + 1))
  assert max(after.values()) < 10
  for step in range(1, BAD + 1):
    assert before[step] == after[step]
  assert _end(spiked)[1] != _end(mended)[1]


def test_what_came_later_is_set_aside_and_written_down(mended):
  workdir = pathlib.Path(mended.workdir)
  aside = workdir / 'rewound' / f'1-from-{STEPS:08d}'
  moved = integrity.listing(aside)
  assert sorted((s.step, s.path.parent.name) for s in moved) == [
    *((n, 'checkpoints') for n in range(BAD + 1, STEPS)),
    (STEPS, 'checkpoints'),
    (STEPS, 'params'),
  ]
  assert not any(integrity.damage(s) for s in moved)
  assert (workdir / 'params' / 'one.json').exists()
  record = _record(mended)
  assert record['left_out'] == [[BAD, BAD + 2]]
  assert record['rewinds'] == [
    {'step': BAD + 1, 'skip': 2, 'to': BAD, 'from': STEPS}
  ]
  text = (workdir / 'metrics.jsonl').read_text()
  events = [json.loads(x) for x in text.splitlines() if 'event' in x]
  assert [(x['event'], x['step']) for x in events] == [
    ('rewound', BAD),
    ('resumed', BAD),
  ]
  assert events[1]['lost_steps'] == 0


def test_from_another_checkpoint_the_bits_are_the_same(run, mended):
  """Also from one in the phase before."""
  _keep(run, 4, 9, 12)
  assert loop.train(run, rewind.Rewind(BAD + 1, 2)) == 0
  assert _end(run) == _end(mended)


def test_it_can_be_resumed_and_the_same_command_given_again(
  mended, tmp_path, capsys
):
  """As a scheduler does, without and with the flags."""
  for i, back in enumerate((None, rewind.Rewind(BAD + 1, 2))):
    config = mended.copy_and_resolve_references()
    config.workdir = str(tmp_path / f'{i}')
    shutil.copytree(mended.workdir, config.workdir)
    _keep(config, 9 - i)
    assert loop.train(config, back) == 0
    assert _end(config) == _end(mended)
    assert len(_record(config)['rewinds']) == 1
  assert 'was done at an earlier start' in capsys.readouterr().out


def test_killed_in_the_middle_the_same_command_does_the_rest(
  run, mended, monkeypatch
):
  with monkeypatch.context() as patch:
    patch.setattr(integrity, 'write_atomic', _killed_at(run.workdir))
    with pytest.raises(KeyboardInterrupt):
      loop.train(run, rewind.Rewind(BAD + 1, 2))
  assert _record(run)['left_out'] == []
  assert _end(run)[0] == BAD
  assert loop.train(run, rewind.Rewind(BAD + 1, 2)) == 0
  assert _end(run) == _end(mended)


def _killed_at(workdir):
  """The second time that run.json is written, after what is moved is."""
  write, seen = integrity.write_atomic, []

  def killed(path, *args, **kwargs):
    if path == pathlib.Path(workdir) / 'run.json':
      seen.append(path)
      if len(seen) == 2:
        raise KeyboardInterrupt
    write(path, *args, **kwargs)

  return killed


@pytest.mark.slow
def test_a_second_rewind_adds_to_the_first(mended, tmp_path):
  config = mended.copy_and_resolve_references()
  config.workdir = str(tmp_path / 'run')
  shutil.copytree(mended.workdir, config.workdir)
  assert loop.train(config, rewind.Rewind(6, 1)) == 0
  assert loop.train(config, rewind.Rewind(11, 3)) == 0
  record = _record(config)
  # Step 6 took batch 5. Then step 11 took batch 13: 5, 7 and 8 were left out.
  assert record['left_out'] == [[5, 6], [7, 9], [13, 16]]
  assert [x['to'] for x in record['rewinds']] == [7, 5, 10]
  losses = _losses(config)
  assert sorted(losses) == list(range(1, STEPS + 1))
  assert max(losses.values()) < 10


def test_without_skipping_the_same_bits_come_again(run, spiked):
  """As after a faulty machine."""
  assert loop.train(run, rewind.Rewind(4, 0)) == 0
  assert _end(run) == _end(spiked)
  assert _record(run)['left_out'] == []


@pytest.mark.parametrize(
  ('kept', 'asked', 'message'),
  [
    ((9, 12), 8, r'no intact checkpoint .* only those of steps \[12, 9\]'),
    ((8, 9, 12), 8, r'no intact checkpoint from before step 8'),
    ((12,), 13, 'has only reached step 12'),
  ],
)
def test_where_there_is_nothing_to_go_back_to(run, kept, asked, message):
  _keep(run, *kept)
  before = _record(run), _end(run)
  with pytest.raises(run_lib.TrainingError, match=message):
    loop.train(run, rewind.Rewind(asked))
  assert (_record(run)['left_out'], _end(run)) == ([], before[1])


def test_a_record_of_another_past_is_refused(mended, tmp_path):
  config = mended.copy_and_resolve_references()
  config.workdir = str(tmp_path / 'run')
  shutil.copytree(mended.workdir, config.workdir)
  path = pathlib.Path(config.workdir) / 'run.json'
  integrity.write_atomic(path, integrity.load(path) | {'left_out': []})
  with pytest.raises(run_lib.TrainingError, match=r'00000012 left out .*7, 9'):
    loop.train(config)
  path.unlink()  # the checkpoint knows too
  _keep(config, 10)
  assert loop.train(config) == 0
  assert _end(config) == _end(mended)
  assert _record(config)['left_out'] == [[BAD, BAD + 2]]


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--skip=3'], 'wanted --rewind=<step> together with it'),
    (['--rewind=1'], 'wanted a step of the log from 2 on'),
    (['--rewind=5', '--skip=-1'], '0 or more batches'),
    (['--rewind=5', '--config.job=probe'], "found config.job 'probe'"),
  ],
)
def test_flags_that_make_no_sense(flags, message, capsys):
  assert main.main(flags) == 2
  assert message in capsys.readouterr().err


def test_the_flags_reach_the_trainer(run, mended, monkeypatch, tmp_path):
  page = tmp_path / 'page.py'
  page.write_text('def get_config(variant): return CONFIG\n')
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(main, 'resolve', lambda *_: run)
  flags = ['--config=page.py', f'--rewind={BAD + 1}', '--skip=2']
  assert main.main(flags) == 0
  assert _end(run) == _end(mended)
