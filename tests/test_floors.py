"""Which folder may import which, and who may import which library."""

import ast
import graphlib
import importlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Lowest first: a folder, or a loose module, imports only from those before it.
FLOORS = (
  *('utils', 'trees', 'rngs', 'sharding', 'masks', 'losses', 'models'),
  *('flops', 'data', 'methods', 'checkpoint', 'weights', 'encoder'),
  *('target_cache', 'train', 'evals', 'config', 'planning', 'visualize'),
  *('', 'demo', 'main', '__main__'),
)
# Folders of a folder, likewise; '' are the modules of the folder itself.
INNER_FLOORS = {
  'data': ('clips', 'sources', '', 'tools'),
  'models': ('', 'hiera'),
  'evals': ('', 'probe', 'finetune', 'depth'),
  'weights': ('readers', 'name_maps', ''),
}
# Who may import a library: folders or loose modules.
KEEPERS = {
  'orbax': {'checkpoint'},
  'grain': {'data'},
  'tensorflow_datasets': {'data'},
  'array_record': {'data'},
  'flax': {'models'},
  'torch': set(),
}
MAX_MODULES = 15  # of a folder, without __init__.py
MAX_LOOSE = 10
CROWDED = {'methods': 18}  # folders that still hold more, and how many


def _room(module):
  return [*module.split('.'), ''][1]


def _modules():
  """Returns {dotted name: syntax tree} of the package."""
  trees = {}
  for path in sorted((ROOT / 'vssl_jax').rglob('*.py')):
    name = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
    trees[name.removesuffix('.__init__')] = ast.parse(path.read_text())
  return trees


MODULES = _modules()
FOLDERS = {
  '.'.join(path.parent.relative_to(ROOT / 'vssl_jax').parts)
  for path in (ROOT / 'vssl_jax').rglob('__init__.py')
}


def _imports(tree):
  """Yields the dotted names that a file imports, functions included."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'line {node.lineno}: relative import'
      for alias in node.names:
        whole = f'{node.module}.{alias.name}'
        yield whole if whole in MODULES else node.module


OWN = {
  name: {i for i in _imports(tree) if i.split('.')[0] == 'vssl_jax'}
  for name, tree in MODULES.items()
}


def _height(module):
  """Returns where a module stands: (floor of its folder, floor within it)."""
  _, folder, inner, *_ = [*module.split('.'), '', '']
  inner_floors = INNER_FLOORS.get(folder, ('',))
  is_folder = f'{folder}.{inner}' in FOLDERS
  return FLOORS.index(folder), inner_floors.index(inner if is_folder else '')


def test_every_folder_has_a_floor():
  assert {_room(name) for name in MODULES} == set(FLOORS)
  inner = {f'{folder}.{x}' for folder, xs in INNER_FLOORS.items() for x in xs}
  assert {x for x in FOLDERS if '.' in x} == {
    x for x in inner if not x.endswith('.')
  }


@pytest.mark.parametrize('name', MODULES)
def test_imports_point_down(name):
  up = {i for i in OWN[name] if _height(i) > _height(name)}
  assert not up, f'{name} imports {up} of a higher floor'


@pytest.mark.parametrize(
  'importer, imported',
  [
    ('train.loop', 'evals.features'),
    ('methods.salt', 'train.loop'),
    ('data.clips.decode', 'data.pipeline'),
    ('evals.features', 'evals.probe.job'),
    ('losses', 'models.layers'),
    ('train.run', 'config'),
  ],
)
def test_an_import_of_a_higher_floor_is_seen(importer, imported):
  importer, imported = f'vssl_jax.{importer}', f'vssl_jax.{imported}'
  assert {importer, imported} <= set(MODULES)
  assert _height(imported) > _height(importer)


def test_no_module_imports_itself_through_others():
  # `load` imports when it is called, so that `import vssl_jax` is cheap.
  graph = {name: own for name, own in OWN.items() if name != 'vssl_jax'}
  graphlib.TopologicalSorter(graph).prepare()


def test_folders_are_small():
  for init in (ROOT / 'vssl_jax').rglob('__init__.py'):
    folder = init.parent
    modules = [p for p in folder.glob('*.py') if p.name != '__init__.py']
    name = '.'.join(folder.relative_to(ROOT / 'vssl_jax').parts)
    most = CROWDED.get(name, MAX_MODULES if name else MAX_LOOSE)
    assert len(modules) <= most, f'{name}: {len(modules)} modules'


@pytest.mark.parametrize('library', KEEPERS)
def test_only_its_keepers_import(library):
  for name, tree in MODULES.items():
    place = name.removeprefix('vssl_jax.').replace('.', '/')
    if not {place, _room(name)} & KEEPERS[library]:
      found = {i for i in _imports(tree) if i.split('.')[0] == library}
      assert not found, f'{name} imports {found}'


def test_floors_below_the_trainer_read_no_config():
  # A builder may hand out defaults; classes and losses take plain arguments.
  for name in MODULES:
    if _room(name) in {
      'trees',
      'rngs',
      'sharding',
      'masks',
      'losses',
      'models',
    }:
      assert 'ml_collections' not in set(_imports(MODULES[name])), name


def test_trainer_and_evaluations_know_no_method():
  known = importlib.import_module('vssl_jax.methods').METHODS
  methods = {*known, *(m.__name__.split('.')[-1] for m in known.values())}
  assert methods
  for name, tree in MODULES.items():
    if _room(name) in {'train', 'evals'}:
      words = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
      assert not methods & words, f'{name} knows {methods & words}'
      own = {i for i in OWN[name] if i.startswith('vssl_jax.methods.')}
      assert own <= {'vssl_jax.methods.phase'}, f'{name} imports {own}'


SCRIPTS = sorted((ROOT / 'tests').glob('**/*.py'))


@pytest.mark.parametrize('path', SCRIPTS, ids=lambda p: str(p.name))
def test_what_a_script_reads_of_our_files_exists(path):
  # Benchmarks run by hand: a name that moved would be found by a user.
  tree, files = ast.parse(path.read_text()), {}
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom):
      for alias in node.names:
        whole = f'{node.module}.{alias.name}'
        if whole in MODULES:
          files[alias.asname or alias.name] = importlib.import_module(whole)
  for node in ast.walk(tree):
    if isinstance(node, (ast.Name, ast.arg)):
      own = node.arg if isinstance(node, ast.arg) else node.id
      if isinstance(node, ast.arg) or isinstance(node.ctx, ast.Store):
        files.pop(own, None)  # another thing of that name
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
      if node.value.id in files:
        assert hasattr(files[node.value.id], node.attr), (
          f'line {node.lineno}: {node.value.id}.{node.attr}'
        )
