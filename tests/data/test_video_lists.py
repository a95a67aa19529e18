"""Manifests as people write them."""

import json

import pytest

from vssl_jax.data.clips import decode
from vssl_jax.data.sources import source as source_lib
from vssl_jax.data.sources import video_lists

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
NAMED |= {
  'semicolon.csv': 'path;label\na.mp4;run\nb c.mp4;jump\n',
  'bar.txt': 'a.mp4|run\nb c.mp4|jump\n',
  'semicolon.txt': 'a.mp4;run\nb c.mp4;jump\n',
  'array.json': '[{"path": "a.mp4", "label": "run"},\n'
  ' {"path": "b c.mp4", "label": "jump"}]',
  'pairs.json': '[["a.mp4", "run"], ["b c.mp4", "jump"]]',
  'commented.csv': '## v2\n#\npath,label\n# a\na.mp4,run\nb c.mp4,jump\n',
  'other_lines.txt': 'a.mp4 run\rb c.mp4 jump\r',
  'caption.csv': 'path,text,label\na.mp4,"a ""dog""\n\nruns, fast",run\n'
  f'b c.mp4,{"x" * 200_000},jump\n',
}
NAMED['any_case.csv'] = 'Label,Video\nrun,a.mp4\njump,b c.mp4\n'
PLAIN = {
  'plain.csv': 'a.mp4\nb c.mp4\n',
  'plain.txt': 'a.mp4\nb c.mp4\n',
  'column.csv': 'filename\na.mp4\nb c.mp4\n',
  'quoted.csv': '"a.mp4"\n"b c.mp4"\n',
  'lines.jsonl': '{"path": "a.mp4"}\n{"path": "b c.mp4", "label": null}\n',
  'nan.jsonl': '{"path": "a.mp4", "label": NaN}\n{"path": "b c.mp4"}\n',
  'videomae.csv': 'a.mp4 0 -1\nb c.mp4 0 -1\n',
  'array.json': '["a.mp4",\n "b c.mp4"]',
}


def read(folder, name, text, **options):
  path = folder / name
  path.write_text(text, encoding='utf-8', newline='')
  return video_lists.read(str(path), **options).rows


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
  with pytest.raises(ValueError, match="line 2: found '' as 'path'"):
    read(tmp_path, 'x.csv', 'path,label\n,3\n')


@pytest.mark.parametrize(
  'codec', ['utf-8-sig', 'utf-16', 'utf-16-le', 'utf-16-be', 'utf-32']
)
def test_encodings(codec, tmp_path):
  path = tmp_path / 'x.csv'
  path.write_bytes('path,label\r\ncaf\u00e9.mp4,\u8d70\r\n'.encode(codec))
  (row,) = video_lists.read(str(path)).rows
  assert (row.path, row.label) == ('caf\u00e9.mp4', '\u8d70')


def test_bytes_of_unknown_encoding_are_named(tmp_path):
  path = tmp_path / 'x.csv'
  for text in ('a.mp4,b\ncaf\u00e9.mp4,a\n', 'a.mp4,b\nb.mp4,\u00e9t\u00e9\n'):
    path.write_bytes(text.encode('latin-1'))
    with pytest.raises(ValueError, match=r'x\.csv, line 2: .* 0xe9, .*UTF-8'):
      video_lists.read(str(path))
  path.write_bytes(b'\xff\xfea')
  with pytest.raises(ValueError, match=r'x\.csv: looks like utf-16 and is not'):
    video_lists.read(str(path))


def test_names_may_begin_with_a_hash_and_hold_commas(tmp_path):
  text = '# of HMDB51\n#20_Rhythm.mp4 1\n#437 bike.avi 2\nhello, world.mp4 1\n'
  path = tmp_path / 'x.txt'
  path.write_text(text)
  found = video_lists.read(str(path))
  assert [row.path for row in found.rows] == [
    '#20_Rhythm.mp4', '#437 bike.avi', 'hello, world.mp4',
  ]  # fmt: skip
  assert [row.line for row in found.rows] == [2, 3, 4]
  assert found.notes == ('1 comment lines are not read',)


def test_labels_that_the_first_row_lacks_are_read(tmp_path):
  rows = read(tmp_path, 'x.csv', 'path,label\na.mp4\nb.mp4,run\n')
  assert [row.label for row in rows] == ['', 'run']
  text = '{"path": "a.mp4"}\n{"path": "b.mp4", "label": 3}\n'
  assert [r.label for r in read(tmp_path, 'x.jsonl', text)] == ['', '3']
  rows = read(tmp_path, 'x.txt', 'a.mp4\nb.mp4 run\n')
  assert [row.label for row in rows] == ['', 'run']


UNBALANCED = [
  'a.mp4,run\n"b.mp4,run\nc.mp4,run\nd.mp4,run\n',
  'a.mp4,run\n"b.mp4,run\nc.mp4",run\nd.mp4,run\n',
  'path,text\na.mp4,x\nb.mp4,"x\nc.mp4,y\nd.mp4,"z\n',
  'path,text\na.mp4,x\nb.mp4,"x\nc.mp4,y"\nd.mp4,z\n',
]


@pytest.mark.parametrize('text', UNBALANCED)
def test_an_unbalanced_quote_swallows_no_rows(text, tmp_path):
  line = 3 if text.startswith('path') else 2
  with pytest.raises(ValueError, match=rf'x\.csv, line {line}: .*quote'):
    read(tmp_path, 'x.csv', text)


def test_rows_with_more_cells_than_columns_are_named(tmp_path):
  text = 'path,label\na.mp4,run\nb.mp4,run, fast\n'
  with pytest.raises(ValueError, match=r"line 3: 3 cells under 2 .*','"):
    read(tmp_path, 'x.csv', text)
  with pytest.raises(ValueError, match="two columns have the name 'path'"):
    read(tmp_path, 'x.csv', 'path,label,path\na.mp4,1,b.mp4\n')
  with pytest.raises(ValueError, match=r'line 2: the label .* several lines'):
    read(tmp_path, 'x.csv', 'path,label\na.mp4,"x\ny"\n')


@pytest.mark.parametrize(
  'name', ['deep.jsonl', 'deep.json', 'array.json', 'number.json', 'empty.json']
)
def test_json_of_others_is_refused_by_name(name, tmp_path):
  text = {
    'deep.jsonl': '{"path": ' + '[' * 99_999,
    'deep.json': '[' * 99_999,
    'array.json': '[{"path": "a.mp4"},',
    'number.json': '[3]',
    'empty.json': '[]',
  }[name]
  with pytest.raises(ValueError, match=name):
    read(tmp_path, name, text)


def test_unknown_column_names_are_no_row(tmp_path):
  text = 'video_name,tag\nv0.mp4,a\nv1.mp4,b\n'
  with pytest.raises(ValueError, match=r"\['video_name', 'tag'\] holds none"):
    read(tmp_path, 'x.csv', text)
  options = {'path_column': 'video_name', 'label_column': 'tag'}
  assert [r.label for r in read(tmp_path, 'x.csv', text, **options)] == [
    'a',
    'b',
  ]
  with pytest.raises(ValueError, match=r"holds none .*\['clip_id'\]"):
    read(tmp_path, 'x.csv', text, path_column='clip_id')


def test_columns_and_rows_that_are_not_read_are_noted(tmp_path):
  path = tmp_path / 'x.csv'
  path.write_text('path,tag,fold\na.mp4,x,0\na.mp4,x,0\nb.mp4,y,1\n')
  assert video_lists.read(str(path), where='fold=0').notes == (
    'data.where=fold=0 leaves out 1 rows',
    "no column of labels among ['tag', 'fold'] (see data.label_column)",
    '1 rows repeat a path',
  )


def test_a_nul_in_a_name_is_one_bad_file(tmp_path):
  path = tmp_path / 'x.txt'
  path.write_bytes(b'a.mp4 1\nb\0.mp4 1\n')
  source = source_lib.find(str(path))
  assert source.item(0).name == 'a.mp4' and source.fingerprint
  with pytest.raises(decode.VideoError, match=r'missing: .*NUL'):
    source.item(1)
