"""What is not run is counted and said; .ci/run allows no skip at all."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

# What a session of tests must not hear of the one that starts it.
OURS = ('VSSL_TEST_DATA', 'PYTEST_XDIST_WORKER', 'PYTEST_ADDOPTS')
HERE = pathlib.Path(__file__).resolve().parent
SUITE = """
import pytest
def test_runs(): pass
def test_skips(): pytest.skip('no such device')
@pytest.mark.xfail
def test_known(): assert False
@pytest.mark.slow
def test_slow(): pass
def test_real(video_data): assert video_data.name == 'videos'
@pytest.fixture
def slurm(): pass
def test_cluster(slurm): pass
"""
SHARED = """
import os, pathlib, jax, pytest
def test_skips(): pytest.skip('no such device')
def test_where(worker_id):
  folder = jax.config.jax_compilation_cache_dir
  assert os.environ['JAX_COMPILATION_CACHE_DIR'] == folder
  assert pathlib.Path(folder).is_dir()
  pathlib.Path(worker_id).write_text(folder)
"""
# As launch/test.sh runs the whole suite; and where xdist is not installed.
WORKERS = ('-n', '2', '--dist', 'loadfile')
ALONE = ('-p', 'no:xdist')
ABSENT = "import pytest\npytest.importorskip('no_such_package')\n"


@pytest.fixture
def suite(tmp_path):
  def run(*args, **env):
    result = subprocess.run(
      [sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', *args],
      cwd=tmp_path,
      env={k: v for k, v in os.environ.items() if k not in OURS}
      | {'PATH': str(tmp_path)}  # no cluster is asked
      | env,
      check=False,
      capture_output=True,
      text=True,
    )
    return result.returncode, result.stdout

  shutil.copy(HERE / 'conftest.py', tmp_path)
  shutil.copy(HERE.parent / 'setup.cfg', tmp_path)
  (tmp_path / 'vssl_jax').symlink_to(HERE.parent / 'vssl_jax')
  (tmp_path / 'tests').mkdir()
  (tmp_path / 'conftest.py').rename(tmp_path / 'tests/conftest.py')
  (tmp_path / 'tests/test_some.py').write_text(SUITE)
  return run


@pytest.mark.parametrize('how', [ALONE, WORKERS], ids=' '.join)
def test_skips_and_what_is_left_out_are_counted(suite, how):
  status, said = suite('-v', *how)
  assert status == 0, said
  assert ('[gw' in said) == (how == WORKERS), said
  assert '1 passed, 1 skipped, 3 deselected, 1 xfailed' in said
  assert 'skips: 1\n' in said
  assert 'test_skips: Skipped: no such device' in said
  assert 'left out 1: slow' in said
  assert 'left out 1: real videos: set VSSL_TEST_DATA' in said
  assert 'left out 1: SLURM: no cluster answers' in said


def test_slow_and_real_ones_run_when_asked_for(suite, tmp_path):
  status, said = suite('-m', 'slow')
  assert (status, '1 passed, 5 deselected' in said) == (0, True), said
  sinfo = tmp_path / 'sinfo'
  sinfo.write_text('#!/bin/sh\n')
  sinfo.chmod(0o755)
  status, said = suite('--slow', VSSL_TEST_DATA='/some/videos')
  assert (status, '4 passed, 1 skipped, 1 xfailed' in said) == (0, True), said


def test_a_skip_fails_where_none_is_allowed(suite, tmp_path):
  status, said = suite('--no-skips', *ALONE)
  assert status == 1
  assert '1 failed, 1 passed, 3 deselected, 1 xfailed' in said
  assert 'skipped, and --no-skips is set' in said
  (tmp_path / 'tests/test_some.py').write_text('def test_runs(): pass\n')
  assert suite('--no-skips', *ALONE)[0] == 0
  (tmp_path / 'tests/test_absent.py').write_text(ABSENT)
  assert suite(*ALONE)[0] == 0
  assert suite('--no-skips', *ALONE)[0] != 0


def test_workers_share_compiled_programs_and_refuse_skips(suite, tmp_path):
  (tmp_path / 'tests/test_some.py').rename(tmp_path / 'tests/test_a.py')
  for name in 'ab':
    (tmp_path / f'tests/test_{name}.py').write_text(SHARED)
  status, said = suite('--no-skips', *WORKERS)
  assert (status, '2 failed, 2 passed' in said) == (1, True), said
  assert 'skipped, and --no-skips is set' in said
  # One file each.
  first, second = ((tmp_path / f'gw{i}').read_text() for i in range(2))
  assert first == second != os.environ['JAX_COMPILATION_CACHE_DIR']
  assert not pathlib.Path(first).exists()
