"""The notebook runs from top to bottom, but for what needs the network."""

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
@pytest.mark.optimized
@pytest.mark.timeout(1200)
def test_the_notebook_runs(tmp_path):
  cells = [c for c in _cells() if not c.startswith('# needs: network')]
  # The demo's own length is tested where the README's commands run.
  demo = 'main.main(["--config.workdir=runs/demo"'
  assert sum(cell.count(demo) for cell in cells) == 1
  short = ''.join(
    f', "--config.method.{phase}.steps=4"'
    for phase in ('pixel_teacher', 'latent_student')
  )
  cells = [cell.replace(demo, demo + short) for cell in cells]
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
