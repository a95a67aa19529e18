"""What is not run is counted and said; .ci/run allows no skip at all."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

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
"""
ABSENT = "import pytest\npytest.importorskip('no_such_package')\n"


@pytest.fixture
def suite(tmp_path):
  def run(*args, **env):
    result = subprocess.run(
      [sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', *args],
      cwd=tmp_path,
      env={k: v for k, v in os.environ.items() if k != 'VSSL_TEST_DATA'} | env,
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


def test_skips_and_what_is_left_out_are_counted(suite):
  status, said = suite()
  assert status == 0, said
  assert '1 passed, 1 skipped, 2 deselected, 1 xfailed' in said
  assert 'skips: 1\n' in said
  assert 'test_skips: Skipped: no such device' in said
  assert 'left out 1: slow' in said
  assert 'left out 1: real videos: set VSSL_TEST_DATA' in said


def test_slow_and_real_ones_run_when_asked_for(suite):
  status, said = suite('-m', 'slow')
  assert (status, '1 passed, 4 deselected' in said) == (0, True), said
  status, said = suite('--slow', VSSL_TEST_DATA='/some/videos')
  assert (status, '3 passed, 1 skipped, 1 xfailed' in said) == (0, True), said


def test_a_skip_fails_where_none_is_allowed(suite, tmp_path):
  status, said = suite('--no-skips')
  assert status == 1
  assert '1 failed, 1 passed, 2 deselected, 1 xfailed' in said
  assert 'skipped, and --no-skips is set' in said
  (tmp_path / 'tests/test_some.py').write_text('def test_runs(): pass\n')
  assert suite('--no-skips')[0] == 0
  (tmp_path / 'tests/test_absent.py').write_text(ABSENT)
  assert suite()[0] == 0
  assert suite('--no-skips')[0] != 0
