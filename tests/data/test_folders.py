"""Folders as people keep them: nothing is dropped without a word."""

import os
import shutil

import pytest

from vssl_jax.data import options, pipeline
from vssl_jax.data.sources import folders, shards
from vssl_jax.data.sources import source as source_lib


def touch(root, *names):
  for name in names:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(name.encode())
  return str(root)


@pytest.mark.timeout(60)
def test_links_in_circles_list_each_file_once(tmp_path):
  root = touch(tmp_path / 'r', 'a/x.mp4', 'b/y.mp4')
  for link, target in (
    ('a/up', '..'), ('a/l1', '.'), ('a/l2', '.'), ('0', 'b'), ('self', 'self'),
  ):  # fmt: skip
    os.symlink(target, os.path.join(root, link))
  outside = touch(tmp_path / 'other', 'c/z.mp4', 'c/w.mp4')
  os.symlink(outside, os.path.join(root, 'c'))
  os.symlink(root, os.path.join(outside, 'c', 'back'))
  names, notes = folders.listing(root)
  assert names == ['a/x.mp4', 'b/y.mp4', 'c/c/w.mp4', 'c/c/z.mp4']
  assert notes == (
    'skipped 5 links to a folder that is listed already, 1 without an ending',
  )


def test_what_is_passed_over_is_counted(tmp_path):
  root = touch(
    tmp_path, 'a/1.mp4', 'a/1.jpg', 'a/1.mp4.png', 'a/2.rmvb', 'a/2.TXT',
    'b/3.txt', 'b/3.mkv', 'b/.4.mp4', '.c/5.mp4', 'b/README', 'b/6.png',
  )  # fmt: skip
  text = source_lib.find(root).describe()
  assert text.startswith(f'{root}: 2 videos and 1 pictures, 2 classes (a, b); ')
  for part in (
    '2 pictures beside a video of the same name', '2 *.txt', '2 hidden',
    '1 *.rmvb', '1 without an ending',
  ):  # fmt: skip
    assert part in text, part
  loose = touch(tmp_path / 'loose', 'x.mp4', 'a/y.mp4')
  text = source_lib.find(loose).describe()
  assert 'no labels; its folders are not classes, because 1 lie outside' in text
  with pytest.raises(FileNotFoundError, match=r'found 2 \*\.rmvb'):
    source_lib.find(touch(tmp_path / 'none', '1.rmvb', '2.rmvb'))
  (tmp_path / 'empty').mkdir()
  with pytest.raises(FileNotFoundError, match='it is empty'):
    source_lib.find(str(tmp_path / 'empty'))


def test_endings_of_cameras_and_discs_are_videos(tmp_path, film):
  film(tmp_path / 'a.mp4', frames=8)
  film(tmp_path / 'b.ts', frames=8)
  (tmp_path / 'b.ts').rename(tmp_path / 'b.MTS')
  film(tmp_path / 'c.vob', frames=8, codec='mpeg2video')
  config = options.default()
  config.source, config.frames, config.stride = str(tmp_path), 4, 1
  config.size, config.isolate = (16, 16), False
  clips = pipeline.evaluation(config, batch_size=3)
  (batch,) = list(clips)
  clips.close()
  assert clips.num_examples == 3 and batch['weight'].tolist() == [1, 1, 1]


def test_names_that_are_not_utf8_are_read(tmp_path, film, capsys):
  film(tmp_path / 'a' / 'x.mp4', frames=8)
  (tmp_path / 'b').mkdir()
  odd = os.fsencode(tmp_path) + b'/b/caf\xe9.mp4'
  shutil.copy(os.fsencode(tmp_path / 'a' / 'x.mp4'), odd)
  config = options.default()
  config.source, config.frames, config.stride = str(tmp_path), 4, 1
  config.size = (16, 16)
  clips = pipeline.evaluation(config, batch_size=2)
  (batch,) = list(clips)
  clips.close()
  assert batch['weight'].tolist() == [1, 1]
  assert clips.fingerprint.startswith('v2-')
  listed = tmp_path / 'list.txt'
  listed.write_bytes(b'b/caf\xe9.mp4 1\na/x.mp4 0\n')
  assert os.path.exists(source_lib.find(str(listed)).item(0).media)
  assert '2 videos, 2 classes (a, b)' in capsys.readouterr().out


@pytest.mark.parametrize(
  'pattern', ['{}.jpg', 'img_{:05}.png', 'v_{}_0.jpg', 'f{:03}.JPEG']
)
def test_folders_of_frames_are_refused(tmp_path, pattern):
  numbers = range(0, 50, 5) if pattern == '{}.jpg' else range(1, 9)
  names = [pattern.format(i) for i in numbers]
  touch(tmp_path, *(f'run/v1/{name}' for name in names))
  if pattern.endswith('_0.jpg'):  # these count nothing
    assert len(source_lib.find(str(tmp_path))) == 8
    return
  with pytest.raises(ValueError, match='the frames of a video'):
    source_lib.find(str(tmp_path))
  (tmp_path / 'list.txt').write_text('\n'.join(f'run/v1/{n}' for n in names))
  assert len(source_lib.find(str(tmp_path / 'list.txt'))) == len(names)


def test_photographs_are_examples(tmp_path):
  names = ['n01_10026.JPEG', 'n01_10027.JPEG', 'n01_7.JPEG', 'cat.png']
  touch(tmp_path, *(f'a/{name}' for name in names))
  assert len(source_lib.find(str(tmp_path))) == 4


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
  root = touch(tmp_path, 'a/1.mp4', 'b/2.mp4')
  scan = os.scandir

  def closed(path):
    if str(path).rstrip('/').endswith(('/b', 'locked')):
      raise PermissionError(13, 'Permission denied')
    return scan(path)

  monkeypatch.setattr(os, 'scandir', closed)
  assert '1 folders that cannot be read' in source_lib.find(root).describe()
  (tmp_path / 'locked').mkdir()
  with pytest.raises(FileNotFoundError, match='Permission denied'):
    source_lib.find(str(tmp_path / 'locked'))


def test_one_video_and_patterns_are_sources(tmp_path):
  root = touch(tmp_path, 'a/1.mp4', 'a/2.MKV', 'b/3.mp4', 'b/n.txt')
  one = source_lib.find(os.path.join(root, 'a/1.mp4'))
  assert len(one) == 1 and os.path.exists(one.item(0).media)
  both = source_lib.find(os.path.join(root, '*/*.mp4'))
  assert [both.item(i).name for i in range(2)] == ['a/1.mp4', 'b/3.mp4']
  with pytest.raises(ValueError, match=r'matches .*n\.txt'):
    source_lib.find(os.path.join(root, 'b/*'))
  with pytest.raises(FileNotFoundError, match='nothing at'):
    source_lib.find(os.path.join(root, '*.avi'))


@pytest.mark.parametrize('name', ['set.tar', 'set.zip', 'x.parquet', 'noise'])
def test_archives_are_refused_by_name(tmp_path, name):
  content = {'set.tar': b'a.mp4' + bytes(507), 'noise': bytes(range(256)) * 9}
  (tmp_path / name).write_bytes(content.get(name, b'PK\3\4\0\1\2\3' * 9))
  with pytest.raises(ValueError, match=f'{name}.* is neither a video'):
    source_lib.find(str(tmp_path / name))


@pytest.mark.parametrize(
  'address', ['gs://b/v', 'https://x.org/v.mp4', 's3://b', 'hf://d/x']
)
def test_addresses_are_refused(address):
  with pytest.raises(ValueError, match=f'address .{address}.*mount it'):
    source_lib.find(address)


def test_commas_in_names_of_folders(tmp_path):
  one = touch(tmp_path / 'a,b', 'x.mp4')
  two = touch(tmp_path / 'c', 'y.mp4')
  three = touch(tmp_path / 'd, e,f', 'z.mp4')
  config = options.default()
  for given, count in ((one, 1), (f'{one},{two}', 2), (f'{two}, {three}', 2)):
    config.source = given
    assert len(options.find(config)) == count, given
  assert source_lib.split(f'{three},{one},none,') == (three, one, 'none', '')
  config.source = f'{tmp_path}/no,{two}'
  with pytest.raises(FileNotFoundError, match=f'nothing at .{tmp_path}/no'):
    options.find(config)


def test_cut_and_empty_shards_are_named(tmp_path):
  from array_record.python import array_record_module

  path = tmp_path / 'x.array_record'
  writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
  for number in range(9):
    writer.write(shards.pack(os.urandom(20_000), f'{number}.mp4', 'a'))
  writer.close()
  assert 'videos in 1 shards' in source_lib.find(str(tmp_path)).describe()
  whole = path.read_bytes()
  for size in (0, 1, 2**16, len(whole) // 2, len(whole) - 1):
    path.write_bytes(whole[:size])
    with pytest.raises(ValueError, match=f'x.array_record: found {size} bytes'):
      source_lib.find(str(tmp_path))
  path.write_bytes(whole)
  for text in ('{"classes": ["a"', '[1]', '[' * 99_999, '{"classes": [1]}'):
    (tmp_path / 'index.json').write_text(text)
    with pytest.raises(ValueError, match=r'index\.json'):
      source_lib.find(str(tmp_path))


def test_headers_of_records_may_be_anything(tmp_path):
  from array_record.python import array_record_module

  path = tmp_path / 'x.array_record'
  writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
  for header in (b'[' * 60_000, b'{"class": ["a"], "name": {}}', b'\xff{}'):
    size = len(header).to_bytes(4, 'little')
    writer.write(shards.MAGIC + size + header + b'media')
  writer.close()
  source = source_lib.find(str(path), classes=('a',))
  assert source.item(1).label == -1
  for number in (0, 2):
    with pytest.raises(shards.decode.VideoError, match='damaged record'):
      source.item(number)
