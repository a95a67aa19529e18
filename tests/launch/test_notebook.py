"""The notebook runs from top to bottom, but for what needs the network.

The demo that it runs takes minutes: what it has to learn is tested here too.
"""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

NOTEBOOK = pathlib.Path(__file__).parents[2] / 'launch' / 'colab.ipynb'


def _cells():
  cells = json.loads(NOTEBOOK.read_text())['cells']
  return [''.join(c['source']) for c in cells if c['cell_type'] == 'code']


def test_every_cell_is_plain_python_without_outputs():
  assert any(text.startswith('# needs: network') for text in _cells())
  for text in _cells():
    ast.parse(text)
  cells = json.loads(NOTEBOOK.read_text())['cells']
  assert not any(c.get('outputs') for c in cells)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_notebook_runs_and_its_demo_learns(tmp_path):
  cells = [c for c in _cells() if not c.startswith('# needs: network')]
  result = subprocess.run(
    [sys.executable, '-c', '\n'.join(cells)],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr[-3000:]
  assert '(8, 8, 32, 32, 3) -> (8, 64, 64)' in result.stdout
  assert (tmp_path / 'runs/demo/report/index.html').exists()
  report = json.loads((tmp_path / 'runs/demo/demo.json').read_text())
  accuracy = {name: row['accuracy'] for name, row in report['accuracy'].items()}
  trained = accuracy.pop('latent_student (trained)')
  accuracy.pop('pixel_teacher (trained)')
  # More than the baselines see.
  for name, other in accuracy.items():
    assert trained > other + 0.15, name
