"""Every key has a range, and every value outside of it is refused in a line."""

import math
import pathlib

import pytest

from vssl_jax import config as config_lib
from vssl_jax import main, methods
from vssl_jax.utils import ranges

ROOT = pathlib.Path(__file__).resolve().parents[2]
# What a page or a command line may hold where something else is wanted.
VALUES = {
  'wrong type': ({}, None, b'x', [1], (1, 'x', None), True, 1, 1.5, 'x'),
  'negative': (-1, -2, -1.0, -2.5, (-1, -1), -(2**63)),
  'zero': (0, 0.0, (0, 0), (0.0, 0.0), ()),
  'huge': (10**9 + 1, 2**63, 10**5000, 1e300, (2**63,) * 3, 'x' * 10**5),
  'not finite': (math.nan, math.inf, -math.inf, (math.nan, 1.0)),
  'nonsense': (
    '(',
    '\0',
    'nan',
    '\ud800',
    '[x',
    'x' * 300,
    ('(',),
    (('(', ()),),
  ),
}
# As they came in with the audit: each ended in a traceback, or was accepted.
REFUSED = {
  'checkpoint.every': ('0', '-1'),
  'log.every': ('0',),
  'mesh.data': ('0',),
  'mesh.overrides': ("(('(', (None,)),)", "(('.*', ('tensor',)),)"),
  'optim.lr_batch': ('0',),
  'optim.accumulate': ('0', '-1'),
  'optim.lr': ('-1', '1e999', '-1e-9'),
  'optim.b2': ('1.5', '1'),
  'optim.clip': ('-1',),
  'optim.eps': ('0', '1e-300'),
  'method.phases': ("('vit',)", "('name',)", "('phases',)"),
  'method.latent_student.teacher': ('@ema/predictor', '@ema/', '@'),
  'method.vit.patch': ('(2,0,8)', '(2,8)'),
  'method.vit.dtype': ('float99',),
  'method.pixel_teacher.decoder.kind': ('x',),
  'method.latent_student.ema': ('(0.9,)', '(0.9,1.1)'),
  'method.latent_student.masks': ('tube:2', 'x'),
  'data.size': ('abc', '(0,1)', '(1,2,3)'),
  'data.retries': ('-1',),
  'data.memory_limit_mb': ('-5',),
  'data.stride': ('1000000000',),
  'data.max_bad_fraction': ('-1', '2'),
  'data.crop_scale': ('(0,0)', '(1,0.5)'),
  'data.fps': ('-1',),
  'data.std': ('(0,)', '(1e-300,)'),
  'data.deadline_s': ('0', '3601'),
  'data.holdout': ('-.1', '1'),
  'data.sampling': ('spread',),
  'seed': (str(2**63), '-1'),
  'checkpoint.keep_phases': ("('(',)",),
  'probe.segments': ('0',),
  'probe.lrs': ('(0.1,-0.1)',),
  'finetune.epochs': ('0',),
  'batch_size': ('0', '1000000000'),
}  # fmt: skip


def _set(config, key, value):
  *parents, last = key.split('.')
  for parent in parents:
    config = config[parent]
  with config.ignore_type(), config.unlocked():
    config[last] = value


def _declared():
  """Returns (method, key, default, range) of every key of every method."""
  common = [('salt', *item) for item in config_lib.KEYS.flat()]
  own = [
    (method, f'method.{key}', declared)
    for method in methods.METHODS
    for key, declared in methods.keys(method).flat()
  ]
  return [(method, key, *declared) for method, key, declared in common + own]


@pytest.mark.slow
def test_all_keys_against_all_kinds_of_bad_values():
  configs = {method: config_lib.default(method) for method in methods.METHODS}
  for method, key, default, span in _declared():
    texts = {
      kind: [text for value in values if (text := span.refusal(value))]
      for kind, values in VALUES.items()
    }
    every = [text for of_kind in texts.values() for text in of_kind]
    assert all('found ' in text and 'wanted ' in text for text in every), key
    assert not any('\n' in text or len(text) > 1200 for text in every), key
    kinds = {kind for kind, of_kind in texts.items() if of_kind}
    assert 'wrong type' in kinds, key
    if isinstance(default, float | int) and not isinstance(default, bool):
      assert kinds >= {'not finite', 'nonsense', 'huge'}, key
    if key == 'method.name':
      continue
    _set(configs[method], key, b'x')
    with pytest.raises(ValueError, match=f'^{key}: found b') as error:
      config_lib.check(configs[method])
    assert f'--config.{key}' in str(error.value)
    _set(configs[method], key, default)


@pytest.mark.parametrize(
  ('key', 'text'), [(k, text) for k, texts in REFUSED.items() for text in texts]
)
def test_bad_values_end_in_one_line(key, text, capsys):
  arguments = ['--config=configs/salt_single_gpu.py', f'--config.{key}={text}']
  assert main.main([*arguments, '--plan']) == 2
  out, err = capsys.readouterr()
  assert err.count('\n') == 1
  assert err.startswith('error: ')
  assert key in err
  assert 'found' in err
  assert 'wanted' in err.lower()
  assert not out


def test_every_page_is_within_the_ranges():
  for page in sorted((ROOT / 'configs').glob('*.py')):
    config_lib.check(config_lib.load(str(page))[1])


def test_unknown_keys_are_refused_with_the_nearest():
  config = config_lib.default()
  with config.unlocked():
    config.optim.learning_rate = 1.0
  with pytest.raises(
    ValueError, match=r'optim.learning_rate: found 1.0 .* does not exist'
  ):
    config_lib.check(config)


def test_jobs_are_those_of_the_program():
  assert set(main.JOBS) == set(config_lib.KEYS['job'][1].values)
  assert set(main.PLANS) == set(main.JOBS)


def test_a_default_outside_of_its_range_is_refused():
  with pytest.raises(ValueError, match='the default of b: found 0, wanted'):
    ranges.Section(a=ranges.Section(b=(0, ranges.Whole(1))))


@pytest.mark.parametrize(
  ('span', 'inside', 'outside', 'words'),
  [
    (ranges.Whole(1, 3), (1, 3), (0, 4, 1.0, True, '1'), 'of at most 3'),
    (ranges.Whole(1, also=(-1,)), (-1, 5), (0, -2), 'or -1'),
    (ranges.Real(0, below=1), (0, 0.0, 0.99), (1, -1e-9, math.nan), 'below 1'),
    (ranges.Real(above=0), (1e-9,), (0, math.inf, 'x', None), 'above 0'),
    (ranges.Choice((1, 3)), (1, 3), (2, True, '1', 1.0), r'one of \(1, 3\)'),
    (ranges.Flag(), (True, False), (0, 1, 'True'), 'True or False'),
    (ranges.Text(), ('', 'x'), (1, b'x', 'a\0b'), 'a string'),
    (ranges.Text(ranges.pattern), ('', 'a.*'), ('(',), 'regular exp'),
    (
      ranges.Tuple(ranges.Real(0), lengths=(2,), rising=True),
      ((0, 1), (1.0, 1.0)),
      ((1, 0), (1,), (1, 'x'), [0, 1], 1),
      'rising order',
    ),
    (ranges.Tuple(ranges.Text(), unique=True), ((), ('a', 'b')), (('a',) * 2,),
     'none of them twice'),
  ],
)  # fmt: skip
def test_ranges(span, inside, outside, words):
  for value in inside:
    assert not span.refusal(value)
  for value in outside:
    assert 'found ' in span.refusal(value)
  with pytest.raises(ValueError, match=f'key: found .*{words}'):
    ranges.Section(key=(inside[0], span)).check(
      config_lib.ml_collections.ConfigDict({'key': outside[0]})
    )


def test_numbers_are_declared_with_bounds():
  """A number without an upper bound can be too large for a device."""
  free = {
    key
    for method in methods.METHODS
    for key, (_, span) in config_lib.keys(method).flat()
    if isinstance(span, ranges.Whole)
    and (span.high is None or span.low is None)
  }
  assert not free


def test_the_program_names_the_page_that_is_none(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  for name, text, message in (
    ('page.txt', 'x = 1\n', 'wanted a page, which ends in .py'),
    ('a.py', 'def get_config(v):\n  return 1 / 0\n', 'a.py, line 2: ZeroDiv'),
    ('b.py', 'import nothing_of_that_name\n', 'b.py, line 1: ModuleNotFound'),
    ('c.py', 'def get_config(v)\n', 'c.py, line 1: expected'),
    ('d.py', 'def get_config(v):\n  return {}\n', 'get_config returned {}'),
  ):
    (tmp_path / name).write_text(text)
    assert main.main([f'--config={name}', '--plan']) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count('\n') == 1
