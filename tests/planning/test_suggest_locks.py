import json
import pathlib

import numpy as np
import pytest

from vssl_jax import main
from vssl_jax.methods import lock_schedule
from vssl_jax.planning import suggest_locks
from vssl_jax.utils import config_io


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
  c.method.total, c.method.trial, c.method.schedule = 30, 20.0, 'auto'
  c.optim.update(dict(lr=1e-2, lr_batch=8, warmup=2))
  c.log.update(dict(every=10, tensorboard=False))
  c.health.update(dict(every=10.0, clips=8))
  c.checkpoint.keep_phases = ('lock_.*',)  # none of the short run's
  return c
"""


def _schedule(folder):
  record = json.loads((folder / 'run.json').read_text())
  return config_io.from_json(record['config']).method.schedule


def test_a_planted_order_gives_its_schedule():
  steps = list(range(50, 1001, 50))
  drift = [
    # Block i moves much until step 300 + 100 i of the short run, then little.
    {i: 0.1 if step <= 300 + 100 * i else 0.02 for i in range(5)}
    for step in steps
  ]
  found = lock_schedule.suggest(drift, steps, 10_000, limit=4)
  depths, lengths = zip(*found, strict=True)
  assert depths == (0, 1, 2, 3, 4)
  # The next look, 50 of 1,000 steps later, is the first that shows it.
  assert lengths[0] == 3500
  assert lengths[1:4] == (1000, 1000, 1000)
  assert sum(lengths) == 10_000


def test_blocks_that_settle_together_are_still_locked_in_turn():
  steps = list(range(50, 1001, 50))
  drift = [dict.fromkeys(range(3), 1 / step) for step in steps]
  found = lock_schedule.suggest(drift, steps, 1000, limit=3)
  # At a tenth of the run over the blocks, for want of a slope.
  assert found == ((0, 150), (1, 33), (2, 33), (3, 784))
  with pytest.raises(ValueError, match='found 2 looks'):
    lock_schedule.suggest(drift[:2], steps[:2], 1000, limit=3)


@pytest.mark.slow
def test_auto_is_decided_once_and_kept(locks, tmp_path, capsys):
  assert main.main(locks) == 0
  printed = capsys.readouterr().out
  folder = tmp_path / 'run'
  text = _schedule(folder)
  assert f"'--config.method.schedule={text}'" in printed
  schedule = lock_schedule.parse(text)
  assert sum(n for _, n in schedule) == 30
  names = {p.name for p in (folder / 'params').iterdir() if p.is_dir()}
  assert names == {f'lock_{k:02d}' for k, _ in schedule if k}
  assert (folder / 'drift.png').exists()
  # A later start reads it back, and the short run is not run again.
  trial = folder / 'suggest' / 'metrics.jsonl'
  before = trial.read_bytes()
  assert main.main(locks) == 0
  assert _schedule(folder) == text
  assert trial.read_bytes() == before


@pytest.mark.slow
def test_suggest_prints_what_the_drift_says(locks, tmp_path, capsys):
  assert main.main([*locks, '--suggest']) == 0
  line = capsys.readouterr().out.splitlines()[-1]
  folder = pathlib.Path(tmp_path / 'run' / 'suggest')
  at, drift = suggest_locks._drift(folder / 'metrics.jsonl')
  assert at == list(range(3, 21))
  assert all(np.isfinite(list(look.values())).all() for look in drift)
  wanted = lock_schedule.suggest(drift, at, 30, limit=2)
  assert line == f"'--config.method.schedule={wanted!r}'"
  assert not (tmp_path / 'run' / 'run.json').exists()


def test_what_has_nothing_to_decide_says_so(locks, capsys):
  flags = ['--config=configs/salt.py', *locks[2:], '--suggest']
  assert main.main(flags) == 1
  assert 'salt has no knob' in capsys.readouterr().err
