"""Labels as lists write them."""

import json

import pytest

from vssl_jax.data.sources import labels, source

COUNTED = {
  'minus one is no label': (['0', '2', '-1', ''], [0, 1, -1, -1], ('0', '2')),
  'gaps of tables': (['nan', '1.0', 'NaN'], [-1, 0, -1], ('1',)),
  'none has one': (['-1', '-1'], [-1, -1], None),
  'from one': (['1', '3', '2'], [0, 2, 1], ('1', '2', '3')),
  'gaps': (['7', '123456789012345', '0'], [1, 2, 0], ('0', '7', '12345678901'
    '2345')),
  'leading zeros': (['02', '01', '1', '10'], [1, 0, 0, 2], ('1', '2', '10')),
  'whole numbers as reals': (['1.0', '0.0', ''], [1, 0, -1], ('0', '1')),
  'names': (['b', '-1', 'a'], [1, -1, 0], ('a', 'b')),
  'names and numbers': (['b', '10', '9'], [2, 0, 1], ('10', '9', 'b')),
  'identifiers': (['9' * 5000, '8' * 5000], [1, 0], ('8' * 5000, '9' * 5000)),
}  # fmt: skip


@pytest.mark.parametrize('name', COUNTED)
def test_classes_are_the_labels_that_occur(name):
  texts, numbers, classes = COUNTED[name]
  assert labels.number(texts) == (tuple(numbers), classes)


@pytest.mark.parametrize('text', ['0.37', '1e-3', '-2', '1.5e400', '-0.5'])
def test_real_and_negative_numbers_are_refused_by_name(tmp_path, text):
  path = tmp_path / 'scores.txt'
  path.write_text(f'a.mp4 1\nb.mp4 {text}\n')
  with pytest.raises(ValueError, match=rf"scores\.txt: the label '{text}'"):
    source.find(str(path))
  # As names of classes they may be anything.
  assert source.find(str(path), classes=('1', text)).item(1).label == 1


def test_labels_of_test_videos_are_those_of_training():
  train = labels.number(['03', '01', '7'])
  assert train.classes == ('1', '3', '7')
  assert labels.number(['7', '3', '003', '-1'], train.classes).numbers == (
    2, 1, 1, -1,
  )  # fmt: skip
  folders = ('01', '02')
  assert labels.number(['2', '01'], folders) == ((1, 0), folders)
  with pytest.raises(ValueError, match=r"\['8'\] are not among the 3 classes"):
    labels.number(['7', '8'], train.classes, 'test.csv')


def test_several_labels_of_a_video_are_refused(tmp_path):
  path = tmp_path / 'x.jsonl'
  for label in ([1, 2], {'a': 1}):
    path.write_text(json.dumps({'path': 'a.mp4', 'label': label}))
    with pytest.raises(ValueError, match=r'x\.jsonl, line 1: the label is'):
      source.find(str(path))


def test_whole_numbers_of_several_lists_are_sorted(tmp_path):
  (tmp_path / 'a.txt').write_text('a.mp4 3\nb.mp4 0\n')
  (tmp_path / 'b.txt').write_text('c.mp4 10\nd.mp4 1\ne.mp4 -1\n')
  both = source.find([str(tmp_path / 'a.txt'), str(tmp_path / 'b.txt')])
  assert both.classes == ('0', '1', '3', '10')
  assert [both.item(i).label for i in range(5)] == [2, 0, 3, 1, -1]
  assert (
    both.describe()
    .splitlines()[1]
    .endswith('b.txt: 3 videos, 2 classes (1, 10); 1 without a label')
  )
