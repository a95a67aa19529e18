"""Every command that a document shows runs, or says what it needs.

A fenced block is run as written, unless the line before it is an HTML comment
`<!-- needs: <what> -->` with gpu, tpu, network, data or cluster; of those, and
of commands within a sentence or a table, scripts, modules, flags, config keys
and paths are checked.
"""

import configparser
import contextlib
import functools
import importlib
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from typing import NamedTuple

import pytest

from vssl_jax import main

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENTS = (
  'README.md',
  'configs/README.md',
  'launch/README.md',
  'tests/benchmarks/README.md',
  'vssl_jax/data/README.md',
  'vssl_jax/evals/README.md',
  'vssl_jax/methods/README.md',
  'vssl_jax/weights/README.md',
)
NEEDS = {'gpu', 'tpu', 'network', 'data', 'cluster'}
# Run by another test or script, which must hold the words on the right.
RUN_ELSEWHERE = {
  'bash launch/test.sh': ('.ci/run', 'bash launch/test.sh\n'),
  'python -m vssl_jax.main': ('launch/local.sh', '-m vssl_jax.main "$@"'),
}
# Blocks within lists are indented.
FENCE = re.compile(
  r'^( *)(?:<!-- needs: ([^\n]+) -->\n\1)?```(.*?)\n(.*?)^\1```$',
  re.MULTILINE | re.DOTALL,
)
UNCHECKED = {'cd', 'git', 'export', 'source', 'ls', 'cat', 'mkdir', 'apt-get'}
REMOTE = {'launch/slurm.sbatch', 'launch/tpu_pod.sh', 'launch/xpk.sh'}


class Block(NamedTuple):
  """A fenced block of a document."""

  language: str
  needs: set[str]
  text: str


def blocks(text):
  """Yields the fenced blocks of a Markdown text."""
  for _, mark, language, indented in FENCE.findall(text):
    body = textwrap.dedent(indented)
    needs = set(re.split(r',\s*', mark)) if mark else set()
    assert needs <= NEEDS, f'needs {needs}, of which {needs - NEEDS} is unknown'
    yield Block(language.strip(), needs, body)


def commands(body):
  """Yields the commands of a bash block, comments and line breaks undone."""
  for line in body.replace('\\\n', ' ').splitlines():
    words = shlex.split(line, comments=True)
    if words:
      yield words


def inline(text):
  """Yields (line, command) for commands in a sentence or in a table."""
  for line in FENCE.sub('', text).splitlines():
    for command in re.findall(r'`((?:bash|python|pip) [^`]+)`', line):
      yield line, shlex.split(command)


def check(words):
  """Raises where a command names something that does not exist."""
  words = list(words)
  while re.match(r'[A-Z_]+=', words[0]):
    words.pop(0)
  program, *rest = words
  if program == 'bash':
    script, *rest = rest
    _exists(script)
    if script == 'launch/local.sh':
      _check_flags('vssl_jax.main', rest)
    elif script == 'launch/test.sh':
      _check_pytest(rest)
    elif script in REMOTE:
      _check_flags('vssl_jax.main', _own(rest))
  elif program in {'sbatch', 'kubectl', 'sky'}:
    (file,) = [word for word in rest if word.startswith('launch/')]
    _exists(file)
    _check_flags('vssl_jax.main', _own(rest[rest.index(file) + 1 :]))
  elif program == 'python' and rest[0] == '-m':
    _check_flags(rest[1], rest[2:])
  elif program == 'python' and rest[0].startswith('tests/benchmarks/'):
    _check_script(*rest)
  elif program == 'pip':
    _check_pip(rest)
  else:
    assert program in UNCHECKED, f'{words}: nobody knows how to check {program}'


def _own(rest):
  """Returns the flags that the trainer gets, of a launcher's words."""
  flags = [word.removeprefix('FLAGS=') for word in rest]
  return [word for word in flags if word.startswith('--config')]


def _check_script(script, *flags):
  """A benchmark says its own flags."""
  _exists(script)
  path = ROOT / script
  text = path.read_text()
  # Benchmarks may share their command line with one that they import.
  for name in re.findall(r'^import (\w+)$', text, re.MULTILINE):
    if path.with_name(f'{name}.py').exists():
      text += path.with_name(f'{name}.py').read_text()
  for flag in flags:
    name = flag.partition('=')[0]
    assert f"add_argument('{name}'" in text, f'{script} has no {name}'


def _exists(path):
  assert (ROOT / path.partition('::')[0]).exists(), f'no {path}'


def _check_pip(rest):
  setup = configparser.ConfigParser()
  setup.read(ROOT / 'setup.cfg')
  names = setup.options('options.extras_require')
  for word in rest:
    if word.startswith('.'):
      extras = filter(None, re.sub(r'^\.\[?|\]$', '', word).split(','))
      assert set(extras) <= set(names), f'{word}: no such extra'
    elif '/' in word:
      _exists(word)


def _check_pytest(rest):
  help_text = _help('pytest')
  for word in rest:
    if word.startswith('--'):
      assert word.partition('=')[0] in help_text, f'pytest has no {word}'
    elif '/' in word:
      _exists(word)


@functools.cache
def _help(module):
  result = subprocess.run(
    [sys.executable, '-m', module, '--help'],
    cwd=ROOT,
    check=True,
    capture_output=True,
    text=True,
  )
  return result.stdout


def _check_flags(module, rest):
  assert importlib.util.find_spec(module), f'no module {module}'
  own = [w for w in rest if not w.startswith('--config')]
  if module == 'vssl_jax.main':
    arguments, assignments = main.flags(rest)
    with contextlib.chdir(ROOT):
      main.resolve(arguments.config, assignments, tuple(arguments.config_root))
    return
  if len(own) < len(rest):
    _check_flags('vssl_jax.main', [w for w in rest if w not in own])
  for word in own:
    if word.startswith('--'):
      assert re.search(rf'{word.partition("=")[0]}\b', _help(module)), (
        f'{module} has no {word}'
      )


def text_of(name):
  return (ROOT / name).read_text()


def shown_in(name):
  return [
    words
    for block in blocks(text_of(name))
    if block.language == 'bash'
    for words in commands(block.text)
  ]


def _pages(name):
  """Returns file -> text of the pages that a document shows whole."""
  texts = [x.text for x in blocks(text_of(name)) if 'def get_config' in x.text]
  modules = [re.search(r"default\('(\w+)'", x)[1] for x in texts]
  return {f'{m}.py': x for m, x in zip(modules, texts, strict=True)}


def _where(words, pages, folder):
  """Returns a command with shown pages in `folder`, which is allowed."""
  found = {f'--config={file}': f'--config={folder / file}' for file in pages}
  out = [found.get(word, word) for word in words]
  return out if out == words else [*out, f'--config_root={folder}']


@pytest.mark.parametrize('name', DOCUMENTS)
def test_blocks_have_a_language(name):
  for block in blocks(text_of(name)):
    assert block.language in {'bash', 'python', 'text', 'csv'}, block
    if block.language not in {'bash', 'python'}:
      assert not re.search(r'^\$? ?(bash|python|pip) ', block.text, re.M), block


@pytest.mark.parametrize('name', DOCUMENTS)
def test_commands_name_what_exists(name, tmp_path, monkeypatch):
  pages = _pages(name)
  for file, text in pages.items():
    (tmp_path / file).write_text(text)
  monkeypatch.syspath_prepend(tmp_path)  # a page may hold a method, too
  for block in blocks(text_of(name)):
    if block.language == 'bash':
      for words in commands(block.text):
        check(_where(words, pages, tmp_path))
    elif block.language == 'python':
      compile(block.text, name, 'exec')
      wanted = r'^(?:import|from) (vssl_jax[\w.]*)'
      for module in re.findall(wanted, block.text, re.MULTILINE):
        assert importlib.util.find_spec(module), module
  shown = shown_in(name)
  for line, words in inline(text_of(name)):
    check(words)
    assert (
      words in shown
      or ' '.join(words) in RUN_ELSEWHERE
      or re.search(rf'<!-- needs: .*({"|".join(NEEDS)})', line)
    ), f'{words}: no block shows it and its line does not say what it needs'


@pytest.mark.parametrize('name', DOCUMENTS)
def test_links_lead_somewhere(name):
  for target in re.findall(r'\]\(([^)#]+)(?:#[^)]*)?\)', text_of(name)):
    if '://' not in target:
      assert ((ROOT / name).parent / target).exists(), f'{name}: {target}'


def test_tests_that_are_named_exist():
  files = (ROOT / 'tests').rglob('test_*.py')
  text = '\n'.join(path.read_text() for path in files)
  defined = set(re.findall(r'^def (test_\w+)\(', text, re.MULTILINE))
  named = re.findall(r'::(test_\w+)', '\n'.join(map(text_of, DOCUMENTS)))
  assert len(named) > 20
  assert set(named) <= defined


def test_what_runs_elsewhere_does():
  for place, words in RUN_ELSEWHERE.values():
    assert words in text_of(place)


@pytest.mark.parametrize(
  'command',
  [
    'bash launch/lokal.sh',
    'bash launch/local.sh --plam',
    'bash launch/local.sh --config=configs/sal.py',
    'bash launch/local.sh --config=configs/salt.py:XXL',
    'bash launch/local.sh --config.optim.learning=1',
    'bash launch/local.sh --config.seed=one',
    'bash launch/slurm.sbatch --dry-run --config=configs/salt.py:XXL',
    'sbatch --nodes=2 launch/slurm.sh',
    'sbatch launch/slurm.sbatch --config.seed=one',
    'sky jobs launch launch/sky.yaml',
    'bash launch/test.sh tests/test_nothing.py',
    'bash launch/test.sh --no-such-option',
    'python -m vssl_jax.nothing',
    'pip install .[cuda11]',
    'pip install -c launch/nothing.txt .',
    'rm -rf runs',
  ],
)
def test_a_wrong_command_is_found(command):
  with pytest.raises((AssertionError, ValueError, SystemExit)):
    check(shlex.split(command))


def test_a_right_command_passes():
  for block in blocks(
    '<!-- needs: data, gpu -->\n```bash\nbash launch/local.sh \\\n'
    '  --config=configs/salt.py:L  --config.seed=1 # why\n\n```\n'
  ):
    assert block.needs == {'data', 'gpu'}
    (words,) = commands(block.text)
    assert words[2:] == ['--config=configs/salt.py:L', '--config.seed=1']
    check(words)
  check(shlex.split('pip install -c launch/constraints.txt .[cuda13,test]'))
  with pytest.raises(AssertionError, match='unknown'):
    list(blocks('<!-- needs: luck -->\n```bash\n```\n'))


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.timeout(3600)
@pytest.mark.parametrize('name', DOCUMENTS)
def test_commands_run(name, tmp_path):
  # What a reader has: the files of the clone, and no results of ours.
  clone = tmp_path / 'vssl_jax'
  ignore = shutil.ignore_patterns('.*', 'runs', 'build', '__pycache__')
  shutil.copytree(ROOT, clone, ignore=ignore)
  # The demo takes minutes and starts more than one document.
  earlier = DOCUMENTS[: DOCUMENTS.index(name)]
  done = [words for other in earlier for words in shown_in(other)]
  for block in blocks(text_of(name)):
    if block.needs:
      continue
    if block.language == 'python':
      _run([sys.executable, '-c', block.text], clone)
    for words in commands(block.text) if block.language == 'bash' else ():
      if ' '.join(words) not in RUN_ELSEWHERE and words not in done:
        _run(_program(words), clone)
  if name == 'README.md':
    _the_demo_learned(clone / 'runs/demo/demo.json')


def _the_demo_learned(path):
  """Raises where a baseline sees nearly what the trained encoder does."""
  rows = json.loads(path.read_text())['accuracy']
  accuracy = {name: row['accuracy'] for name, row in rows.items()}
  trained = accuracy.pop('latent_student (trained)')
  accuracy.pop('pixel_teacher (trained)')
  for name, other in accuracy.items():
    assert trained > other + 0.15, name


def _program(words):
  """Puts our Python where the launchers would make one."""
  if words[:2] == ['bash', 'launch/local.sh']:
    return [sys.executable, '-P', '-m', 'vssl_jax.main', *words[2:]]
  if words[:2] == ['bash', 'launch/test.sh']:
    return [sys.executable, '-m', 'pytest', *words[2:]]
  return [sys.executable, *words[1:]] if words[0] == 'python' else words


def _run(words, folder):
  result = subprocess.run(
    words,
    cwd=folder,
    env=os.environ | {'PYTHONPATH': str(folder)},
    check=False,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  assert result.returncode == 0, f'{words}\n{result.stdout[-4000:]}'
