"""The house has floors: who may import whom, and who may know what."""

import ast
import graphlib
import importlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FLOORS = (
  {'trees', 'rngs', 'ranges', 'colours', 'jsonl', 'sharding', 'cluster'},
  {
    'masking',
    'mask_specs',
    'unit_masks',
    'rectangles',
    'losses',
    'flops',
    'mixing',
    'models',
    'data',
  },
  {'weights', 'methods'},
  {'config', 'flags', 'encoders', 'train', 'evals', 'show', ''},
  {'main', '__main__', 'demo', 'bench', 'sweep', 'timing'},
)
# Who may import a library; a room or one of its files.
KEEPERS = {
  'orbax': {'train/checkpoint'},
  'grain': {'data'},
  'tensorflow_datasets': {'data'},
  'array_record': {'data'},
  'flax': {'models', 'methods', 'weights', 'encoders', 'flops'},
  'torch': set(),
}


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


def test_every_room_has_a_floor():
  assert {_room(name) for name in MODULES} <= set().union(*FLOORS)


@pytest.mark.parametrize('name', MODULES)
def test_imports_point_down(name):
  height = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
  up = {i for i in OWN[name] if height[_room(i)] > height[_room(name)]}
  assert not up, f'{name} imports {up} of a higher floor'


def test_no_file_imports_itself_through_others():
  # `load` imports when it is called, so that `import vssl_jax` is cheap.
  graph = {name: own for name, own in OWN.items() if name != 'vssl_jax'}
  graphlib.TopologicalSorter(graph).prepare()


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
    if _room(name) in (FLOORS[0] - {'ranges'}) | FLOORS[1] - {'data'} | {
      'weights'
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
      assert own <= {'vssl_jax.methods.base'}, f'{name} imports {own}'


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
