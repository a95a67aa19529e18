import json

import numpy as np
from PIL import Image

from vssl_jax.utils import metrics
from vssl_jax.visualize import curves


def _write(path, steps, cut=True):
  lines = [
    json.dumps({'step': s, 'phase': 'a' if s < 3 else 'b', 'loss': 1 / s})
    for s in steps
  ]
  text = '\n'.join(lines) + '\n'
  path.write_text(text[: -len(lines[-1]) // 2] if cut else text)
  return path


def test_half_a_line_at_the_end_is_left_out(tmp_path):
  lines = metrics.read(_write(tmp_path / 'm.jsonl', [1, 2, 3, 4]))
  assert [x['step'] for x in lines] == [1, 2, 3]
  steps, values = curves.series(lines)['loss']
  np.testing.assert_array_equal(steps, [1, 2, 3])
  np.testing.assert_allclose(values, [1, 1 / 2, 1 / 3])
  assert curves.boundaries(lines) == {'a': 1, 'b': 3}


def test_steps_taken_again_count_once():
  lines = [
    {'step': 1, 'loss': 1.0},
    {'step': 2, 'loss': 9.0},
    {'step': 2, 'loss': 2.0},
    {'step': 3, 'loss': None},
  ]
  steps, values = curves.series(lines)['loss']
  np.testing.assert_array_equal(steps, [1, 2, 3])
  np.testing.assert_array_equal(values, [1.0, 2.0, np.nan])


def test_steps_that_were_taken_back_are_left_out(tmp_path):
  lines = [{'step': s, 'loss': 1.0, 'phase': 'a'} for s in range(1, 6)]
  lines += [{'step': 2, 'event': 'rewound'}, {'step': 3, 'loss': 2.0}]
  path = tmp_path / 'm.jsonl'
  path.write_text('\n'.join(json.dumps(x) for x in lines))
  steps, values = curves.series(metrics.read(path))['loss']
  np.testing.assert_array_equal(steps, [1, 2, 3])
  np.testing.assert_array_equal(values, [1.0, 1.0, 2.0])


def test_which_metrics_are_drawn():
  two = np.arange(2)
  run = {
    'zeta': (two, np.array([1.0, 2.0])),
    'loss': (two, np.array([3.0, 2.0])),
    'flat': (two, np.array([1.0, 1.0])),
    'broken': (two, np.array([np.nan, np.nan])),
    'time/data': (two, np.array([0.1, 0.2])),
    'drift/block_00': (two, np.array([0.1, 0.2])),
  }
  assert curves.names({'one': run}) == ['loss', 'zeta']
  other = {'flat': (two, np.array([2.0, 2.0]))}
  assert curves.names({'one': run, 'two': other}) == ['loss', 'flat', 'zeta']


def test_runs_are_overlaid(tmp_path):
  one = _write(tmp_path / 'one.jsonl', [1, 2, 3, 4])
  two = _write(tmp_path / 'two.jsonl', [1, 2, 5, 6], cut=False)
  path = tmp_path / 'curves.png'
  assert curves.save(path, {'one': one, 'two': two}) == ['loss']
  pixels = np.asarray(Image.open(path).convert('RGB')).reshape(-1, 3)
  for colour in ((31, 119, 180), (255, 127, 14)):  # the first two of the cycle
    assert (pixels == colour).all(1).sum() > 50, colour


def test_a_run_that_has_only_begun_has_an_empty_picture(tmp_path):
  empty = tmp_path / 'm.jsonl'
  empty.write_text('{"step": 1, "lo')
  assert curves.save(tmp_path / 'curves.png', {'run': empty}) == []
  assert (tmp_path / 'curves.png').exists()
