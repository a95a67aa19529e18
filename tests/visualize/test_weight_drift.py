import json

import numpy as np
import pytest
from PIL import Image

from vssl_jax.visualize import weight_drift


def _write(path, lines):
  path.write_text('\n'.join(json.dumps(x) for x in lines))
  return path


def _look(step, phase, norms, moved=()):
  line = {'step': step, 'phase': phase}
  line |= {f'norm/block_{i:02d}': x for i, x in enumerate(norms)}
  return line | {f'drift/block_{i:02d}': x for i, x in enumerate(moved)}


@pytest.fixture
def run(tmp_path):
  """Two blocks, the first locked after 30 steps; looks at uneven distances."""
  lines = [
    _look(10, 'pixels', (1.0, 2.0)),
    {'step': 15, 'phase': 'pixels', 'loss': 1.0},
    _look(20, 'pixels', (1.1, 2.1), (0.4, 0.1)),
    {'step': 30, 'phase': 'pixels', 'loss': 1.0},
    _look(40, 'lock_01', (1.2, 2.2), (0.2, 0.2)),
    # Resumed: the look before is not known.
    _look(50, 'lock_01', (1.2, 2.3)),
    _look(60, 'lock_01', (1.2, 2.4), (0.0, 0.3)),
  ]
  return _write(tmp_path / 'metrics.jsonl', lines)


def test_rates_are_by_the_steps_between_looks(run):
  looks = weight_drift.read(run)
  assert looks.edges.tolist() == [10, 20, 40, 50, 60]
  np.testing.assert_allclose(
    looks.rates, [[4, 1, np.nan, 0], [1, 1, np.nan, 3]], rtol=1e-6
  )
  np.testing.assert_allclose(looks.norms[0], [1, 1.1, 1.2, 1.2, 1.2])
  assert looks.phases == {'pixels': 0, 'lock_01': 30}


def test_phases_of_different_depth_are_rows_of_one_picture(tmp_path):
  """Two blocks, then three of another encoder, then two again."""
  lines = [
    _look(10, 'teacher', (1.0, 2.0)),
    _look(20, 'teacher', (1.0, 2.0), (0.1, 0.2)),
    _look(30, 'student', (3.0, 4.0, 5.0)),
    _look(40, 'student', (3.0, 4.0, 5.0), (0.3, 0.4, 0.5)),
    _look(50, 'last', (6.0, 7.0)),
    _look(60, 'last', (6.0, 7.0), (0.6, 0.7)),
  ]
  run = _write(tmp_path / 'metrics.jsonl', lines)
  looks, nan = weight_drift.read(run), np.nan
  assert looks.edges.tolist() == [10, 20, 30, 40, 50, 60]
  np.testing.assert_allclose(
    looks.rates,
    [[1, nan, 3, nan, 6], [2, nan, 4, nan, 7], [nan, nan, 5, nan, nan]],
  )
  np.testing.assert_allclose(looks.norms[2], [nan, nan, 5, 5, nan, nan])
  assert weight_drift.save(tmp_path / 'p.png', run)


def test_what_cannot_be_drawn_is_said_and_ends_nothing(run, capsys):
  (run.parent / 'drift.png').mkdir()
  weight_drift.save_in(str(run.parent))
  said = capsys.readouterr().err
  assert 'drift.png' in said and 'Is a directory' in said
  assert said.count('\n') == 1 and 'the run itself is complete' in said


def test_the_mean_is_over_the_blocks_that_move(run):
  """By hand: sqrt(4 x 1) = 2, and alone a block is its own mean."""
  found = weight_drift.relative(weight_drift.read(run).rates)
  nan = np.nan
  np.testing.assert_allclose(found, [[2, 1, nan, nan], [0.5, 1, nan, 1]])


def test_what_is_locked_is_grey_and_nothing_else(run, tmp_path):
  def grey():
    pixels = np.asarray(Image.open(tmp_path / 'p.png').convert('RGB'))
    return (pixels == round(0.75 * 255)).all(-1).sum()

  assert weight_drift.save(tmp_path / 'p.png', run)
  with_lock = grey()
  lines = [json.loads(x) for x in run.read_text().splitlines()]
  lines[-1]['drift/block_00'] = 0.1
  _write(run, lines)
  assert weight_drift.save(tmp_path / 'p.png', run)
  assert with_lock > 3000 and grey() < 0.05 * with_lock


@pytest.mark.parametrize(
  'lines',
  [
    [{'step': 1, 'loss': 1.0}],
    [_look(10, 'pixels', (1.0,))],
    [_look(10, 'pixels', (1.0,)), _look(20, 'pixels', (1.0,), (0.0,))],
  ],
)
def test_without_two_looks_there_is_no_picture(tmp_path, lines):
  run = _write(tmp_path / 'metrics.jsonl', lines)
  assert not weight_drift.save(tmp_path / 'p.png', run)
  assert not weight_drift.save(tmp_path / 'p.png', tmp_path / 'nothing.jsonl')
  assert not (tmp_path / 'p.png').exists()
