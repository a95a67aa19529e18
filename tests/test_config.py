import ast
import pathlib
import re
import runpy

import ml_collections
import pytest

from vssl_jax import config as config_lib
from vssl_jax import main
from vssl_jax.checkpoint import retention
from vssl_jax.data import options
from vssl_jax.models import framewise, vit
from vssl_jax.utils import config_io

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = 'from vssl_jax import config\n\n\ndef get_config(variant=""):\n'


def _page(folder, body='  return config.default()\n', name='page.py'):
  path = folder / name
  path.write_text(PAGE + body)
  return path


def _config():
  return ml_collections.ConfigDict(
    {
      'lr': 1.0,
      'steps': 3,
      'on': True,
      'name': 'x',
      'phases': ('a', 'b'),
      'optim': {'clip': 0.0, 'warmup': -1},
    }
  )


@pytest.mark.parametrize(
  ('assignment', 'key', 'value'),
  [
    ('lr=3', 'lr', 3.0),
    ('lr=1e-3', 'lr', 1e-3),
    ('steps=1e4', 'steps', 10_000),
    ('on=false', 'on', False),
    ('name=5', 'name', '5'),
    ('name=a=b', 'name', 'a=b'),
    ("phases=('c',)", 'phases', ('c',)),
    ('phases=c', 'phases', ('c',)),
    ('phases=[1, 2]', 'phases', (1, 2)),
    ('phases=()', 'phases', ()),
    ('optim.warmup=0', 'optim.warmup', 0),
  ],
)
def test_values_take_the_type_of_what_they_replace(assignment, key, value):
  config = config_lib.override(_config(), [assignment])
  found = dict(config_io.flatten(config))
  assert found.pop(key) == value
  assert type(dict(config_io.flatten(config))[key]) is type(value)
  rest = dict(config_io.flatten(_config()))
  rest.pop(key)
  assert found == rest


@pytest.mark.parametrize(
  ('assignment', 'message'),
  [
    ('optim.clp=1', r'no such key; did you mean --config.optim.clip\?'),
    ('optim=1', r'optim is a section with keys \['),
    ('lr=fast', r"--config.lr: found 'fast', wanted a float such as 1.0"),
    ('steps=2.5', r"found '2.5', wanted an int such as 3"),
    ('on=maybe', r"found 'maybe', wanted True or False"),
    ('lr', r'no value; write --config.lr=<value>'),
  ],
)
def test_bad_assignments_are_refused(assignment, message):
  with pytest.raises(ValueError, match=message):
    config_lib.override(_config(), [assignment])


def test_a_page_keeps_its_method():
  _, config = config_lib.load('configs/salt_single_gpu.py')
  assert config_lib.override(config, ['method.name=salt']).method.name == 'salt'
  with pytest.raises(ValueError, match=r"found 'layerlock' .* of 'sal"):
    config_lib.override(config, ['method.name=layerlock'])


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('c.batchsize = 3', r'line 5: .*batchsize.* does not exist'),
    ("c.batch_size = 'many'", r'line 5: .*int'),
    ('c.data.update(dict(frame=4))', r'line 5: .*frame'),
  ],
)
def test_a_wrong_line_of_a_page_is_named(tmp_path, monkeypatch, line, message):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'own.py').write_text(
    'from vssl_jax import config\n\ndef get_config(variant):\n'
    f"  c = config.default('salt')\n  {line}\n  return c\n"
  )
  with pytest.raises(ValueError, match=f'own.py, {message}'):
    config_lib.load('own.py')


def test_one_number_is_the_side_of_a_square(capsys):
  _, config = config_lib.load('configs/salt_single_gpu.py')
  config = config_lib.override(config, ['data.size=64'])
  assert options.spec(config.data.to_dict()).shape[1:3] == (64, 64)
  config = config_lib.override(config, ['data.size=(1,2,3)'])
  with pytest.raises(ValueError, match=r'data.size: found \(1, 2, 3\)'):
    options.spec(config.data.to_dict())
  assert main.main(['--config=configs/salt_single_gpu.py', '--plan',
                    '--config.batch_size=0']) == 2  # fmt: skip
  assert 'batch_size: found 0' in capsys.readouterr().err


def test_a_page_of_the_clone_is_found_from_anywhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  name, config = config_lib.load('configs/salt.py:H')
  assert name == 'salt-H'
  assert config.method.latent_student.encoder.size == 'H'


def test_a_page_outside_the_roots_is_refused(tmp_path, monkeypatch):
  inside, outside = tmp_path / 'inside', tmp_path / 'outside'
  inside.mkdir()
  outside.mkdir()
  monkeypatch.chdir(inside)
  page = _page(outside)
  with pytest.raises(ValueError, match=f'add --config_root={outside}'):
    config_lib.load(str(page))
  assert config_lib.load(str(page), (str(outside),))[0] == 'page'
  _page(inside)
  assert config_lib.load('page.py')[0] == 'page'


def test_a_link_out_of_the_roots_is_refused(tmp_path, monkeypatch):
  inside, outside = tmp_path / 'inside', tmp_path / 'outside'
  inside.mkdir()
  outside.mkdir()
  (inside / 'link.py').symlink_to(_page(outside))
  monkeypatch.chdir(inside)
  with pytest.raises(ValueError, match='a page is code'):
    config_lib.load('link.py')
  with pytest.raises(ValueError, match='a page is code'):
    config_lib.load('../outside/page.py')


def test_an_address_is_refused():
  with pytest.raises(ValueError, match='only from a local file'):
    config_lib.load('https://example.org/page.py')


def test_a_missing_page_names_the_nearest(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=r'did you mean configs/salt.py'):
    config_lib.load('salts.py')


def test_a_page_without_get_config_is_refused(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'page.py').write_text('x = 1\n')
  with pytest.raises(ValueError, match='defines no get_config'):
    config_lib.load('page.py')


def test_a_key_that_a_page_invents_is_an_error(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  body = '  c = config.default()\n  c.optim.learning_rate = 1\n  return c\n'
  _page(tmp_path, body)
  with pytest.raises(ValueError, match=r'page.py, line 6: .*learning_rate'):
    config_lib.load('page.py')


def test_json_round_trip():
  config = config_lib.default()
  again = config_io.from_json(config_io.to_json(config))
  assert config_io.difference(config, again) == ''


def test_difference_names_keys_and_leaves_out_what_may_change():
  a, b = _config(), _config()
  b.lr, b.optim.clip = 2.0, 1.0
  assert config_io.difference(a, b) == (
    '  lr: was 1.0, is 2.0\n  optim.clip: was 0.0, is 1.0'
  )
  assert config_io.difference(a, b, ('optim',)) == '  lr: was 1.0, is 2.0'
  assert config_io.difference(a, b, ('optim', 'lr')) == ''


def test_the_description_marks_what_differs():
  changed = _config()
  changed.lr = 2.0
  lines = config_io.describe(changed, _config()).splitlines()
  assert '* lr = 2.0' in lines
  assert '  steps = 3' in lines


def _offered():
  """Returns page -> the variants that it takes, of those that pre-train.

  A variant is a word of the page's code, or two with a dash between them, so
  that a new one is tried without being named here.
  """
  found = {}
  for page in sorted((ROOT / 'configs').glob('*.py')):
    get_config = runpy.run_path(str(page))['get_config']
    if get_config().job not in ('train', 'demo'):
      continue
    words = _words(page)
    if page.name == 'demo.py':
      words |= _words(ROOT / 'vssl_jax/demo.py')
    pairs = {f'{a}-{b}' for a in words for b in words}
    found[page.name] = ['', *filter(_takes(get_config), sorted(words | pairs))]
  return found


def _words(path):
  constants = [
    node.value
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.Constant)
  ]
  texts = [text for text in constants if isinstance(text, str)]
  return {text for text in texts if re.fullmatch(r'[A-Za-z][\w+-]*', text)}


def _takes(get_config):
  def takes(variant):
    try:
      return bool(get_config(variant))
    except ValueError:
      return False

  return takes


VARIANTS = _offered()


def _listed():
  """Yields page and variant for those that the table of pages names."""
  for row in (ROOT / 'configs/README.md').read_text().splitlines():
    first = row.removeprefix('| ').partition(' |')[0]
    sizes = re.findall(r':([\w+-]+)', first)
    knobs = re.findall(r'[ `](-\w[\w-]*)', first)
    for page in re.findall(r'\]\((\w+\.py)\)', first):
      for variant in sizes + [size + knob for size in sizes for knob in knobs]:
        yield page, variant


def _published(source):
  """Returns encoders as the hub has them under these names."""
  name = source.rsplit('-', 1)[1].removeprefix('vit').removesuffix('16')
  size = {'s': 'S', 'b': 'B', 'base': 'B', 'large': 'L'}[name]
  if source.startswith('facebook/'):
    image = dict(patch=(1, 16, 16), positions='sincos_2d', class_token=True)
    if source.startswith('facebook/dino'):
      image['positions'] = 'learned'
    if source.startswith('facebook/dinov2'):
      image['patch'] = (1, 14, 14)
    return framewise.Framewise(vit.make(size, **image))
  return vit.make(size, positions='sinusoid_1d', qkv_bias='qv')


def test_variants_that_the_table_names_are_found_and_exist():
  listed = set(_listed())
  assert ('layerlock_2b.py', 'B-mae-flops') in listed
  assert ('pmd_k400.py', 'L-self') in listed
  for page, variant in sorted(listed):
    if page in VARIANTS:
      assert variant in VARIANTS[page], f'{page} has no :{variant}'
    else:
      config_lib.load(f'configs/{page}:{variant}')


@pytest.mark.parametrize(
  'spec', [f'{p}:{v}' if v else p for p, vs in VARIANTS.items() for v in vs]
)
def test_every_page_builds_its_phases(spec):
  from vssl_jax import methods
  from vssl_jax.data import options

  _, config = config_lib.load(f'configs/{spec}')
  clip = options.spec(config.data.to_dict()).shape
  phases = methods.build(config.method, clip, _published)
  assert all(p.steps > 0 for p in phases)
  assert phases[-1].cost(clip).total > 0
  assert phases[-1].name in retention.phases(
    config.checkpoint.keep_phases, phases
  )


@pytest.mark.parametrize('page', VARIANTS)
def test_every_page_refuses_other_variants(page):
  for variant in ('nonsense', f'{VARIANTS[page][-1]}-nonsense'):
    with pytest.raises(
      ValueError, match=re.escape(f'{page}: found :{variant}')
    ):
      config_lib.load(f'configs/{page}:{variant}')


def test_no_two_pages_differ_in_case_only():
  names = [p.name.lower() for p in (ROOT / 'configs').iterdir()]
  assert len(names) == len(set(names))
