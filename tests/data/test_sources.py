"""Folders, manifests, shards and several of them as one numbered list."""

import json
import os
import pickle

import pytest

from vssl_jax.data.clips import decode
from vssl_jax.data.sources import shards, source


def touch(root, *names):
  for name in names:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(name.encode())
  return str(root)


def test_folders_name_classes(tmp_path):
  root = touch(
    tmp_path, 'b/2.mp4', 'b/deep/1.MKV', 'a/3.webm', 'a/read.txt', '.x/4.mp4',
    'a/.5.mp4', 'c/6.jpg',
  )  # fmt: skip
  found = source.find(root)
  names = [found.item(i).name for i in range(len(found))]
  assert names == ['a/3.webm', 'b/2.mp4', 'b/deep/1.MKV', 'c/6.jpg']
  assert [found.item(i).label for i in range(4)] == [0, 1, 1, 2]
  assert found.classes == ('a', 'b', 'c')
  assert found.item(1).media == os.path.join(root, 'b/2.mp4')


def test_videos_beside_each_other_have_no_class(tmp_path):
  found = source.find(touch(tmp_path, 'x.mp4', 'a/y.mp4'))
  assert found.classes is None
  assert [found.item(i).label for i in range(2)] == [-1, -1]


def test_manifests_are_relative_to_themselves(tmp_path):
  touch(tmp_path, 'videos/a.mp4', 'videos/b.mp4')
  manifest = tmp_path / 'lists' / 'train.csv'
  manifest.parent.mkdir()
  manifest.write_text(
    f'../videos/a.mp4,walk\n{tmp_path}/videos/b.mp4,run\n../videos/a.mp4,\n'
  )
  found = source.find(str(manifest))
  with open(found.item(0).media, 'rb') as file:
    assert file.read() == b'videos/a.mp4'
  assert found.item(1).media == f'{tmp_path}/videos/b.mp4'
  assert found.classes == ('run', 'walk')
  assert [found.item(i).label for i in range(3)] == [1, 0, -1]


def test_numbers_are_classes_in_their_order(tmp_path):
  (tmp_path / 'x.csv').write_text('a.mp4 3\nb.mp4 0\nc.mp4 10\n')
  found = source.find(str(tmp_path / 'x.csv'))
  assert [found.item(i).label for i in range(3)] == [1, 0, 2]
  assert found.classes == ('0', '3', '10')


def test_the_order_of_classes_can_be_given(tmp_path):
  root = touch(tmp_path, 'a/1.mp4', 'b/2.mp4')
  found = source.find(root, classes=('z', 'b', 'a'))
  assert [found.item(i).label for i in range(2)] == [2, 1]
  with pytest.raises(ValueError, match=r"\['b'\] are not among the 1"):
    source.find(root, classes=('a',))


def test_several_sources_share_classes(tmp_path):
  one = touch(tmp_path / '1', 'run/a.mp4', 'walk/b.mp4')
  two = touch(tmp_path / '2', 'jump/c.mp4', 'run/d.mp4')
  three = touch(tmp_path / '3', 'e.mp4')
  found = source.find((one, two, three))
  assert found.offsets == (0, 2, 4, 5)
  assert found.classes == ('run', 'walk', 'jump')
  assert [found.item(i).label for i in range(5)] == [0, 1, 2, 0, -1]
  assert pickle.loads(pickle.dumps(found)).item(3).name == 'run/d.mp4'


def test_the_fingerprint_knows_names_labels_and_order(tmp_path):
  one = touch(tmp_path / '1', 'a/1.mp4', 'b/2.mp4')
  same = touch(tmp_path / '2', 'a/1.mp4', 'b/2.mp4')
  moved = touch(tmp_path / '3', 'b/1.mp4', 'a/2.mp4')
  prints = [source.find(s).fingerprint for s in (one, same, moved)]
  assert prints[0] == prints[1] != prints[2]
  pair = source.find((one, moved)).fingerprint
  assert pair != source.find((moved, one)).fingerprint


def test_nothing_to_read_is_an_error(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'data\.source is empty'):
    source.find('')
  with pytest.raises(FileNotFoundError, match='nothing at'):
    source.find(str(tmp_path / 'none'))
  with pytest.raises(FileNotFoundError, match='no videos in'):
    source.find(touch(tmp_path, 'a.txt'))


def write_shard(path, items):
  from array_record.python import array_record_module

  writer = array_record_module.ArrayRecordWriter(
    str(path), 'group_size:1,uncompressed'
  )
  for item in items:
    writer.write(item)
  writer.close()


def test_shards_are_read_in_order(tmp_path):
  write_shard(
    tmp_path / 'x-1.array_record', [shards.pack(b'three', '3.mp4', 'b')]
  )
  write_shard(
    tmp_path / 'x-0.array_record',
    [shards.pack(b'one', '1.mp4', 'a'), b'bare', shards.pack(b'two', '2')],
  )
  index = {'classes': ['a', 'b'], 'shards': ['x-0.array_record']}
  (tmp_path / 'index.json').write_text(json.dumps(index))
  found = source.find(str(tmp_path))
  items = [found.item(i) for i in range(len(found))]
  assert [item.media for item in items] == [b'one', b'bare', b'two', b'three']
  assert [item.label for item in items] == [0, -1, -1, 1]
  assert items[0].name == '1.mp4' and items[1].name == 'record 1'
  again = pickle.loads(pickle.dumps(found))
  assert again.item(3).media == b'three'
  for pattern in ('x-*.array_record', 'x-0.array_record'):
    assert source.find(str(tmp_path / pattern)).item(0).media == b'one'
  index['shards'].append('x-9.array_record')
  (tmp_path / 'index.json').write_text(json.dumps(index))
  with pytest.raises(ValueError, match=r"not there: \['x-9"):
    source.find(str(tmp_path))


def test_damaged_records_have_a_reason():
  record = shards.pack(b'media', 'name', 'label')
  assert shards.unpack(record) == (
    {'name': 'name', 'class': 'label'},
    b'media',
  )
  for bad in (record[:10], record[:20], shards.MAGIC + b'\xff' * 8):
    with pytest.raises(decode.VideoError, match='unreadable'):
      shards.unpack(bad)
