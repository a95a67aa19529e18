"""Reads manifests: text files that list videos, optionally with labels.

Supported are tables with commas, semicolons, tabs, bars or spaces, with or
without a line of column names; JSON lines and JSON arrays; quoted and unquoted
paths, also with spaces; absolute paths and paths relative to the folder of the
manifest; UTF-8 and UTF-16.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence

from vssl_jax.data.sources import delimited, json_files

PATH_COLUMNS = (
  'path', 'video', 'file', 'filename', 'video_path', 'filepath', 'file_path',
  'clip', 'image', 'uri', 'src',
)  # fmt: skip
LABEL_COLUMNS = (
  'label', 'class', 'label_id', 'class_id', 'label_name', 'class_name',
  'category', 'action', 'target',
)  # fmt: skip
ENDINGS = (
  '.csv', '.tsv', '.txt', '.list', '.lst', '.jsonl', '.ndjson', '.json',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
  """A row: path, label as text ('' for none) and its first line number."""

  path: str
  label: str
  line: int = 0


@dataclasses.dataclass(frozen=True)
class Manifest:
  """Content of a manifest.

  Attributes:
    rows: the videos.
    notes: unread and repeated content, for the summary.
  """

  rows: tuple[Row, ...]
  notes: tuple[str, ...] = ()


def read(
  path: str,
  *,
  where: str = '',
  path_column: str = '',
  label_column: str = '',
) -> Manifest:
  """Reads a manifest.

  Args:
    path: path of the manifest.
    where: 'column=a,b' keeps the rows with one of these values,
      'column!=a,b' the others; needs column names.
    path_column: column of paths; '' takes the first known name.
    label_column: column of labels; '' takes the first known name.

  Raises:
    ValueError: the manifest is invalid; with the file, the line and the
      expected content.
  """
  text = _text(path)
  notes = []
  array = _array(path, text)
  if array is not None:
    table = _objects(path, array)
  else:
    numbered = enumerate(re.split(r'\r\n|\n|\r', text), 1)
    numbered = [(number, line) for number, line in numbered if line.strip()]
    lines = [(number, line) for number, line in numbered if not _comment(line)]
    if len(numbered) > len(lines):
      notes.append(f'{len(numbered) - len(lines)} comment lines are not read')
    if not lines:
      raise ValueError(f'{path}: the manifest is empty')
    if lines[0][1].lstrip().startswith('{'):
      table = _objects(path, _json_lines(path, lines))
    else:
      known = (path_column.lower(),) if path_column else PATH_COLUMNS
      table = delimited.table(path, lines, known)
  if not table.rows:
    raise ValueError(f'{path}: column names, but no rows below them')
  filtered = _filter(path, table, where)
  if len(filtered.rows) < len(table.rows):
    number = len(table.rows) - len(filtered.rows)
    notes.append(f'data.where={where} leaves out {number} rows')
  return _manifest(path, filtered, path_column, label_column, notes)


def _manifest(
  path: str,
  table: delimited.Table,
  path_column: str,
  label_column: str,
  notes: list[str],
) -> Manifest:
  """Reads paths and labels from the columns of a table."""
  paths = _column(path, table.columns, path_column, PATH_COLUMNS)
  labels = _column(path, table.columns, label_column, LABEL_COLUMNS)
  if paths is None:
    raise ValueError(
      f'{path}: none of the columns {table.columns} is one of '
      f'{list(PATH_COLUMNS)}; set data.path_column'
    )
  unread = [c for c in table.columns if c not in (paths, labels)]
  if unread and labels is None:
    notes.append(
      f'no column of labels among {unread[:5]} (see data.label_column)'
    )
  rows = []
  for number, cells in table.rows:
    name = str(cells.get(paths) or '').strip()
    if not name or '\n' in name:
      raise ValueError(
        f'{path}, line {number}: found {name[:80]!r} as {paths!r}; wanted a '
        'path'
      )
    row = Row(os.path.expanduser(name), _label(path, number, cells, labels))
    if '\n' in row.label:
      raise ValueError(
        f'{path}, line {number}: the label {row.label[:80]!r} has several lines'
      )
    _check_text(path, number, row)
    rows.append(dataclasses.replace(row, line=number))
  repeated = len(rows) - len({row.path for row in rows})
  if repeated:
    notes.append(f'{repeated} rows repeat a path')
  return Manifest(tuple(rows), tuple(notes))


def _label(path: str, number: int, cells: dict, column: str | None) -> str:
  label = cells.get(column) if column is not None else None
  if isinstance(label, list | dict):
    raise ValueError(
      f'{path}, line {number}: the label is {str(label)[:80]}; wanted one '
      'class for each video'
    )
  if label is None or (isinstance(label, float) and math.isnan(label)):
    return ''
  return str(label).strip()


def _check_text(path: str, number: int, row: Row) -> None:
  """Raises ValueError for bytes that are not UTF-8, but in existing paths."""
  invalid = [c for c in row.path + row.label if '\udc80' <= c <= '\udcff']
  if not invalid:
    return
  root = os.path.dirname(os.path.abspath(path))
  if row.label.isprintable() and os.path.exists(os.path.join(root, row.path)):
    return
  raise ValueError(
    f'{path}, line {number}: found the byte 0x{ord(invalid[0]) - 0xDC00:02x}, '
    'which is not UTF-8, and no file of that name; save the list as UTF-8 '
    '(iconv -f latin1 -t utf-8)'
  )


def is_text(raw: bytes) -> bool:
  """Returns whether a file is text, given its first bytes."""
  if _utf16(raw):
    return True
  part = raw[:4096]
  control = sum(byte < 9 or 13 < byte < 32 for byte in part)
  return control <= 0.05 * len(part)


def _utf16(raw: bytes) -> str:
  """Returns the codec of UTF-16 or UTF-32 text, '' for other text."""
  for mark, codec in (
    (b'\xff\xfe\0\0', 'utf-32'), (b'\0\0\xfe\xff', 'utf-32'),
    (b'\xff\xfe', 'utf-16'), (b'\xfe\xff', 'utf-16'),
  ):  # fmt: skip
    if raw.startswith(mark):
      return codec
  part = raw[:1000]
  for first, codec in ((0, 'utf-16-be'), (1, 'utf-16-le')):
    zeros, others = part[first::2], part[1 - first :: 2]
    if zeros and zeros.count(0) > 0.9 * len(zeros) and not others.count(0):
      return codec
  return ''


def _text(path: str) -> str:
  """Reads a text file; bytes that are not UTF-8 become surrogates."""
  try:
    with open(path, 'rb') as file:
      raw = file.read()
  except OSError as error:
    raise ValueError(f'{path}: cannot be read ({error.strerror})') from error
  codec = _utf16(raw)
  if not codec:
    return raw.decode('utf-8-sig', errors='surrogateescape')
  try:
    return raw.decode(codec).removeprefix('\ufeff')
  except UnicodeDecodeError as error:
    raise ValueError(
      f'{path}: looks like {codec} and is not ({error.reason} at byte '
      f'{error.start}); save the list as UTF-8'
    ) from error


def _comment(line: str) -> bool:
  """Returns whether a line is a comment; file names may also begin with #."""
  if not line.startswith('#'):
    return False
  return line[1:2] in ('', ' ', '\t', '#') or not delimited.HAS_MEDIA.search(
    line
  )


def _array(path: str, text: str) -> list[tuple[int, object]] | None:
  """Returns the numbered entries of a JSON array, or None for other text."""
  if not text.lstrip().startswith('['):
    return None
  try:
    array = json.loads(text)
  except (RecursionError, ValueError) as error:
    if path.lower().endswith('.json') or isinstance(error, RecursionError):
      raise ValueError(f'{path}: wanted a JSON array ({error})') from error
    return None  # a file name that begins with a bracket
  if not array:
    raise ValueError(f'{path}: the manifest is empty')
  return list(enumerate(array, 1))


def _json_lines(
  path: str, lines: delimited.Lines
) -> Iterator[tuple[int, dict]]:
  for number, line in lines:
    try:
      yield number, json_files.parse(line)
    except ValueError as error:
      raise ValueError(
        f'{path}, line {number}: wanted one JSON object per line ({error})'
      ) from error


def _objects(
  path: str, entries: Iterable[tuple[int, object]]
) -> delimited.Table:
  """Builds a table from JSON values: objects, paths or [path, label]."""
  columns, rows = {}, []
  for number, entry in entries:
    row = [entry] if isinstance(entry, str) else entry
    if isinstance(row, list) and len(row) in (1, 2):
      row = dict(zip(('path', 'label'), row, strict=False))
    if not isinstance(row, dict):
      raise ValueError(
        f'{path}, entry {number}: wanted an object, a path or [path, label], '
        f'found {str(entry)[:80]!r}'
      )
    columns.update(dict.fromkeys(row))
    rows.append((number, row))
  return delimited.Table(list(columns), rows)


def _column(
  path: str, columns: list[str], wanted: str, known: Sequence[str]
) -> str | None:
  by_lower = {str(name).lower(): name for name in columns}
  if wanted and wanted.lower() not in by_lower:
    raise ValueError(f'{path}: no column {wanted!r} among {columns}')
  for name in [wanted.lower()] if wanted else known:
    if name in by_lower:
      return by_lower[name]
  return None


def _filter(path: str, table: delimited.Table, where: str) -> delimited.Table:
  if not where:
    return table
  match = re.fullmatch(r'\s*(\w+)\s*(!?=)\s*(.+)', where)
  if not match or match[1] not in table.columns:
    raise ValueError(
      f'data.where is {where!r}; wanted column=a,b or column!=a,b with one of '
      f'the columns {table.columns} of {path}'
    )
  column, sign, values = match[1], match[2], match[3].split(',')
  values = {value.strip() for value in values}
  rows = [
    (number, row)
    for number, row in table.rows
    if (str(row.get(column)).strip() in values) == (sign == '=')
  ]
  if not rows:
    raise ValueError(f'{path}: data.where={where!r} leaves no rows')
  return delimited.Table(table.columns, rows)
