"""The same videos are found in two lists, however they are written."""

import os

import numpy as np
import pytest

from tests.evals import finetune_small as small
from vssl_jax import config as config_lib
from vssl_jax.data import records, scenes, sources
from vssl_jax.evals import finetune_videos, job, lists, overlap

SIZE = 3 * overlap.PIECES * overlap.PIECE  # larger than what is read of it


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
  return overlap.find(
    sources.find(str(train)), sources.find(str(test), **where)
  )


def test_other_videos_are_not_the_same(folder):
  found = count(folder / 'tr', folder / 'te')
  assert found == overlap.Overlap(0, 3, ())


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
  found = overlap.find(
    sources.find(str(folder / 'tr')),
    sources.Joined((sources.Files(root, ('a\0.mp4', bad), labels),)),
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
      writer.write(records.pack(path.read_bytes(), f'{name}{number}', 'c'))
    writer.close()
  for train, test in (('one', 'two'), (folder / 'tr', 'two')):
    found = count(tmp_path / train, tmp_path / test)
    assert (found.count, found.total) == (4, 4)
  assert count(folder / 'te', tmp_path / 'one').count == 0
  # Beyond the limit whole shards are compared, and it is said.
  monkeypatch.setattr(overlap, 'MAX_SHARD_BYTES', 10)
  assert count(tmp_path / 'one', tmp_path / 'one').count == 1
  assert 'for whole shards only' in caplog.text


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
    return sources.Joined(scenes.find([str(tmp_path / room)], where=where))

  whole = part('r', '')
  for room in ('r', 'copy'):
    assert overlap.find(whole, part(room, 'frames=2-4')).count == 3
  assert not overlap.find(
    part('r', 'frames=0-3'), part('r', 'frames=4-7')
  ).count
  folders = [str(tmp_path / room / 'color') for room in ('r', 'copy')]
  a, b = (overlap._of_files([''], [path]) for path in folders)
  assert next(a).same(next(b))


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

  def start():
    if section == 'probe':
      return {'test': job.make(c, small.encoder_of()).shared}
    return finetune_videos.find(c).shared

  with pytest.raises(ValueError, match='hold the same videos: 1 of the 2'):
    start()
  c[section].allow_overlap = True
  (shared,) = start().values()
  assert (shared.count, shared.total) == (1, 2)
  assert shared.examples == (('c0/x.mp4', 'c0/a.mp4'),)
  remark = lists.describe({'count': 1, 'total': 2})
  assert remark == '1 of the 2 were trained on; flatters'
