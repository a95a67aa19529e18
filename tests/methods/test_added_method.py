"""The method in `methods/README.md` runs from a file outside the package."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from vssl_jax import main, methods
from vssl_jax.visualize import __main__ as visualize

README = pathlib.Path(methods.__file__).parent / 'README.md'
SMALL = [
  '--config=frame_differences.py',
  '--config.batch_size=8',
  '--config.method.size=Ti',
  '--config.method.depth=2',
  '--config.data.frames=4',
  '--config.data.stride=1',
  '--config.data.size=(16,16)',
  '--config.data.decode_processes=1',
  '--config.data.isolate=False',
  '--config.optim.warmup=2',
  '--config.health.clips=8',
  '--config.checkpoint.every=3',
  '--config.log.every=1',
  '--config.log.tensorboard=False',
]


def _example():
  return re.search(r'```python\n(.*?)```', README.read_text(), re.S).group(1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A folder with the example, which is the current one and on the path."""
  (tmp_path / 'frame_differences.py').write_text(_example())
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  yield tmp_path
  sys.modules.pop('frame_differences', None)


def test_the_example_is_short():
  assert len(_example().splitlines()) <= 80


def test_its_plan_counts_its_flops(folder, capsys):
  del folder
  assert main.main([*SMALL, '--plan']) == 0
  out = capsys.readouterr().out
  assert 'phase denoise: steps 0 to 10000' in out
  # 2 tokens of 1,536 values in and out, and 2 blocks of width 192.
  width, values, tokens = 192, 2 * 16 * 16 * 3, 2
  block = 2 * (12 * width**2 * tokens + 2 * tokens**2 * width)
  ends = 2 * tokens * values * width
  flops = 3 * 2 * block + 2 * ends + 3 * ends
  assert f'({flops / 1e12:.3f} TFLOP per clip' in out
  assert f'per step: {8 * flops:.3g} FLOPs' in out


def test_a_wrong_key_or_module_has_one_line(folder, capsys):
  assert main.main([*SMALL, '--config.method.noise=-1', '--plan']) == 2
  assert 'method.noise: found -1' in capsys.readouterr().err
  (folder / 'empty.py').write_text(
    'from vssl_jax import config\n'
    'def get_config(variant=""):\n'
    '  return config.default("empty")\n'
  )
  assert main.main(['--config=empty.py', '--plan']) == 2
  error = capsys.readouterr().err
  assert "found the module 'empty'" in error
  assert 'without KEYS and build' in error
  sys.modules.pop('empty')
  with pytest.raises(ValueError, match="did you mean 'salt'"):
    methods.keys('slat')


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_trains_resumes_and_is_measured(folder, clips, capsys):
  flags = [
    *SMALL,
    '--config.method.steps=40',
    '--config.workdir=run',
    f'--config.data.source={clips}',
  ]
  command = [sys.executable, '-m', 'vssl_jax.main', *flags]
  source = pathlib.Path(methods.__file__).parents[2]
  environment = os.environ | {'PYTHONPATH': f'{source}'}
  with subprocess.Popen(
    command, env=environment, stdout=subprocess.PIPE, text=True
  ) as process:
    log = folder / 'run' / 'metrics.jsonl'
    while process.poll() is None:
      if log.exists() and len(log.read_text().splitlines()) > 4:
        process.send_signal(signal.SIGTERM)
        break
      time.sleep(0.05)
    process.communicate()
  assert process.returncode == 143
  assert main.main(flags) == 0
  assert 'resumed' in capsys.readouterr().out
  losses = [
    line['loss']
    for line in map(json.loads, log.read_text().splitlines())
    if 'loss' in line
  ]
  assert losses[-1] < losses[0]
  probe = [
    '--config=configs/probe_fast.py:knn',
    '--config.encoder=run',
    '--config.workdir=probe',
    f'--config.probe.train={clips}',
    f'--config.probe.test={clips}',
    '--config.probe.allow_overlap=True',
    '--config.probe.test_batch_size=8',
    '--config.data.decode_processes=1',
    '--config.data.isolate=False',
  ]
  assert main.main(probe) == 0
  assert (folder / 'probe' / 'report.json').exists()
  assert visualize.run(['run']) == 0
  page = (folder / 'run' / 'report' / 'index.html').read_text()
  assert 'denoise-features.png' in page
