"""Demos in small; SALT's is run whole, and learns, in `test_docs.py`."""

import json
import subprocess
import sys

import numpy as np
import pytest

BASELINES = ['raw pixels', 'motion energy', 'a single frame']
# Phases, and what makes them short.
SHORT = {
  'layerlock': (['pixels', 'lock_01'], ['total=8', 'schedule=((0,4),(1,4))']),
  'pmd': (
    ['image_teacher', 'video_teacher', 'mask_50', 'mask_87.5'],
    ['mask_ratios=(.5,.875)', 'steps=(3,3)', 'window=1'],
  ),
  'kdhiera': (['image_teacher', 'video_teacher', 'distill'], ['steps=4']),
}
TEACHERS = ['image_teacher.steps=2', 'video_teacher.steps=2']


def small(tmp_path, name):
  knobs = SHORT[name][1] + TEACHERS * (name != 'layerlock')
  return [
    f'--config=configs/demo.py:{name}',
    *(f'--config.method.{knob}' for knob in knobs),
    '--config.optim.warmup=1',
    '--config.probe.lrs=(0.03,)',
    '--config.health.clips=32',
    f'--config.workdir={tmp_path / "run"}',
  ]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
  'name',
  [
    pytest.param('layerlock', marks=pytest.mark.optimized),
    pytest.param('pmd', marks=pytest.mark.optimized),
    'kdhiera',  # compiles longer than it computes
  ],
)
def test_a_small_demo_runs_and_reports(name, tmp_path):
  clips = {'pretrain': 32, 'train': 100, 'test': 200}
  program = (
    'from vssl_jax import demo, main\n'
    f'demo.CLIPS = {clips}\n'
    f'raise SystemExit(main.main({small(tmp_path, name)}))'
  )
  result = subprocess.run(
    [sys.executable, '-c', program],
    check=False,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  printed = result.stdout
  report = json.loads((tmp_path / 'run' / 'demo.json').read_text())
  accuracy = {name: row['accuracy'] for name, row in report['accuracy'].items()}
  rows = [f'{phase} (trained)' for phase in SHORT[name][0]]
  rows += [f'{SHORT[name][0][-1]} at random initialisation', *BASELINES]
  assert list(accuracy) == rows
  assert (tmp_path / 'run' / 'drift.png').exists()
  assert report['chance'] == 0.1
  # A few steps teach nothing; that labels and features belong together can
  # be seen from what needs no training.
  limit = 0.1 + 3 * np.sqrt(0.1 * 0.9 / clips['test'])
  assert accuracy['motion energy'] > limit > accuracy['a single frame']
  last = printed[printed.index('Which of 10 motions?') :]
  for row in rows:
    assert f'  {row}' in last
  assert f'The encoder is in {tmp_path / "run"}' in last
  again = [line for line in last.splitlines() if line.startswith('  python')]
  assert len(again) == 3
