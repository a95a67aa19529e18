"""The launchers of other machines, for real but for gcloud, xpk and kubectl."""

import os
import pathlib
import shlex
import shutil
import subprocess

import pytest

from tests import test_docs

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOOLS = 'bash cat cksum dirname env flock git grep gzip head mkdir mktemp '
TOOLS += 'rm seq sleep tail tar tee touch tr'
# Flags as the programs document them: gcloud's help (Google Cloud SDK 528),
# and xpk's parsers of June 2026.
TPU_VM = 'gcloud compute tpus tpu-vm '
FLAGS = {
  TPU_VM + 'create': '--zone --accelerator-type --version --spot',
  TPU_VM + 'delete': '--zone --quiet',
  TPU_VM + 'describe': '--zone --format',
  TPU_VM + 'scp': '--zone --worker',
  TPU_VM + 'ssh': '--zone --worker --command --output-directory',
  'xpk workload create': '--workload --cluster --zone --tpu-type --num-slices '
  '--base-docker-image --script-dir --max-restarts --env --command '
  '--termination-grace-period-seconds',
  'xpk workload list': '--cluster --zone --wait-for-job-completion',
  'kubectl logs': '--prefix --tail --selector',
  'sbatch launch/slurm.sbatch': '',
  'srun': '--kill-on-bad-exit --label',
}
TRAINER = ['--config=configs/salt.py:L', '--config.workdir=/mnt/a run']
# Writes down its words; what it says and its status are files of a test's.
STUB = """#!/usr/bin/env bash
printf '%s\\0' "$(basename "$0")" "$@" >>"$STUBS/calls"
printf '\\n' >>"$STUBS/calls"
for word; do
  case $word in --output-directory=*) logs=${word#*=} ;; esac
done
for word; do
  if [[ -e $STUBS/$word.sh ]]; then source "$STUBS/$word.sh"; fi
done
"""


class Launcher:
  """A clone with one commit, and programs that only write down their words."""

  def __init__(self, folder):
    self.root, self.stubs = folder / 'a clone', folder / 'stubs'
    self.stubs.mkdir()
    shutil.copytree(ROOT / 'launch', self.root / 'launch')
    for name in ('pyproject.toml', 'setup.cfg'):
      shutil.copy(ROOT / name, self.root)
    for tool in [*TOOLS.split(), 'basename']:
      (self.stubs / tool).symlink_to(shutil.which(tool))
    for program in ('gcloud', 'xpk', 'kubectl', 'srun', 'scontrol'):
      (self.stubs / program).write_text(STUB)
      (self.stubs / program).chmod(0o755)
    self.env = {'PATH': str(self.stubs), 'STUBS': str(self.stubs)}
    for words in (
      'init -q',
      'add .',
      '-c user.name=a -c user.email=a@b commit -q -m a',
    ):
      subprocess.run(['git', *words.split()], cwd=self.root, check=True)

  def run(self, script, *args, **env):
    result = subprocess.run(
      ['bash', self.root / 'launch' / script, *args],
      cwd=self.root,
      env=self.env | env,
      check=False,
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      timeout=60,
    )
    return result.returncode, result.stdout, result.stderr

  def answer(self, word, code):
    """What a program does that is called with a word."""
    (self.stubs / f'{word}.sh').write_text(code)

  def calls(self):
    path = self.stubs / 'calls'
    lines = path.read_text().split('\0\n') if path.exists() else []
    return [line.split('\0') for line in lines if line]


@pytest.fixture
def launcher(tmp_path):
  return Launcher(tmp_path)


def _plain(line):
  """Returns the words of a printed command, and checks its flags."""
  words = shlex.split(line)
  known = [name for name in FLAGS if f'{shlex.join(words)} '.startswith(name)]
  for name in known:
    rest = words[len(name.split()) :]
    if name == 'srun':
      rest = rest[: next(i for i, w in enumerate(rest) if w.endswith('python'))]
    if name.startswith('sbatch'):
      rest = []
    used = {w.partition('=')[0] for w in rest if w.startswith('--')}
    assert used <= set(FLAGS[name].split()), f'{name}: {used}'
  assert known or words[0] in {'git', 'mkdir', 'rm', 'tar'}, line
  return words


@pytest.mark.parametrize(
  'script, words, wanted',
  [
    ('tpu_pod.sh', ['create'], ['create']),
    ('tpu_pod.sh', ['delete'], ['delete']),
    ('tpu_pod.sh', ['run', *TRAINER], ['-p', 'archive', 'scp', 'ssh']),
    ('xpk.sh', TRAINER, ['-rf', '-p', 'archive', '-xzf', 'create', 'list']),
    ('slurm.sbatch', TRAINER, ['launch/slurm.sbatch', '--label']),
  ],
)
def test_a_dry_run_prints_what_a_run_would_do(launcher, script, words, wanted):
  # Nothing is there that could be run.
  for program in ('gcloud', 'xpk', 'kubectl'):
    (launcher.stubs / program).unlink()
  status, out, err = launcher.run(script, '--dry-run', *words)
  assert status == 0, err
  lines = [_plain(line) for line in out.splitlines()]
  for line, word in zip(lines, wanted, strict=True):
    assert word in line
  assert not (launcher.root / 'runs').exists()
  if words[1:]:
    started = [w for line in lines for w in line if 'launch/local.sh' in w]
    started = started or [shlex.join(lines[-1])]
    assert shlex.join(TRAINER) in started[0]


def test_the_trainer_gets_its_flags_through_all_shells(launcher):
  _, out, _ = launcher.run('tpu_pod.sh', '--dry-run', 'run', *TRAINER)
  command = _plain(out.splitlines()[-1])[-2].removeprefix('--command=')
  *prepare, last = command.split(' && ')
  assert 'VSSL_CLUSTER=1' in prepare[-1]
  words = shlex.split(last)
  assert words == ['exec', 'bash', 'launch/local.sh', *TRAINER]
  test_docs.check(words[1:])


def test_what_is_run_is_what_a_dry_run_prints(launcher):
  for script, words in (('tpu_pod.sh', ['run']), ('xpk.sh', [])):
    _, out, _ = launcher.run(script, '--dry-run', *words, *TRAINER)
    status, _, err = launcher.run(script, *words, *TRAINER)
    assert status == 0, err
    printed = [shlex.split(line) for line in out.splitlines()]
    programs = [line for line in printed if line[0] in ('gcloud', 'xpk')]
    assert launcher.calls() == programs
    (launcher.stubs / 'calls').unlink()
  packed = launcher.root / 'runs/xpk/vssl-jax/clone/launch/local.sh'
  assert packed.exists()


def test_a_folder_that_others_made_is_not_removed(launcher):
  for words in ('.', 'x'):
    packed = launcher.root / 'runs/xpk' / words
    packed.mkdir(parents=True, exist_ok=True)
    (packed / 'mine').touch()
    status, _, err = launcher.run('xpk.sh', *TRAINER, XPK_WORKLOAD=words)
    assert (status, 'was not made by xpk.sh' in err) == (1, True)
    assert (packed / 'mine').exists()
  # What the hosts of a slice are given, run here.
  _, out, _ = launcher.run('tpu_pod.sh', '--dry-run', 'run', *TRAINER)
  command = _plain(out.splitlines()[-1])[-2].removeprefix('--command=')
  home = launcher.root.parent / 'home'
  (home / 'vssl_jax').mkdir(parents=True)
  (home / 'vssl_jax/mine').touch()
  pack = [
    'tar',
    '-czf',
    home / 'clone.tar.gz',
    '-C',
    launcher.root,
    'setup.cfg',
  ]
  subprocess.run(pack, check=True)
  for start, wanted in enumerate((2, 127, 127)):
    made = start > 0  # by the command itself; 127: no program to start here
    if start == 1:
      shutil.rmtree(home / 'vssl_jax')
    result = subprocess.run(
      ['bash', '-c', command],
      cwd=home,
      env=launcher.env | {'HOME': str(home)},
      check=False,
      capture_output=True,
      text=True,
    )
    assert result.returncode == wanted, result.stderr
    assert (home / 'vssl_jax/mine').exists() == (not made)
    assert (home / 'vssl_jax/setup.cfg').exists() == made
    assert ('error: ~/vssl_jax on' in result.stderr) == (not made)


def test_settings_come_from_the_env_file_unless_set(launcher):
  _, out, _ = launcher.run('tpu_pod.sh', '--dry-run', 'create')
  assert '--accelerator-type=v5p-128 --version=v2-alpha-tpuv5 --zone' in out
  _, out, _ = launcher.run(
    'tpu_pod.sh', '--dry-run', 'create', TPU_TYPE='v6e-64', TPU_SPOT='1'
  )
  assert '--accelerator-type=v6e-64' in out
  assert '--spot' in out


def test_a_host_that_fails_is_shown_and_the_status_kept(launcher):
  said = 'error: process 1 of 2: no data'
  launcher.answer('ssh', f'echo "{said}" >"$logs/1.log"; exit 3\n')
  launcher.answer('describe', 'echo READY\n')
  status, _, err = launcher.run('tpu_pod.sh', 'run', *TRAINER)
  assert status == 3
  assert f'first message: {said}' in err
  launcher.answer('list', 'exit 125\n')
  launcher.answer(
    'logs', 'echo "[pod/a] well"; echo "[pod/b] error: no data"\n'
  )
  status, _, err = launcher.run('xpk.sh', *TRAINER)
  assert status == 125
  assert 'first message: [pod/b] error: no data' in err
  launcher.answer('scp', 'exit 9\n')
  (launcher.stubs / 'calls').unlink()
  assert launcher.run('tpu_pod.sh', 'run', *TRAINER)[0] == 9
  assert not any('ssh' in call for call in launcher.calls())


def test_tpus_that_were_taken_away_are_asked_for_again(launcher):
  again = '[[ -e $STUBS/again ]] && exit 0\n: >"$STUBS/again"; exit 1\n'
  launcher.answer('ssh', again)
  launcher.answer('describe', 'echo PREEMPTED\n')
  status, _, err = launcher.run('tpu_pod.sh', 'run', *TRAINER, TPU_SPOT='1')
  assert status == 0, err
  asked = [call[4] for call in launcher.calls()]
  wanted = 'scp ssh describe delete create scp ssh'
  assert asked == wanted.split()
  # Without TPU_SPOT that is a failure.
  (launcher.stubs / 'again').unlink()
  assert launcher.run('tpu_pod.sh', 'run', *TRAINER)[0] == 1


def test_a_checkpoint_after_sigterm_is_status_143(launcher):
  launcher.answer(
    'ssh', 'echo "SIGTERM: saved step 7" >"$logs/0.log"; exit 1\n'
  )
  launcher.answer('describe', 'echo READY\n')
  status, _, err = launcher.run('tpu_pod.sh', 'run', *TRAINER)
  assert (status, 'with a checkpoint' in err) == (143, True)


@pytest.mark.parametrize(
  'said, status, again, first',
  [
    (['task 0: Exited with exit code 143'] * 2, 143, True, ''),
    (['tasks 0-1: Exited with exit code 143'], 143, True, ''),
    # What ends the others leaves 143 behind, too.
    (['task 1: Killed', 'task 0: Terminated'], 143, False, 'task 1: Killed'),
    (['task 1: Exited with exit code 1'], 1, False, 'task 1: Exited'),
    ([], 0, False, ''),
  ],
)
def test_slurm_queues_again_what_was_saved(
  launcher, said, status, again, first
):
  python = launcher.root / '.venv/bin/python'
  python.parent.mkdir(parents=True)
  python.write_text('#!/usr/bin/env bash\n')
  python.chmod(0o755)
  stamp = subprocess.run(
    ['bash', '-c', 'source launch/setup.sh; stamp'],
    cwd=launcher.root,
    env=launcher.env,
    check=True,
    capture_output=True,
    text=True,
  ).stdout
  (python.parents[1] / '.vssl_made').write_text(f'{stamp}cpu\n')
  lines = ''.join(f'echo "srun: error: vm: {line}" >&2\n' for line in said)
  ids = 'echo $JAX_LOCAL_DEVICE_IDS >"$STUBS/ids"\n'
  launcher.answer('--label', f'{ids}{lines}exit {status}\n')
  got, _, err = launcher.run(
    'slurm.sbatch',
    *TRAINER,
    VSSL_ACCELERATOR='cpu',
    SLURM_JOB_ID='7',
    SLURM_SUBMIT_DIR=str(launcher.root),
    SLURM_GPUS_ON_NODE='8',
    SLURM_NTASKS='2',
    SLURM_NNODES='2',
  )
  assert got == status, err
  asked = ['scontrol', 'requeue', '7']
  assert (asked in launcher.calls()) == again
  assert f'first message: srun: error: vm: {first}' in err or not first
  assert launcher.calls()[0][:3] == ['srun', '--kill-on-bad-exit=1', '--label']
  # One task on a node has all of its GPUs.
  assert (launcher.stubs / 'ids').read_text() == '0,1,2,3,4,5,6,7\n'


def test_mistakes_are_refused_with_a_remedy(launcher):
  for script, words in (('tpu_pod.sh', ['run']), ('xpk.sh', [])):
    status, _, err = launcher.run(script, *words, '--config=configs/salt.py')
    assert (status, 'no --config.workdir=/' in err) == (1, True), err
  status, _, err = launcher.run('tpu_pod.sh', 'stop')
  assert (status, "'stop', wanted create, run or delete" in err) == (1, True)
  status, _, err = launcher.run('slurm.sbatch')
  assert (status, 'not in a job' in err) == (1, True)
  status, _, err = launcher.run(
    'slurm.sbatch', SLURM_JOB_ID='1', SLURM_SUBMIT_DIR=str(launcher.stubs)
  )
  assert (status, 'submit from the clone' in err) == (1, True)
  (launcher.stubs / 'gcloud').unlink()
  status, _, err = launcher.run('tpu_pod.sh', 'create')
  assert (status, 'no gcloud here' in err) == (1, True)


def test_launchers_are_programs():
  for name in ('tpu_pod.sh', 'xpk.sh'):
    assert os.access(ROOT / 'launch' / name, os.X_OK)
