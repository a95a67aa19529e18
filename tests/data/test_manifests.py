"""Manifests as people write them."""

import json

import pytest

from vssl_jax.data import manifests

NAMED = {
  'comma.csv': 'path,label,fold\na.mp4,run,0\nb c.mp4,jump,1\n',
  'any_case.csv': 'Label;x,Video\nrun,a.mp4\njump,b c.mp4\n',
  'tab.tsv': 'path\tlabel\na.mp4\trun\nb c.mp4\tjump\n',
  'bare.tsv': 'a.mp4\trun\nb c.mp4\tjump\n',
  'bare.csv': 'a.mp4,run\n"b c.mp4",jump\n',
  'space.txt': 'a.mp4 run\nb c.mp4 jump\n',
  'space_in_csv.csv': 'a.mp4 run\nb c.mp4 jump\n',
  'quoted.txt': '"a.mp4" run\n\'b c.mp4\' jump\n',
  'columns.txt': 'path label\na.mp4 run\n"b c.mp4" jump\n',
  'comment.txt': '# two videos\n\na.mp4 run\nb c.mp4 jump\n',
  'windows.csv': '\ufeffpath,label\r\na.mp4,run\r\nb c.mp4,jump\r\n',
  'lines.jsonl': '{"video": "a.mp4", "label": "run"}\n'
  '{"video": "b c.mp4", "label": "jump"}\n',
}
NAMED['any_case.csv'] = 'Label,Video\nrun,a.mp4\njump,b c.mp4\n'
PLAIN = {
  'plain.csv': 'a.mp4\nb c.mp4\n',
  'plain.txt': 'a.mp4\nb c.mp4\n',
  'column.csv': 'filename\na.mp4\nb c.mp4\n',
  'quoted.csv': '"a.mp4"\n"b c.mp4"\n',
  'lines.jsonl': '{"path": "a.mp4"}\n{"path": "b c.mp4", "label": null}\n',
}


def read(folder, name, text, **options):
  path = folder / name
  path.write_text(text, encoding='utf-8', newline='')
  return manifests.read(str(path), **options)


@pytest.mark.parametrize('name', NAMED)
def test_paths_and_labels(name, tmp_path):
  rows = read(tmp_path, name, NAMED[name])
  assert [row.path for row in rows] == ['a.mp4', 'b c.mp4']
  assert [row.label for row in rows] == ['run', 'jump']


@pytest.mark.parametrize('name', PLAIN)
def test_paths_without_labels(name, tmp_path):
  rows = read(tmp_path, name, PLAIN[name])
  assert [row.path for row in rows] == ['a.mp4', 'b c.mp4']
  assert [row.label for row in rows] == ['', '']


def test_numbers_are_kept_as_text(tmp_path):
  line = json.dumps({'path': 'a.mp4', 'label': 7})
  assert read(tmp_path, 'x.jsonl', line)[0].label == '7'
  assert read(tmp_path, 'x.csv', 'a.mp4 12\n')[0].label == '12'


def test_rows_are_picked_by_a_column(tmp_path):
  text = 'path,label,fold\na.mp4,x,0\nb.mp4,x,1\nc.mp4,y,2\n'
  paths = lambda where: [
    r.path for r in read(tmp_path, 'x.csv', text, where=where)
  ]
  assert paths('fold=0,2') == ['a.mp4', 'c.mp4']
  assert paths('fold!=0') == ['b.mp4', 'c.mp4']
  with pytest.raises(ValueError, match='leaves no rows'):
    paths('fold=7')
  with pytest.raises(ValueError, match=r"one of\s+the columns .*'fold'"):
    paths('split=train')


def test_columns_can_be_named(tmp_path):
  text = 'url,kind,label\na.mp4,x,0\nb.mp4,y,1\n'
  rows = read(tmp_path, 'x.csv', text, path_column='url', label_column='kind')
  assert [(r.path, r.label) for r in rows] == [('a.mp4', 'x'), ('b.mp4', 'y')]
  with pytest.raises(ValueError, match=r'data\.path_column'):
    read(tmp_path, 'x.jsonl', '{"url": "a.mp4"}')
  with pytest.raises(ValueError, match="no column 'genre'"):
    read(tmp_path, 'x.jsonl', '{"path": "a.mp4"}', label_column='genre')


def test_what_cannot_be_understood_is_named(tmp_path):
  with pytest.raises(ValueError, match='is empty'):
    read(tmp_path, 'x.csv', '\n\n')
  with pytest.raises(ValueError, match='no rows below'):
    read(tmp_path, 'x.csv', 'path,label\n')
  with pytest.raises(ValueError, match='line 1: 3 columns'):
    read(tmp_path, 'x.csv', 'a.mp4,3,x\n')
  with pytest.raises(ValueError, match='line 2: wanted one JSON object'):
    read(tmp_path, 'x.jsonl', '{"path": "a.mp4"}\nb.mp4\n')
  with pytest.raises(ValueError, match="row 1 has no 'path'"):
    read(tmp_path, 'x.csv', 'path,label\n,3\n')
