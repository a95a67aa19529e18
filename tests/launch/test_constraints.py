"""launch/constraints.txt: exact versions, for every Python and every extra."""

import configparser
import pathlib
import re

import pytest
from packaging import markers, requirements, utils

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PYTHONS = ('3.11', '3.12', '3.13', '3.14')
LINES = [
  line
  for line in (ROOT / 'launch/constraints.txt').read_text().splitlines()
  if not line.startswith('#')
]


def _declared():
  """Returns {extra or '': [requirement]} of setup.cfg."""
  setup = configparser.ConfigParser()
  setup.read(ROOT / 'setup.cfg')
  groups = {'': setup['options']['install_requires']}
  groups |= setup['options.extras_require']
  return {
    group: [
      requirements.Requirement(line)
      for line in text.strip().splitlines()
      if not line.startswith('#')
    ]
    for group, text in groups.items()
  }


def _pins(python):
  """Returns {name: version} on Linux with this Python."""
  system = markers.default_environment() | {
    'python_version': python,
    'python_full_version': python + '.0',
    'sys_platform': 'linux',
    'platform_machine': 'x86_64',
  }
  pins = {}
  for line in LINES:
    pin = requirements.Requirement(line)
    if pin.marker is None or pin.marker.evaluate(system):
      assert pin.name not in pins, f'{pin.name} twice for {python}'
      pins[utils.canonicalize_name(pin.name)] = str(pin.specifier)[2:]
  return pins


@pytest.mark.parametrize('line', LINES)
def test_line_is_a_version_and_nothing_else(line):
  assert re.fullmatch(r'[A-Za-z0-9._-]+==[A-Za-z0-9.]+( ; [^/:@]+)?', line)


@pytest.mark.parametrize('python', PYTHONS)
def test_every_requirement_has_one_version_that_fits(python):
  pins = _pins(python)
  for group in _declared().values():
    for wanted in group:
      version = pins[utils.canonicalize_name(wanted.name)]
      assert version in wanted.specifier, f'{wanted}: remake, found {version}'


def test_jax_by_python():
  assert _pins('3.11')['jax'] == '0.10.2'  # the last with Python 3.11
  newest = {_pins(p)['jax'] for p in PYTHONS[1:]}
  assert len(newest) == 1
  assert tuple(map(int, newest.pop().split('.')[:2])) >= (0, 11)


def test_torch_is_one_release_and_only_of_parity():
  groups = _declared()
  for group, wanted in groups.items():
    names = {w.name: str(w.specifier) for w in wanted}
    if group == 'parity':
      assert re.fullmatch(r'==\d+\.\d+\.\d+', names['torch'])
    else:
      assert not names.keys() & {'torch', 'transformers', 'timm'}


def test_what_parity_has_alone_is_one_version_and_no_other_requirement():
  lines = (ROOT / 'launch/parity.txt').read_text().splitlines()
  lines = [line for line in lines if not line.startswith('#')]
  assert lines
  declared = {w.name for group in _declared().values() for w in group}
  for line in lines:
    assert re.fullmatch(r'[a-z0-9-]+==[0-9.]+', line)
    assert line.split('==')[0] not in declared


def test_the_hook_and_the_tests_use_the_same_ruff():
  text = (ROOT / '.pre-commit-config.yaml').read_text()
  assert re.findall(r'rev: v([\d.]+)', text) == [_pins('3.13')['ruff']]
