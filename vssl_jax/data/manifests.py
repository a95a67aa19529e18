"""Manifests: text files that list videos, one per line, perhaps with labels.

Understood are commas (csv), tabs (tsv), spaces and JSON lines; with or without
a first line of column names; quoted or unquoted paths, with spaces in them;
relative to the manifest's folder or absolute.
"""

import csv
import dataclasses
import json
import os
import re
from collections.abc import Sequence

from vssl_jax.data import decode

PATH_COLUMNS = (
  'path', 'video', 'file', 'filename', 'video_path', 'filepath', 'file_path',
  'clip', 'image', 'uri', 'src',
)  # fmt: skip
LABEL_COLUMNS = (
  'label', 'class', 'label_id', 'class_id', 'label_name', 'class_name',
  'category', 'action', 'target',
)  # fmt: skip
ENDINGS = ('.csv', '.tsv', '.txt', '.list', '.lst', '.jsonl', '.ndjson')
_media = '|'.join(e[1:] for e in decode.VIDEOS + decode.IMAGES)
_UNQUOTED = re.compile(rf'^(.*\.(?:{_media}))(?:\s+(.*))?$', re.IGNORECASE)
_QUOTED = re.compile(r'^(["\'])(.*?)\1(?:\s+(.*))?$')


@dataclasses.dataclass(frozen=True)
class Row:
  """A line: path as written, label as text ('' for none)."""

  path: str
  label: str


def read(
  path: str,
  *,
  where: str = '',
  path_column: str = '',
  label_column: str = '',
) -> list[Row]:
  """Reads a manifest.

  Args:
    path: the manifest.
    where: 'column=a,b' keeps the rows with one of these values,
      'column!=a,b' the others; needs column names.
    path_column: column of paths; '' takes the first known name.
    label_column: column of labels; '' takes the first known name.

  Raises:
    ValueError: naming the file, the line and what was expected there.
  """
  with open(path, encoding='utf-8-sig', newline='') as file:
    lines = [
      (number, line.strip('\r\n'))
      for number, line in enumerate(file, 1)
      if line.strip() and not line.startswith('#')
    ]
  if not lines:
    raise ValueError(f'{path}: the manifest is empty')
  if lines[0][1].lstrip().startswith('{'):
    table = [_json(path, *line) for line in lines]
  else:
    table = _table(path, lines, path_column)
  if not table:
    raise ValueError(f'{path}: column names, but no rows below them')
  table = _filter(path, table, where)
  paths = _column(path, table[0], path_column, PATH_COLUMNS)
  labels = _column(path, table[0], label_column, LABEL_COLUMNS)
  if paths is None:
    raise ValueError(
      f'{path}: none of the columns {list(table[0])} is one of '
      f'{list(PATH_COLUMNS)}; set data.path_column'
    )
  rows = []
  for number, row in enumerate(table, 1):
    name = str(row.get(paths) or '').strip()
    if not name:
      raise ValueError(f'{path}: row {number} has no {paths!r}')
    label = row.get(labels)
    rows.append(
      Row(os.path.expanduser(name), '' if label is None else str(label).strip())
    )
  return rows


def _json(path: str, number: int, line: str) -> dict:
  try:
    row = json.loads(line)
  except json.JSONDecodeError as error:
    raise ValueError(
      f'{path}, line {number}: wanted one JSON object per line ({error})'
    ) from error
  if not isinstance(row, dict):
    raise ValueError(f'{path}, line {number}: wanted an object, found {row!r}')
  return row


def _table(
  path: str, lines: Sequence[tuple[int, str]], path_column: str
) -> list[dict]:
  """Rows as dicts, of text separated by commas, tabs or spaces."""
  text = [line for _, line in lines]
  comma = _separator(path, text[0])
  if comma == ' ':
    cells = [_spaced(line) for line in text]
    split = text[0].split()
  else:
    cells = list(csv.reader(text, delimiter=comma, skipinitialspace=True))
    split = [cell.strip() for cell in cells[0]]
  known = {path_column.lower()} if path_column else set(PATH_COLUMNS)
  if known & {cell.lower() for cell in split}:
    return [dict(zip(split, row, strict=False)) for row in cells[1:]]
  widest = max(len(row) for row in cells)
  if widest > 2:
    raise ValueError(
      f'{path}, line {lines[0][0]}: {widest} columns and no line of column '
      f'names; wanted path and label, or a first line with one of '
      f'{list(PATH_COLUMNS)} (or data.path_column) in it'
    )
  return [dict(zip(('path', 'label'), row, strict=False)) for row in cells]


def _separator(path: str, line: str) -> str:
  """What splits the first line; the ending only settles ties."""
  bare = re.sub(r'"[^"]*"', '', line)
  if '\t' in bare:
    return '\t'
  if ',' in bare and not _is_path(line):
    return ','
  endings = {'.csv': ',', '.tsv': '\t'}
  ending = os.path.splitext(path)[1].lower()
  return endings.get(ending, ' ') if _is_path(line) else ' '


def _is_path(line: str) -> bool:
  """Whether a whole line is one unquoted path to a video or an image."""
  match = _UNQUOTED.match(line.strip())
  return bool(match and not match[2] and not re.search(
    rf'\.(?:{_media})\s*,', line, re.IGNORECASE
  ))  # fmt: skip


def _spaced(line: str) -> list[str]:
  """Path and label of a line with spaces, which paths may have too."""
  line = line.strip()
  match = _QUOTED.match(line)
  if match:
    return [match[2], *(match[3] or '').split()]
  match = _UNQUOTED.match(line)
  if match:
    return [match[1], *(match[2] or '').split()]
  return line.rsplit(None, 1)


def _column(
  path: str, row: dict, wanted: str, known: Sequence[str]
) -> str | None:
  names = {str(name).lower(): name for name in row}
  if wanted and wanted.lower() not in names:
    raise ValueError(f'{path}: no column {wanted!r} among {list(row)}')
  for name in [wanted.lower()] if wanted else known:
    if name in names:
      return names[name]
  return None


def _filter(path: str, table: list[dict], where: str) -> list[dict]:
  if not where:
    return table
  match = re.fullmatch(r'\s*(\w+)\s*(!?=)\s*(.+)', where)
  if not match or match[1] not in table[0]:
    raise ValueError(
      f'data.where is {where!r}; wanted column=a,b or column!=a,b with one of '
      f'the columns {list(table[0])} of {path}'
    )
  column, sign, values = match[1], match[2], match[3].split(',')
  values = {value.strip() for value in values}
  kept = [
    row
    for row in table
    if (str(row.get(column)).strip() in values) == (sign == '=')
  ]
  if not kept:
    raise ValueError(f'{path}: data.where={where!r} leaves no rows')
  return kept
