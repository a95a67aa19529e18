"""The demo in small; that it learns is tested where the notebook runs it."""

import json

import numpy as np
import pytest

from vssl_jax import demo, main

ROWS = [
  'pixel_teacher (trained)',
  'latent_student (trained)',
  'latent_student/polyak (average)',
  'latent_student at random initialisation',
  'raw pixels',
  'motion energy',
  'a single frame',
]


def small(tmp_path):
  return [
    '--config.method.pixel_teacher.steps=4',
    '--config.method.latent_student.steps=4',
    '--config.method.latent_student.polyak=0.9',
    '--config.probe.lrs=(0.03,)',
    '--config.health.clips=32',
    f'--config.workdir={tmp_path / "run"}',
  ]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_small_demo_runs_and_reports(tmp_path, monkeypatch, capsys):
  clips = {'pretrain': 32, 'train': 100, 'test': 200}
  monkeypatch.setattr(demo, 'CLIPS', clips)
  assert main.main(small(tmp_path)) == 0
  report = json.loads((tmp_path / 'run' / 'demo.json').read_text())
  accuracy = {name: row['accuracy'] for name, row in report['accuracy'].items()}
  assert list(accuracy) == ROWS
  assert (tmp_path / 'run' / 'drift.png').exists()
  assert report['chance'] == 0.1
  # Eight steps teach nothing; that labels and features belong together can
  # be seen from what needs no training.
  limit = 0.1 + 3 * np.sqrt(0.1 * 0.9 / clips['test'])
  assert accuracy['motion energy'] > limit > accuracy['a single frame']
  printed = capsys.readouterr().out
  last = printed[printed.index('Which of 10 motions?') :]
  for name in ROWS:
    assert f'  {name}' in last
  assert f'The encoder is in {tmp_path / "run"}' in last
  again = [line for line in last.splitlines() if line.startswith('  python')]
  assert len(again) == 3
