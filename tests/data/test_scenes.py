"""Lists of RGB-D frames in the layouts that people have."""

import json

import numpy as np
import pytest
from PIL import Image

from vssl_jax.data import options
from vssl_jax.data.sources import scenes


def touch(*paths):
  for path in paths:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def scannet(root, numbers, colour='color', ending='jpg', width=0):
  for n in numbers:
    name = f'{n:0{width}d}'
    touch(root / colour / f'{name}.{ending}', root / 'depth' / f'{name}.png')
  touch(root / 'pose' / '0.txt', root / 'intrinsic' / 'a.txt')


def frames(item):
  stretch = json.loads(item.media)
  return stretch['folder'], list(
    zip(stretch['colour'], stretch['depth'], strict=True)
  )


def test_a_folder_for_each_kind(tmp_path):
  scannet(tmp_path / 'scene0001_00', range(12))  # 0 ... 11, not 0, 1, 10, ...
  scannet(tmp_path / 'a' / 'room', range(3), 'RGB', 'png', 6)
  (found,) = scenes.find([str(tmp_path)])
  assert [s.name for s in found.scenes] == ['a/room', 'scene0001_00']
  assert len(found) == 2
  folder, pairs = frames(found.item(1))
  assert folder == str(tmp_path / 'scene0001_00')
  assert pairs == [(f'color/{i}.jpg', f'depth/{i}.png') for i in range(12)]
  assert frames(found.item(0))[1][2] == ('RGB/000002.png', 'depth/000002.png')
  assert found.item(1).name == 'scene0001_00: color/0.jpg to color/11.jpg'


@pytest.mark.parametrize(
  ('colour', 'depth'),
  [
    ('frame-{:06d}.color.png', 'frame-{:06d}.depth.png'),
    ('rgb_{:05d}.jpg', 'sync_depth_{:05d}.png'),
  ],
)
def test_both_kinds_in_one_folder(colour, depth, tmp_path):
  for n in (2, 0, 1):
    touch(*(tmp_path / 'seq-01' / x.format(n) for x in (colour, depth)))
    touch(tmp_path / 'seq-01' / f'frame-{n:06d}.pose.txt')
  (found,) = scenes.find([str(tmp_path)])
  _, pairs = frames(found.item(0))
  assert pairs == [(colour.format(n), depth.format(n)) for n in range(3)]


def test_a_scene_itself_and_a_list_of_scenes(tmp_path):
  for number in range(3):
    scannet(tmp_path / f's{number}', range(2 + number))
  (one,) = scenes.find([str(tmp_path / 's1')])
  assert [s.name for s in one.scenes] == ['s1']
  (tmp_path / 'val.txt').write_text('# of the paper\ns2\n\ns0\n')
  (listed,) = scenes.find([str(tmp_path / 'val.txt')])
  assert [s.count for s in listed.scenes] == [4, 2]
  two = scenes.find([str(tmp_path / 's0'), str(tmp_path / 's2')])
  assert [len(part) for part in two] == [1, 1]
  assert list(one.lines()) != list(listed.lines())


def test_stretches_cover_each_frame_once(tmp_path):
  scannet(tmp_path / 'long', range(70))
  scannet(tmp_path / 'short', range(5))
  (found,) = scenes.find([str(tmp_path)], stretch=20)
  sizes = [len(frames(found.item(i))[1]) for i in range(len(found))]
  assert sizes == [23, 23, 24, 5]
  seen = [p for i in range(3) for p, _ in frames(found.item(i))[1]]
  assert seen == [f'color/{i}.jpg' for i in range(70)]
  assert found.item(3).name.startswith('short')


def test_ranges_of_frames_are_those_of_their_numbers(tmp_path):
  scannet(tmp_path / 'a', range(0, 100, 5))  # each fifth was exported
  scannet(tmp_path / 'b', range(3))
  (found,) = scenes.find([str(tmp_path)], where='frames=10-30, 90-99')
  assert [s.name for s in found.scenes] == ['a']
  names = [c for c, _ in frames(found.item(0))[1]]
  assert names == [f'color/{i}.jpg' for i in (10, 15, 20, 25, 30, 90, 95)]


def test_pictures_without_a_partner_are_left_out_and_told(tmp_path, caplog):
  scannet(tmp_path / 'a', range(5))
  (tmp_path / 'a/depth/3.png').unlink()
  with caplog.at_level('WARNING'):
    (found,) = scenes.find([str(tmp_path)])
  names = [c for c, _ in frames(found.item(0))[1]]
  assert names == [f'color/{i}.jpg' for i in (0, 1, 2, 4)]
  assert '1 of 9 pictures are left out' in caplog.text


@pytest.mark.parametrize(
  ('where', 'message'),
  [
    ('fold=1', "data.where is 'fold=1'; of RGB-D frames it takes"),
    ('frames=50-60', 'no frames are left of 1 scenes .*the last frame is 9'),
  ],
)
def test_wrong_ranges_are_named(where, message, tmp_path):
  scannet(tmp_path / 'a', range(10))
  with pytest.raises(ValueError, match=message):
    scenes.find([str(tmp_path)], where=where)


def test_where_there_is_nothing(tmp_path):
  with pytest.raises(FileNotFoundError, match=r'data\.source is empty'):
    scenes.find([''])
  with pytest.raises(FileNotFoundError, match='no folder of RGB-D scenes'):
    scenes.find([str(tmp_path / 'x')])
  touch(tmp_path / 'color' / '1.jpg')
  with pytest.raises(FileNotFoundError, match='wanted folders that hold color'):
    scenes.find([str(tmp_path)])
  # Time stamps of two clocks: no name has a partner.
  touch(tmp_path / 'depth' / '1305031102.160.png')
  with pytest.raises(ValueError, match='by the numbers in their names'):
    scenes.find([str(tmp_path)])
  with pytest.raises(ValueError, match=r'data\.stretch is -1'):
    scenes.find([str(tmp_path)], stretch=-1)


def test_units_say_that_a_source_has_depth(tmp_path):
  scannet(tmp_path / 'a', range(10))
  Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / 'a/x.png')
  config = options.default()
  config.source = str(tmp_path)
  with pytest.raises(ValueError, match=r'RGB-D scenes: set data\.depth_units'):
    options.find(config)
  config.depth_units, config.stretch = 1000.0, 5
  assert len(options.find(config)) == 2
