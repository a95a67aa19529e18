"""The set-up scripts, run for real but for pip and the package."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TOOLS = 'bash cat cksum dirname flock grep head mkdir mv rm tail touch tr env'
PIP = """
import os, pathlib, signal, sys, time
print('Successfully installed everything')
with open(os.environ['STUB_LOG'], 'a') as log:
  log.write(' '.join(sys.argv[1:]) + '\\n')
do = os.environ.get('STUB_PIP')
if do == 'fail':
  sys.exit('ERROR: no network')
if do == 'slow':
  time.sleep(1)
if do == 'kill':
  pathlib.Path(sys.prefix, 'lib/half-unpacked').touch()
  os.kill(os.getppid(), signal.SIGKILL)
if do == 'ctrl-c':  # to all processes of the terminal; pip then exits with 1
  signal.signal(signal.SIGINT, lambda *_: sys.exit(1))
  os.killpg(0, signal.SIGINT)
  time.sleep(9)
"""
MAIN = """
import json, os, sys, time
print(json.dumps(dict(args=sys.argv[1:], cwd=os.getcwd(), prefix=sys.prefix,
                      platforms=os.environ.get('JAX_PLATFORMS'),
                      time=time.time())))
"""


class Clone:
  """A copy of the launchers beside a pip and a package that only report."""

  def __init__(self, folder):
    # Spaces in a path are where shell scripts break.
    self.root = folder / 'a clone'
    self.elsewhere = folder / 'else where'
    self.log = folder / 'pip.log'
    self.log.touch()
    self.elsewhere.mkdir()
    shutil.copytree(ROOT / 'launch', self.root / 'launch')
    for name in ('pyproject.toml', 'setup.cfg'):
      shutil.copy(ROOT / name, self.root)
    for name, text in {
      'pip/__init__.py': '',
      'pip/__main__.py': PIP,
      'pytest.py': MAIN,
      'vssl_jax/main.py': MAIN,
    }.items():
      path = folder / 'stubs' / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text)
    # No GPU tools, no other Python: what is found is what a test puts here.
    self.bin = folder / 'bin'
    self.bin.mkdir()
    for tool in TOOLS.split():
      if shutil.which(tool):
        (self.bin / tool).symlink_to(shutil.which(tool))
    (self.bin / 'python3').symlink_to(sys._base_executable)
    self.env = {
      'PATH': str(self.bin),
      'HOME': str(folder),
      'PYTHONPATH': str(folder / 'stubs'),
      'STUB_LOG': str(self.log),
      'VSSL_ACCELERATOR': 'cpu',
    }

  def start(self, *args, script='local.sh', **env):
    return subprocess.Popen(
      ['bash', self.root / 'launch' / script, *args],
      env=self.env | env,
      cwd=self.elsewhere,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      process_group=0,
    )

  def run(self, *args, **kwargs):
    process = self.start(*args, **kwargs)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err

  def installs(self):
    """Returns what pip was asked to install, call by call."""
    return [
      line.split(' -e ')[-1] for line in self.log.read_text().splitlines()
    ]


@pytest.fixture
def clone(tmp_path):
  return Clone(tmp_path)


def test_second_start_is_fast_and_installs_nothing(clone):
  # Where the user stands may hold a file with the name of a module.
  (clone.elsewhere / 'json.py').write_text('raise SystemExit("shadowed")')
  status, out, err = clone.run('--config.data.source=my videos', '--plan')
  assert status == 0, err
  said = json.loads(out)  # nothing but the program writes to stdout
  assert said['args'] == ['--config.data.source=my videos', '--plan']
  assert said['cwd'] == str(clone.elsewhere)
  assert said['prefix'] == str(clone.root / '.venv')
  assert said['platforms'] == 'cpu'
  assert 'using cpu: VSSL_ACCELERATOR says so' in err
  assert clone.installs() == [str(clone.root)]
  assert f'-c {clone.root}/launch/constraints.txt' in clone.log.read_text()

  begin = time.time()
  status, out, err = clone.run(JAX_PLATFORMS='mine')
  assert json.loads(out)['time'] - begin < 60
  assert json.loads(out)['args'] == []
  assert json.loads(out)['platforms'] == 'mine'
  assert len(clone.installs()) == 1, err


def test_installs_again_when_something_changed(clone):
  root = str(clone.root)
  clone.run()
  _, out, _ = clone.run(script='test.sh')
  workers = ['-n', '2', '--dist', 'loadfile', '--no-loadscope-reorder']
  assert json.loads(out)['args'] == workers
  _, out, _ = clone.run('-m', 'slow', script='test.sh')
  assert json.loads(out)['args'] == ['-m', 'slow']
  clone.run(VSSL_ACCELERATOR='cuda13', VSSL_EXTRAS='tensorboard')
  assert clone.installs() == [
    root, f'{root}[test]', f'{root}[cuda13,tensorboard]'
  ]  # fmt: skip
  for script in ('local.sh', 'test.sh'):
    assert clone.run(script=script)[0] == 0
  assert len(clone.installs()) == 3  # all of it is there by now
  with (clone.root / 'setup.cfg').open('a') as file:
    file.write('# another version\n')
  clone.run(script='test.sh')
  assert clone.installs()[3:] == [f'{root}[test]']
  moved = clone.root.with_name('moved')
  clone.root = clone.root.rename(moved)
  status, _, err = clone.run()
  assert status == 0, err
  assert clone.installs()[4:] == [str(moved)]


def test_parity_has_packages_without_what_they_ask_for(clone):
  for _ in range(2):  # the second time all of it is there
    status, _, err = clone.run(script='test.sh', VSSL_EXTRAS='parity')
    assert status == 0, err
  first, second = clone.installs()
  assert first == f'{clone.root}[test,parity]'
  assert second.endswith(f' --no-deps -r {clone.root}/launch/parity.txt')


def _files(folder):
  """Returns every path below a folder, with the content of files."""
  return {
    str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
    for path in folder.rglob('*')
  }


@pytest.mark.slow
@pytest.mark.parametrize('how, status', [('kill', -9), ('ctrl-c', 1)])
def test_an_interrupted_first_set_up_is_begun_afresh(clone, how, status):
  got, out, err = clone.run(STUB_PIP=how)
  assert (got, out) == (status, ''), err
  venv = clone.root / '.venv'
  (venv / 'lib/half-unpacked').touch()
  for name in ('mine', 'bin/mine'):
    (venv / name).write_text('mine')
  before = _files(venv)
  status, _, err = clone.run()
  assert (status, 'did not finish' in err) == (0, True), err
  assert f'now {venv}.old;' in err
  assert not (venv / 'lib/half-unpacked').exists()
  # Nobody knows what of it is the user's: nothing is removed.
  assert _files(venv.with_name('.venv.old')) == before
  assert len(clone.installs()) == 2


@pytest.mark.slow
def test_an_environment_that_was_complete_is_moved_aside(clone):
  # The user has added a package; then an update is killed, or Python is gone.
  clone.run()
  venv = clone.root / '.venv'
  (venv / 'lib/package').write_text('mine')
  assert clone.run(STUB_PIP='kill', VSSL_EXTRAS='tensorboard')[0] == -9
  status, _, err = clone.run()
  assert (status, f'now {venv}.old;' in err) == (0, True), err
  assert (clone.root / '.venv.old/lib/package').read_text() == 'mine'
  (venv / 'bin/python').unlink()
  status, _, err = clone.run()
  assert (status, f'now {venv}.old.old;' in err) == (0, True), err
  assert (clone.root / '.venv.old/lib/package').read_text() == 'mine'
  assert len(clone.installs()) == 4


@pytest.mark.slow
def test_a_failed_install_starts_nothing_and_removes_nothing(clone):
  for extras in ('', 'tensorboard'):  # the first set-up, then an update
    status, out, err = clone.run(STUB_PIP='fail', VSSL_EXTRAS=extras)
    assert (status, out) == (1, '')
    assert 'no network' in err
    assert 'pip failed' in err
    mine = clone.root / '.venv/lib' / f'package {extras}'
    mine.touch()
    status, out, err = clone.run()
    assert status == 0, err
    assert mine.exists()
  assert not (clone.root / '.venv.old').exists()


@pytest.mark.parametrize(
  'place', ['environment', 'folder', 'with a slash/', 'link', 'file', 'hidden']
)
def test_what_it_did_not_make_is_refused_and_left_alone(clone, place):
  # Named by a mistake, such as VSSL_VENV=$HOME, or by intent.
  mine = clone.elsewhere / place
  target = mine
  if place == 'link':
    target = clone.elsewhere / 'target'
    mine.symlink_to(target)
  if place == 'file':
    mine.write_text('mine')
  else:
    target.mkdir()
    (target / ('.notes' if place == 'hidden' else 'notes')).write_text('mine')
  if place == 'environment':
    (target / 'bin').mkdir()
    (target / 'bin/python').symlink_to(sys._base_executable)
    (target / 'pyvenv.cfg').touch()
  before = _files(clone.elsewhere)
  for pip in ('fail', ''):
    # A name relative to where the user stands.
    status, out, err = clone.run(STUB_PIP=pip, VSSL_VENV=place)
    assert (status, out) == (1, '')
    last = err.splitlines()[-1]
    assert str(mine) in last
    assert 'Set VSSL_VENV to a folder that does not exist yet' in last
    assert _files(clone.elsewhere) == before
  assert clone.installs() == []


def test_two_starts_at_once_install_once(clone):
  if not shutil.which('flock'):
    pytest.skip('no flock on this system')
  processes = [clone.start(STUB_PIP='slow') for _ in range(2)]
  for process in processes:
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
  assert len(clone.installs()) == 1


def test_takes_a_python_that_runs_and_fits(clone):
  # As pyenv's shims do: there by name, and an error when run.
  (clone.bin / 'python3').unlink()
  for name in ('python3', 'python3.13', 'python3.12'):
    (clone.bin / name).write_text('#!/bin/sh\nexit 127\n')
    (clone.bin / name).chmod(0o755)
  (clone.bin / 'python3.11').symlink_to(sys._base_executable)
  status, _, err = clone.run()
  assert status == 0, err
  assert f'({clone.bin}/python3.11)' in err


def test_says_when_no_python_fits(clone):
  (clone.bin / 'python3').unlink()
  status, out, err = clone.run()
  assert (status, out) == (1, '')
  assert 'no Python 3.11 to 3.14' in err
  assert 'VSSL_PYTHON' in err
  status, out, err = clone.run(VSSL_PYTHON='/no/python')
  assert (status, out) == (1, '')
  assert 'VSSL_PYTHON=/no/python is not' in err
  assert clone.installs() == []
  status, _, err = clone.run(VSSL_PYTHON=sys._base_executable)
  assert status == 0, err


def _choose(clone, **env):
  """Returns what choose_accelerator takes and says, with our fake system."""
  lines = 'choose_accelerator "$1"; echo "$accelerator"'
  result = subprocess.run(
    ['bash', '-euc', f'source "$0"; {lines}',
     clone.root / 'launch/setup.sh', clone.elsewhere],
    env={'PATH': str(clone.bin), **env},
    check=False,
    capture_output=True,
    text=True,
  )  # fmt: skip
  return result.stdout.strip(), result.stderr, result.returncode


@pytest.mark.parametrize(
  'driver, wanted',
  [
    ('580.65.06', 'cuda13'),
    ('610.10', 'cuda13'),
    ('579.99', 'cuda12'),
    ('525.60.13', 'cuda12'),
    ('470.256.02', 'cpu'),
    ('NVIDIA-SMI has failed', 'cpu'),
  ],
)
@pytest.mark.parametrize('source', ['nvidia-smi', 'proc'])
def test_driver_decides_between_cuda_versions(clone, driver, wanted, source):
  if source == 'nvidia-smi':
    smi = clone.bin / 'nvidia-smi'
    smi.write_text(f'#!/bin/sh\necho {driver}\necho {driver}\n')
    smi.chmod(0o755)
  else:
    proc = clone.elsewhere / 'proc/driver/nvidia'
    proc.mkdir(parents=True)
    (proc / 'version').write_text(
      f'NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Wed\n'
      'GCC version:  gcc version 12.2.0\n'
    )
    # A container that sees the host's driver but was given no GPU.
    assert _choose(clone)[0] == 'cpu'
    (clone.elsewhere / 'dev').mkdir()
    (clone.elsewhere / 'dev/nvidia0').touch()
  chosen, said, _ = _choose(clone)
  assert chosen == wanted
  assert f'using {wanted}: ' in said
  if driver[0].isdigit():
    assert driver in said


@pytest.mark.parametrize(
  'device, wanted',
  [('0x0063', 'tpu'), ('0x006f', 'tpu'), ('0x0042', 'cpu')],
  ids=['v5e', 'v6e', 'network card'],
)
def test_tpu_is_told_by_its_chip(clone, device, wanted):
  pci = clone.elsewhere / 'sys/bus/pci/devices/0000:00:04.0'
  pci.mkdir(parents=True)
  (pci / 'vendor').write_text('0x1ae0\n')
  (pci / 'device').write_text(device + '\n')
  assert _choose(clone)[0] == wanted
  (pci / 'vendor').write_text('0x8086\n')
  assert _choose(clone)[0] == 'cpu'


def test_a_choice_that_does_not_exist_is_refused(clone):
  assert _choose(clone, VSSL_ACCELERATOR='tpu')[0] == 'tpu'
  chosen, said, status = _choose(clone, VSSL_ACCELERATOR='gpu')
  assert (chosen, status) == ('', 1)
  assert 'none of cpu, cuda12, cuda13, tpu' in said


def test_settings_files_hold_only_settings():
  files = list((ROOT / 'launch/env').glob('*.env'))
  assert {f.stem for f in files} == {'cpu', 'cuda', 'tpu', 'tpu_pod', 'xpk'}
  for file in files:
    for line in file.read_text().splitlines():
      key, _, value = line.partition('=')
      assert line.startswith('#') or (key.replace('_', '').isupper() and value)


def test_scripts_are_programs():
  for name in ('launch/local.sh', 'launch/test.sh', '.ci/run'):
    assert os.access(ROOT / name, os.X_OK)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_fresh_clone_installs_and_runs(tmp_path):
  # The real pip and the real package; what it reads of the user is PATH, HOME
  # and how pip reaches its index.
  root = tmp_path / 'a clone'
  ignore = shutil.ignore_patterns('.*', 'runs', 'build', '__pycache__')
  shutil.copytree(ROOT, root, ignore=ignore)
  env = {
    key: value
    for key, value in os.environ.items()
    if key in {'PATH', 'HOME'} or key.startswith(('PIP_', 'SSL_', 'HTTP'))
  }
  for start in ('first', 'second'):
    result = subprocess.run(
      ['bash', root / 'launch/local.sh', '--plan'],
      cwd=tmp_path,
      env=env | {'VSSL_ACCELERATOR': 'cpu'},
      check=False,
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
    )
    assert result.returncode == 0, result.stderr
    assert 'latent_student' in result.stdout
    assert ('installing' in result.stderr) == (start == 'first')
  assert (root / '.venv/bin/python').exists()
