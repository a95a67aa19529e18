"""TFDS directories: read as data, whatever they ask to import."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest

from vssl_jax import main
from vssl_jax.data.sources import source as source_lib
from vssl_jax.data.sources import tfds_folder
from vssl_jax.data.tools import prepare

TFDS = 'tensorflow_datasets.core.features.'
WRITE = """
import sys
import numpy as np
import tensorflow_datasets as tfds

class Toy(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    features = tfds.features.FeaturesDict({
      'video': np.object_,
      'label': tfds.features.ClassLabel(names=['sit', 'stand']),
      'name': tfds.features.Text(),
      'frames': tfds.features.FeaturesDict({'count': np.int32}),
    })
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    for i in range(6):
      yield i, {'video': b'film %d' % i, 'label': i % 2, 'name': f'n{i}',
                'frames': {'count': i}}

builder = Toy(data_dir=sys.argv[1], file_format='array_record')
builder.download_and_prepare()
"""


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  root = tmp_path_factory.mktemp('tfds')
  subprocess.run(
    [sys.executable, '-c', WRITE, str(root)], check=True, capture_output=True
  )
  return root / 'toy' / '1.0.0'


@pytest.fixture
def folder(written, tmp_path):
  return str(shutil.copytree(written, tmp_path / 'toy' / '1.0.0'))


def load(folder, name='features.json'):
  with open(os.path.join(folder, name), encoding='utf-8') as file:
    return json.load(file)


def store(folder, tree, name='features.json'):
  with open(os.path.join(folder, name), 'w', encoding='utf-8') as file:
    file.write(tree if isinstance(tree, str) else json.dumps(tree))


@pytest.mark.filterwarnings('ignore')
def test_tfds_directories_need_no_tensorflow(folder):
  source = source_lib.find(folder)
  items = [source.item(i) for i in range(len(source))]
  assert {item.media for item in items} == {b'film %d' % i for i in range(6)}
  for item in items:
    assert item.label == int(item.media[-1:]) % 2
  assert source.classes == ('sit', 'stand')
  assert len(source_lib.find(folder, split='train[:50%]')) == 3
  assert pickle.loads(pickle.dumps(source)).item(0).media == items[0].media


def legacy(tree):
  """The same features in the spelling of TFDS 4.0."""
  if 'featuresDict' in tree:
    content = {
      name: legacy(value)
      for name, value in tree['featuresDict']['features'].items()
    }
  elif 'tensor' in tree:
    content = {'shape': [], 'dtype': tree['tensor']['dtype']}
  elif 'classLabel' in tree:
    content = {'num_classes': 2}
  else:
    content = {}
  return {'type': tree['pythonClassName'], 'content': content}


def snake(tree):
  """The same message with its names in snake case."""
  names = {
    'pythonClassName': 'python_class_name',
    'featuresDict': 'features_dict',
    'classLabel': 'class_label',
  }
  if not isinstance(tree, dict):
    return tree
  return {names.get(key, key): snake(value) for key, value in tree.items()}


def as_text(tree):
  """The same features as JSON inside JSON."""
  content = {
    name: legacy(value)
    for name, value in tree['featuresDict']['features'].items()
  }
  return {
    'pythonClassName': tree['pythonClassName'],
    'jsonFeature': {'json': json.dumps(content)},
  }


def as_old_message(tree):
  """The message as text in the content of the older spelling."""
  return {
    'type': tree['pythonClassName'],
    'content': json.dumps(tree['featuresDict']),
    'proto_cls': 'tensorflow_datasets.FeaturesDict',
  }


SPELLINGS = [dict, legacy, snake, as_text, as_old_message]


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('spelling', SPELLINGS)
def test_every_spelling_is_read(spelling, folder):
  before = tfds_folder.features(folder)
  store(folder, spelling(load(folder)))
  after = tfds_folder.features(folder)
  assert {k: (v.kind, v.scalar) for k, v in after.items()} == {
    k: (v.kind, v.scalar) for k, v in before.items()
  }
  assert source_lib.find(folder).item(3).media.startswith(b'film')


EVIL = 'evil_features.Evil'


def in_place_of(name):
  """Renames the class of one feature."""

  def change(tree):
    tree['featuresDict']['features'][name]['pythonClassName'] = EVIL
    return tree

  return change


def at_top(tree):
  return tree | {'pythonClassName': EVIL}


def nested(tree):
  inner = tree['featuresDict']['features']['frames']['featuresDict']
  inner['features']['count'] = {
    'pythonClassName': EVIL,
    'jsonFeature': {'json': '{}'},
  }
  return tree


def two_names(tree):
  return tree | {'python_class_name': EVIL}


def both_modes(tree):
  return tree | {'type': EVIL, 'content': {}}


def inside_json(tree):
  features = {'video': {'type': EVIL, 'content': {}}}
  return {
    'pythonClassName': TFDS + 'features_dict.FeaturesDict',
    'jsonFeature': {'json': json.dumps(features)},
  }


def sequence(tree):
  tree['featuresDict']['features']['frames'] = {
    'pythonClassName': TFDS + 'sequence_feature.Sequence',
    'sequence': {'feature': {'type': EVIL, 'content': {}}},
  }
  return tree


HOSTILE = [
  *(in_place_of(name) for name in ('video', 'label', 'name', 'frames')),
  at_top, nested, two_names, both_modes, inside_json, sequence,
]  # fmt: skip
PATHS = [dict, snake, legacy, as_text, as_old_message]


@pytest.fixture
def traps(folder, tmp_path, monkeypatch):
  """A module that marks its import, where imports look first."""
  mark = tmp_path / 'executed'
  text = f'open({str(mark)!r}, "w").close()\nclass Evil: pass\n'
  (tmp_path / 'evil_features.py').write_text(text)
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(str(tmp_path))
  yield mark
  sys.modules.pop('evil_features', None)


def starts(folder, tmp_path):
  """Every way in which a start opens a source."""
  yield lambda: len(source_lib.find(folder))
  yield lambda: prepare.main(['--source', folder, '--out', str(tmp_path / 'o')])
  yield lambda: main.main(
    ['--config=configs/salt.py:B', f'--config.data.source={folder}', '--plan']
  )


@pytest.mark.filterwarnings('ignore')
def test_no_spelling_runs_code(folder, tmp_path, traps):
  right = json.dumps(load(folder))
  for change in HOSTILE:
    for spelling in PATHS:
      tree = change(json.loads(right))
      if change in (at_top, two_names, both_modes, inside_json):
        tree = tree if spelling is dict else snake(tree)
      elif spelling in (as_text, legacy) and change is sequence:
        continue
      else:
        tree = spelling(tree)
      store(folder, tree)
      try:
        source_lib.find(folder).item(0)
      except ValueError as error:
        assert EVIL in str(error) or 'features.json' in str(error)
      assert not traps.exists(), (change, spelling)
  # dataset_info.json may describe features too; they are not read from there.
  store(folder, json.loads(right))
  info = load(folder, 'dataset_info.json')
  info |= {'features': at_top(json.loads(right)), 'moduleName': EVIL}
  store(folder, info, 'dataset_info.json')
  assert len(source_lib.find(folder)) == 6
  assert not traps.exists() and 'evil_features' not in sys.modules


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_no_command_runs_code(folder, tmp_path, traps, capsys):
  store(folder, snake(in_place_of('video')(load(folder))))
  for start in starts(folder, tmp_path):
    try:
      assert start() in (0, 2)
    except ValueError as error:
      assert EVIL in str(error)
    assert not traps.exists()
  assert EVIL in capsys.readouterr().err


@pytest.mark.filterwarnings('ignore')
def test_damaged_descriptions_are_named(folder):
  right = load(folder)
  for text in ('', '{"featuresDict": ', '[' * 100_000, '[]', '{}'):
    store(folder, text)
    with pytest.raises(ValueError, match=r'features\.json'):
      source_lib.find(folder)
  store(folder, right)
  info = load(folder, 'dataset_info.json')
  (split,) = info['splits']
  for change in (
    {'fileFormat': 'tfrecord'},
    {'splits': []},
    {'splits': 'x'},
    {'splits': [split | {'shardLengths': ['many']}]},
    {'splits': [split | {'shardLengths': [str(2**60)]}]},
    {'splits': [split | {'filepathTemplate': '../../{SHARD_X_OF_Y}'}]},
    {'splits': [split | {'filepathTemplate': '{NOTHING}'}]},
  ):
    store(folder, info | change, 'dataset_info.json')
    with pytest.raises(ValueError, match=r'1\.0\.0'):
      len(source_lib.find(folder))
  store(folder, info, 'dataset_info.json')
  with pytest.raises(ValueError, match=r"'valid'.*the splits are \['train'\]"):
    len(source_lib.find(folder, split='valid'))
  right['featuresDict']['features']['label'] = {
    'pythonClassName': TFDS + 'tensor_feature.Tensor',
    'tensor': {'shape': {}, 'dtype': 'float32'},
  }
  store(folder, right)
  with pytest.raises(ValueError, match="'label' is a Tensor of other"):
    source_lib.find(folder)
