"""What is installed: every room, no tests, and only packages that are used."""

import ast
import importlib.metadata
import os
import pathlib
import subprocess
import sys
import zipfile

import pytest
from packaging import requirements, utils

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def _imported():
  """Returns the top names that the package imports, functions included."""
  names = set()
  for path in (ROOT / 'vssl_jax').rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        names |= {alias.name.split('.')[0] for alias in node.names}
      elif isinstance(node, ast.ImportFrom):
        names.add(node.module.split('.')[0])
  return names - set(sys.stdlib_module_names) - {'vssl_jax'}


def _names(groups):
  """Returns the top names that setup.cfg's groups of requirements bring."""
  import configparser

  setup = configparser.ConfigParser()
  setup.read(ROOT / 'setup.cfg')
  every = {'': setup['options']['install_requires']}
  every |= setup['options.extras_require']
  wanted = {
    utils.canonicalize_name(requirements.Requirement(line).name)
    for group in groups
    for line in every[group].strip().splitlines()
    if not line.startswith('#')
  }
  return {
    name: {utils.canonicalize_name(d) for d in owners} & wanted
    for name, owners in importlib.metadata.packages_distributions().items()
    if {utils.canonicalize_name(d) for d in owners} & wanted
  }, wanted


def test_what_is_imported_is_declared():
  brought, _ = _names(['', 'tensorboard'])
  # orbax is a namespace that several packages share.
  assert _imported() - brought.keys() == set()


def test_what_is_declared_is_imported():
  brought, wanted = _names([''])
  used = set().union(*(brought.get(name, set()) for name in _imported()))
  assert wanted - used == set()


def test_every_room_is_a_package():
  for folder in {p.parent for p in (ROOT / 'vssl_jax').rglob('*.py')}:
    assert (folder / '__init__.py').exists(), f'{folder} would not be installed'


@pytest.mark.slow
@pytest.mark.optimized
def test_wheel_runs_the_demo_from_any_folder(tmp_path):
  pip = [sys.executable, '-m', 'pip', '-q', '--disable-pip-version-check']
  wheels, site = tmp_path / 'wheels', tmp_path / 'site'
  subprocess.run([*pip, 'wheel', '--no-deps', '-w', wheels, ROOT], check=True)
  (wheel,) = wheels.iterdir()
  files = set(zipfile.ZipFile(wheel).namelist())
  wanted = {str(p.relative_to(ROOT)) for p in (ROOT / 'vssl_jax').rglob('*.py')}
  assert wanted | {'vssl_jax/py.typed'} <= files
  tops = {name.split('/')[0] for name in files}
  assert tops == {'vssl_jax', wheel.name.split('-py3')[0] + '.dist-info'}

  subprocess.run(
    [*pip, 'install', '--no-deps', '--target', site, wheel], check=True
  )
  result = subprocess.run(
    [sys.executable, '-m', 'vssl_jax.main', '--plan'],
    cwd=tmp_path,
    env=os.environ | {'PYTHONPATH': str(site)},
    check=True,
    capture_output=True,
    text=True,
  )
  assert 'pixel_teacher' in result.stdout
  assert 'latent_student' in result.stdout
  where = subprocess.run(
    [sys.executable, '-c', 'import vssl_jax; print(vssl_jax.__file__)'],
    cwd=tmp_path,
    env=os.environ | {'PYTHONPATH': str(site)},
    check=True,
    capture_output=True,
    text=True,
  )
  assert where.stdout.strip() == str(site / 'vssl_jax/__init__.py')
