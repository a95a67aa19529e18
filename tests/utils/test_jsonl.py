from vssl_jax.utils import jsonl


def test_lines_that_are_whole_are_read_and_the_next_one_is_whole(
  tmp_path, caplog
):
  path = tmp_path / 'x.jsonl'
  assert jsonl.read(path) == []
  for content, wanted in {
    b'': [],
    b'{"a": 1}\n{"a": 2}\n': [1, 2],
    b'{"a": 1}\n{"a": ': [1],
    b'{"a": 1}\n\0\0\0\0\0': [1],
    b'{"a": 1}\n[1]\nnull\n\xff\xfe\n{"a": 2}': [1, 2],
    b'{"a": 1}\n' + b'[' * 100_000 + b'\n{"a": 2}\n': [1, 2],
    '{"a": "\u2028\x85"}\n'.encode(): ['\u2028\x85'],  # no ends of lines
  }.items():
    path.write_bytes(content)
    assert [x['a'] for x in jsonl.read(path)] == wanted
    with jsonl.append_to(path) as file:
      file.write('{"a": 3}\n')
    assert [x['a'] for x in jsonl.read(path)] == [*wanted, 3]
  path.write_bytes(b'{"a": 1}\nodd\n{"a": 2}\n')
  caplog.clear()
  jsonl.read(path)
  assert f'{path}: skipping 1 of 3 lines' in caplog.text
  assert 'line 2' in caplog.text
