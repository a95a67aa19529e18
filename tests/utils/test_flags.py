import pytest

from vssl_jax.utils import flags


def _parse(*argv, needs_page=False):
  parser = flags.parser('prog', 'Does it.', needs_page=needs_page)
  parser.add_argument('--plan', action='store_true')
  return flags.parse(parser, argv)


def test_flags_and_keys_are_told_apart():
  args, keys = _parse(
    '--config=page.py:L',
    '--config.optim.lr=1e-3',
    '--plan',
    '--config_root=/a',
    '--config.seed',
    '3',
    '--config_root=/b',
    '--config.name=a=b',
    '--config.last',
  )
  assert (args.config, args.plan) == ('page.py:L', True)
  assert args.config_root == ['/a', '/b']
  assert keys == ['optim.lr=1e-3', 'seed=3', 'name=a=b', 'last']


def test_without_a_page():
  args, keys = _parse()
  assert (args.config, args.config_root, keys) == ('', [], [])


@pytest.mark.parametrize(
  ('argv', 'needs_page', 'message'),
  [
    (['--plam'], False, 'no such flag: --plam; did you mean --plan?'),
    (['--conf=x.py'], False, 'did you mean --config?'),
    (['nonsense'], False, 'no such flag: nonsense'),
    ([], True, 'required: --config'),
  ],
)
def test_wrong_ones_end_the_program(capsys, argv, needs_page, message):
  with pytest.raises(SystemExit) as stopped:
    _parse(*argv, needs_page=needs_page)
  assert stopped.value.code == 2
  assert message in capsys.readouterr().err


def test_workdir_is_a_key_with_a_flag_of_its_own(capsys):
  _, keys = _parse('--config.seed=1', '--workdir=runs/a b')
  assert keys == ['seed=1', 'workdir=runs/a b']
  with pytest.raises(SystemExit):
    _parse('--workdir=a', '--config.workdir=b')
  assert (
    '--workdir: found --config.workdir together with it'
    in capsys.readouterr().err
  )
