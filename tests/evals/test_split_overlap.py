"""The same videos are found in two lists, however they are written."""

import os

import numpy as np
import pytest

from tests.evals import finetune_small as small
from vssl_jax import config as config_lib
from vssl_jax.data.sources import scenes, shards, source
from vssl_jax.evals import split_overlap, splits
from vssl_jax.evals.finetune import videos
from vssl_jax.evals.probe import setup

SIZE = (
  3 * split_overlap.PIECES * split_overlap.PIECE
)  # larger than what is read of it


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Class folders of files that differ in content only, not in size."""
  root = tmp_path_factory.mktemp('overlap')
  rng = np.random.default_rng(0)
  for split, names in (('tr', 'abcd'), ('te', 'efg')):
    for number, name in enumerate(names):
      path = root / split / f'c{number % 2}' / f'{name}.mp4'
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(rng.bytes(SIZE))
  return root


def count(train, test, **where):
  return split_overlap.find(
    source.find(str(train)), source.find(str(test), **where)
  )


def test_other_videos_are_not_the_same(folder):
  found = count(folder / 'tr', folder / 'te')
  assert found == split_overlap.Overlap(0, 3, ())


@pytest.mark.parametrize('kind', ['path', 'link', 'hard', 'copy', 'renamed'])
def test_the_same_files_under_other_names(kind, folder, tmp_path):
  other = folder / 'te' / '..' / 'tr'
  if kind == 'link':
    other = tmp_path / 'link'
    other.symlink_to(folder / 'tr')
  elif kind != 'path':
    other = tmp_path / 'other'
    for number, path in enumerate(sorted((folder / 'tr').rglob('*.mp4'))):
      new = other / path.parent.name / f'{number}.mp4'
      new.parent.mkdir(parents=True, exist_ok=True)
      if kind == 'hard':
        os.link(path, new)
      else:
        new.write_bytes(path.read_bytes())
  found = count(folder / 'tr', other)
  assert (found.count, found.total, len(found.examples)) == (4, 4, 3)


def test_one_video_of_several_and_files_that_are_missing(folder, tmp_path):
  rows = [folder / 'te/c0/e.mp4', tmp_path / 'gone.mp4', folder / 'tr/c0/c.mp4']
  (tmp_path / 'list.csv').write_text(
    'path,label\n' + ''.join(f'{row},{i % 2}\n' for i, row in enumerate(rows))
  )
  found = count(folder / 'tr', tmp_path / 'list.csv')
  assert (found.count, found.total) == (1, 3)
  assert found.examples == ((str(rows[2]), 'c0/c.mp4'),)


def test_names_that_cannot_be_opened_are_passed_over(folder, tmp_path):
  bad = os.fsdecode(b'\xff.mp4')  # not UTF-8
  (tmp_path / bad).write_bytes((folder / 'tr/c0/c.mp4').read_bytes())
  root, labels = str(tmp_path), (-1, -1)
  found = split_overlap.find(
    source.find(str(folder / 'tr')),
    source.Joined((source.Files(root, ('a\0.mp4', bad), labels),)),
  )
  assert (found.count, found.examples) == (1, ((bad, 'c0/c.mp4'),))


def test_records_of_shards_are_compared_by_their_content(
  folder, tmp_path, monkeypatch, caplog
):
  from array_record.python import array_record_module

  paths = sorted((folder / 'tr').rglob('*.mp4'))
  for name, order in (('one', paths), ('two', paths[::-1])):
    (tmp_path / name).mkdir()
    writer = array_record_module.ArrayRecordWriter(
      str(tmp_path / name / 'x.array_record'), 'group_size:1'
    )
    for number, path in enumerate(order):
      writer.write(shards.pack(path.read_bytes(), f'{name}{number}', 'c'))
    writer.close()
  for train, test in (('one', 'two'), (folder / 'tr', 'two')):
    found = count(tmp_path / train, tmp_path / test)
    assert (found.count, found.total) == (4, 4)
  assert count(folder / 'te', tmp_path / 'one').count == 0
  # Beyond the limit whole shards are compared, and it is said.
  monkeypatch.setattr(split_overlap, 'MAX_SHARD_BYTES', 10)
  assert count(tmp_path / 'one', tmp_path / 'one').count == 1
  assert 'only complete shards' in caplog.text


def test_frames_in_folders_and_parts_of_a_room(tmp_path):
  rng = np.random.default_rng(1)
  for room in ('r', 'copy'):
    for kind in ('color', 'depth'):
      (tmp_path / room / kind).mkdir(parents=True)
  for number in range(8):
    for kind in ('color', 'depth'):
      data = rng.bytes(500)
      for room in ('r', 'copy'):
        (tmp_path / room / kind / f'{number}.png').write_bytes(data)

  def part(room, where):
    return source.Joined(scenes.find([str(tmp_path / room)], where=where))

  whole = part('r', '')
  for room in ('r', 'copy'):
    assert split_overlap.find(whole, part(room, 'frames=2-4')).count == 3
  assert not split_overlap.find(
    part('r', 'frames=0-3'), part('r', 'frames=4-7')
  ).count
  folders = [str(tmp_path / room / 'color') for room in ('r', 'copy')]
  a, b = (split_overlap._of_files([''], [path]) for path in folders)
  assert next(a).same(next(b))


def test_videos_that_differ_in_a_few_places_are_not_the_same(tmp_path):
  # As uncompressed videos of a small thing before a black wall are.
  for name, place in (
    ('a', split_overlap.PIECE + 9),
    ('b', 2 * split_overlap.PIECE),
  ):
    content = bytearray(SIZE)
    content[place] = 255
    (tmp_path / name).mkdir()
    (tmp_path / name / 'x.avi').write_bytes(content)
    (tmp_path / f'{name}2').mkdir()
    (tmp_path / f'{name}2' / 'y.avi').write_bytes(content)
  contents = [
    next(split_overlap._contents(source.find(str(tmp_path / name))))
    for name in 'ab'
  ]
  assert contents[0].digest == contents[1].digest
  assert count(tmp_path / 'a', tmp_path / 'b').count == 0
  assert count(tmp_path / 'a', tmp_path / 'a2').count == 1


def test_many_files_of_one_size_are_not_compared_pair_by_pair(
  tmp_path, monkeypatch
):
  for name in 'ab':
    (tmp_path / name).mkdir()
    for number in range(50):
      (tmp_path / name / f'{number}.avi').write_text(f'{name} {number:3}')
  (tmp_path / 'b' / '7.avi').write_text('a   3')
  calls, same = [], split_overlap._Content.same

  def counted(content, other):
    calls.append(other)
    return same(content, other)

  monkeypatch.setattr(split_overlap._Content, 'same', counted)
  found = count(tmp_path / 'a', tmp_path / 'b')
  assert found.examples == (('7.avi', '3.avi'),)
  assert len(calls) == 1


@pytest.mark.parametrize('kind', ['slash', 'link', 'copy', 'part', 'other'])
def test_validation_on_test_videos_is_noticed(kind, folder, tmp_path):
  c = config_lib.fine_tuning()
  test, valid = folder / 'te', tmp_path / 'valid'
  c.finetune.train, c.finetune.test = (str(folder / 'tr'),), (str(test),)
  names = {'copy': 'efg', 'part': 'e', 'other': ''}.get(kind, '')
  if kind == 'link':
    valid.symlink_to(test)
  elif kind != 'slash':
    for number in range(2):
      (valid / f'c{number}').mkdir(parents=True)
      (valid / f'c{number}' / 'own.mp4').write_bytes(b'own %d' % number)
    for path in test.rglob('*.mp4'):
      if path.stem in names:
        new = valid / path.parent.name / f'new_{path.name}'
        new.write_bytes(path.read_bytes())
  c.finetune.valid = (f'{test}/' if kind == 'slash' else str(valid),)
  found = videos.find(c)
  wanted = {'part': 1, 'other': 0}.get(kind, 3)
  assert (found.chosen.count, found.chosen.total) == (wanted, 3)
  assert found.chosen_by_test == (wanted > 0)


@pytest.mark.parametrize('section', ['probe', 'finetune'])
def test_evaluations_refuse_them_or_report_them(section, folder, tmp_path):
  c = config_lib.default()
  c.data.update(dict(frames=4, size=(16, 16)))
  (tmp_path / 'test').mkdir()
  for name, path in (('x', 'tr/c0/a.mp4'), ('y', 'te/c0/e.mp4')):
    new = tmp_path / 'test' / path.split('/')[1] / f'{name}.mp4'
    new.parent.mkdir(exist_ok=True)
    new.write_bytes((folder / path).read_bytes())
  c[section].train = (str(folder / 'tr'),)
  c[section].test = (str(tmp_path / 'test'),)
  c.finetune.holdout = 0.5

  def start():
    if section == 'probe':
      return {'test': setup.make(c, small.encoder_of()).shared}
    return videos.find(c).shared

  with pytest.raises(ValueError, match='hold the same videos: 1 of the 2'):
    start()
  c[section].allow_overlap = True
  (shared,) = start().values()
  assert (shared.count, shared.total) == (1, 2)
  assert shared.examples == (('c0/x.mp4', 'c0/a.mp4'),)
  remark = splits.describe({'count': 1, 'total': 2})
  assert remark == '1 of the 2 were trained on; optimistic'
