"""JSON files of a run folder from elsewhere, whatever is in them."""

import json

import pytest

import vssl_jax
from vssl_jax.checkpoint import integrity

RECORD = {
  'config': {'method': {'name': 'x'}, 'data': {'stride': 2, 'fps': 0.0}},
  'video': [4, 16, 16, 3],
}


def deep(times, kind='{"a":', end='}'):
  return kind * times + '1' + end * times


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (f'{{"config": {deep(400)}}}', 'nested more than 64 deep'),
    (f'{{"config": {deep(990)}}}', 'is corrupt'),
    (f'{{"config": {deep(10**5, "[", "]")}}}', 'is corrupt'),
    (RECORD | {'config': {}}, 'no config.method and no config.data and'),
    (RECORD | {'config': 5}, 'no config.method and no config.data and'),
    (RECORD | {'video': [1, 2]}, 'found no video in it'),
    (RECORD | {'video': None}, 'found no video in it'),
    (
      RECORD | {'config': {'method': {}, 'data': {'stride': '2', 'fps': 1}}},
      'found no config.data.stride in it',
    ),
  ],
)
def test_records_that_are_none(tmp_path, content, message):
  text = content if isinstance(content, str) else json.dumps(content)
  (tmp_path / 'run.json').write_text(text)
  with pytest.raises(integrity.CorruptError, match=message) as caught:
    vssl_jax.load(str(tmp_path))
  assert str(tmp_path / 'run.json') in str(caught.value)
  assert len(str(caught.value)) < 600


def test_a_record_without_end_is_not_read(tmp_path):
  with (tmp_path / 'run.json').open('wb') as file:
    file.truncate(2**40)
  with pytest.raises(integrity.CorruptError, match='wanted at most'):
    vssl_jax.load(str(tmp_path))


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('step', '3'),
    ('phase', ['x']),
    ('leaves', ['params/x']),
    ('leaves', {'params/x': {'shape': 'ab', 'dtype': 'float32'}}),
    ('leaves', {'params/x': {'shape': [-1], 'dtype': 'float32'}}),
    ('leaves', {'params/x': 5}),
    ('files', {'a': 1}),
    ('files', []),
  ],
)
def test_manifests_of_other_kinds_cannot_be_used(tmp_path, key, value):
  whole = {
    'step': 3,
    'phase': 'x',
    'leaves': {'params/x': {'shape': [2], 'dtype': 'float32'}},
    'files': {'a': [1, 'b']},
  }
  path = tmp_path / '00000003.json'
  path.write_text(json.dumps(whole))
  assert 'corrupt' not in integrity.read(path)
  path.write_text(json.dumps(whole | {key: value}))
  found = integrity.read(path)
  assert key in found['corrupt']
  saved = integrity.Saved(tmp_path / '00000003', found)
  assert integrity.damage(saved) == found['corrupt']
