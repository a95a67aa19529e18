"""Phases side by side: the ratios that `--sweep=phases` prints."""

import json
import pathlib

import jax
import numpy as np
import pytest

from vssl_jax import config as config_lib
from vssl_jax import sharding
from vssl_jax.planning import bench, phase_sweep

PAGE = pathlib.Path(__file__).parents[2] / 'configs/layerlock_2b.py'


def _config(schedule='((0, 1), (1, 2))'):
  _, c = config_lib.load(f'{PAGE}:L')
  c.batch_size = jax.device_count()
  c.data.frames, c.data.stride, c.data.size = 4, 1, (16, 16)
  size = dict(width=64, depth=2, num_heads=2, mlp_width=128)
  c.method.encoder.update(size)
  c.method.vit.update(dict(patch=(2, 8, 8), dtype='float32', remat='none'))
  c.method.update(dict(decoder_blocks=1, masks='random:0.5', total=3))
  c.method.update(dict(target='pixels', schedule=schedule))
  c.optim.warmup = 0
  return c


@pytest.fixture(scope='module')
def found():
  """Two phases on one device, which compiles faster than eight."""
  lines = []
  one = np.array(jax.devices()[:1]).reshape(1, 1)
  mesh = jax.sharding.Mesh(one, ('data', 'fsdp'), axis_types=sharding.AUTO)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', lambda *_: mesh)
    compared = phase_sweep.entries(_config())
    return phase_sweep.phases(compared, steps=3, say=lines.append), lines


@pytest.mark.slow
def test_ratios_fall_with_every_lock(found):
  rows = found[0]['results']
  assert [row['phase'] for row in rows] == ['pixels', 'lock_01']
  assert set(rows[0]['ratios'].values()) == {1.0}
  for name in ('FLOPs', 'compiled', 'activations', 'optimizer', 'gradients'):
    first, second = (row['ratios'][name] for row in rows)
    assert first > second > 0, name
  assert all(row['step_seconds'] > 0 for row in rows)
  assert json.loads(json.dumps(found[0])) == found[0]


@pytest.mark.slow
def test_what_is_locked_has_neither_moments_nor_gradients(found):
  first, last = found[0]['results']
  locked = last['frozen_parameters'] - first['frozen_parameters']
  assert locked > 4 * 64 * 64
  gradients = first['gradient_bytes'] - last['gradient_bytes']
  assert 0 < gradients <= 4 * locked  # of one device of several
  moments = first['optimizer_bytes'] - last['optimizer_bytes']
  assert moments == 2 * gradients


@pytest.mark.slow
def test_the_table_has_a_line_for_each_phase(found):
  lines = found[1]
  assert lines[0].split() == ['phase', 'frozen', *phase_sweep.RATIOS]
  assert [line.split()[0] for line in lines[1:-1]] == [
    row['phase'] for row in found[0]['results']
  ]
  assert lines[-1].startswith('1 is: ')


@pytest.mark.slow
def test_phases_that_do_not_fit_beside_each_other_run_alone(found, monkeypatch):
  groups, rows = [], iter(found[0]['results'])

  def timed(group, *_):
    groups.append([entry.span.phase.name for entry in group])
    return [dict(next(rows)) for _ in group]

  monkeypatch.setattr(phase_sweep, '_timed', timed)
  monkeypatch.setattr(phase_sweep, '_fit_together', lambda *_: False)
  result = phase_sweep.phases(
    phase_sweep.entries(_config()), steps=1, say=lambda _: None
  )
  assert groups == [['pixels'], ['lock_01']]
  assert not result['taking_turns'] and len(result['results']) == 2


def test_the_program_compares_phases(tmp_path, monkeypatch):
  asked = []

  def answer(compared, *, steps):
    first = compared[0]
    names = (first.label, compared[-1].label)
    asked.append((first.config.method.total, steps, *names))
    return {'results': []}

  monkeypatch.setattr(phase_sweep, 'phases', answer)
  out = tmp_path / 'locks.json'
  flags = ['--sweep=phases', '--steps=7', f'--out={out}']
  page = f'--config={PAGE}:L'
  assert bench.run([page, '--config.method.total=9000', *flags]) == 0
  assert json.loads(out.read_text()) == {'results': []}
  against = f'--against={PAGE}:L-mae'
  mae = f'--config={PAGE}:L-mae'
  flags = [mae, against, '--config.batch_size=8', *flags]
  assert bench.run(flags) == 0
  assert asked == [
    (9000, 7, 'pixels', 'lock_16'),
    (100_000, 7, 'against: pixels', 'pixels'),
  ]


def test_another_page_is_what_phases_are_compared_with(capsys):
  with pytest.raises(SystemExit):
    bench.parse([f'--config={PAGE}', f'--against={PAGE}'])
  assert (
    '--against: wanted only together with --sweep=phases'
    in capsys.readouterr().err
  )


def test_one_phase_cannot_be_compared(capsys):
  with pytest.raises(SystemExit):
    bench.parse([f'--config={PAGE}', '--sweep=phases', '--phase=pixels'])
  assert '--sweep=phases compares all' in capsys.readouterr().err


def test_what_is_compared_has_one_batch_size():
  other = _config()
  other.batch_size *= 2
  compared = phase_sweep.entries(_config(), 'a ') + phase_sweep.entries(
    other, 'b '
  )
  with pytest.raises(ValueError, match='b pixels: batch_size is 16, and 8'):
    phase_sweep.phases(compared, steps=1)
