"""Reads text tables with commas, tabs, spaces or other separators."""

import csv
import dataclasses
import os
import re
from collections.abc import Iterator, Sequence

from vssl_jax.data.sources import folders

_SEPARATORS = ('\t', ',', ';', '|', ' ')
_SAMPLE = 200  # number of lines from which the separator is detected
_media = '|'.join(re.escape(e[1:]) for e in folders.MEDIA)
_UNQUOTED = re.compile(rf'^(.*\.(?:{_media}))(?:\s+(.*))?$', re.IGNORECASE)
_QUOTED = re.compile(r'^(["\'])(.*?)\1(?:\s+(.*))?$')
HAS_MEDIA = re.compile(rf'\.(?:{_media})(?:[\s,;|"\']|$)', re.IGNORECASE)

Lines = Sequence[tuple[int, str]]
Cells = tuple[int, list[str]]  # line number, cells of the row


@dataclasses.dataclass(frozen=True)
class Table:
  """Column names, and rows of a line number and cells by column."""

  columns: list[str]
  rows: list[tuple[int, dict]]


def table(path: str, lines: Lines, known: Sequence[str]) -> Table:
  """Parses a text table.

  Args:
    path: path of the file, for messages and for its extension.
    lines: (line number, text) of the lines that are not empty.
    known: usual names of the column of paths, in lower case. If the first line
      contains one of them, it has the column names. Otherwise the columns are
      path and label.

  Raises:
    ValueError: the first line has unknown names, a row has more cells than
      there are columns, or a quote is not closed; with file and line.
  """
  separator = _separator(path, lines, known)
  head = _names(lines[0][1], separator)
  cells = list(_cells(path, lines, separator))
  if any(name.lower() in known for name in head):
    repeated = sorted({name for name in head if name and head.count(name) > 1})
    if repeated:
      raise ValueError(f'{path}: two columns have the name {repeated[0]!r}')
    for number, row in cells[1:]:
      if any(cell.strip() for cell in row[len(head) :]):
        raise ValueError(
          f'{path}, line {number}: {len(row)} cells under {len(head)} column '
          f'names {head}; quote a cell that holds the separator {separator!r}'
        )
    return _named(head, cells[1:])
  _check_no_names(path, head, cells, known)
  if all(row[1:] == ['0', '-1'] for _, row in cells):
    cells = [(n, row[:1]) for n, row in cells]  # as in lists of VideoMAE
  for number, row in cells:
    if len(row) > 2:
      raise ValueError(
        f'{path}, line {number}: {len(row)} columns and no line of column '
        f'names; wanted path and label, or a first line with one of '
        f'{list(known)} (or data.path_column) in it'
      )
  width = max(len(row) for _, row in cells)
  return _named(['path', 'label'][:width], cells)


def _named(columns: list[str], cells: Sequence[Cells]) -> Table:
  rows = [(n, dict(zip(columns, row, strict=False))) for n, row in cells]
  return Table(columns, rows)


def _check_no_names(
  path: str, head: list[str], cells: list[Cells], known: Sequence[str]
) -> None:
  """Raises ValueError if the first line has names of unknown columns."""
  with_media = sum(any(map(is_media, row)) for _, row in cells[1:])
  ending = re.compile(r'\.\w{2,5}$')
  looks_like_names = not any(ending.search(cell) for cell in cells[0][1])
  if looks_like_names and 2 * with_media >= len(cells) > 1:
    raise ValueError(
      f'{path}: the first line {head} holds none of the column names '
      f'{list(known)}; wanted data.path_column, the name of the column of '
      'paths (and data.label_column, that of labels)'
    )


def _separator(path: str, lines: Lines, known: Sequence[str]) -> str:
  """Detects the separator for which most lines contain a path to a video."""
  ending = os.path.splitext(path)[1].lower()
  usual = {'.csv': ',', '.tsv': '\t'}.get(ending, ' ')
  sample = [line for _, line in lines[:_SAMPLE]]

  def score(separator: str) -> tuple[int, bool]:
    names = [name.lower() for name in _names(sample[0], separator)]
    columns = [i for i, name in enumerate(names) if name in known]
    column = columns[0] if columns else 0
    rows = [_split(line, separator) for line in sample]
    hits = sum(len(r) > column and is_media(r[column]) for r in rows)
    # A single path is one cell with any separator.
    return hits + len(columns), separator == usual

  best = max(_SEPARATORS, key=score)
  if score(best)[0]:
    return best
  unquoted = re.sub(r'"[^"]*"', '', sample[0])  # paths without a known ending
  return next((s for s in _SEPARATORS if s in unquoted), usual)


def is_media(cell: str) -> bool:
  """Returns whether a cell is a path to a video or an image."""
  return cell.strip().lower().endswith(folders.MEDIA)


def _names(line: str, separator: str) -> list[str]:
  """Splits the first line into column names."""
  cells = line.split() if separator == ' ' else _split(line, separator)
  return [cell.strip() for cell in cells]


def _split(line: str, separator: str) -> list[str]:
  if separator == ' ':
    return _spaced(line)
  try:
    return next(csv.reader([line], delimiter=separator, skipinitialspace=True))
  except csv.Error:  # raised later, with its line, if this separator is chosen
    return [line]


def _cells(path: str, lines: Lines, separator: str) -> Iterator[Cells]:
  """Yields the first line number and the cells of each row."""
  if separator == ' ':
    yield from ((number, _spaced(line)) for number, line in lines)
    return
  limit = csv.field_size_limit(2**31 - 1)
  reader = csv.reader(
    [line + '\n' for _, line in lines],
    delimiter=separator,
    skipinitialspace=True,
    strict=True,
  )
  start = 0
  try:
    for row in reader:
      number, start = lines[start][0], reader.line_num
      _check_cells(path, number, row)
      yield number, row
  except csv.Error as error:
    raise ValueError(
      f'{path}, line {lines[min(start, len(lines) - 1)][0]}: {error}; wanted '
      'quotes in pairs around a cell, and "" for a quote inside'
    ) from error
  finally:
    csv.field_size_limit(limit)


def _check_cells(path: str, number: int, row: list[str]) -> None:
  """Raises ValueError for cells that contain rows, from an unclosed quote."""
  for cell in row:
    newlines = cell.count('\n')
    if newlines and HAS_MEDIA.search(cell):
      raise ValueError(
        f'{path}, line {number}: a quote opens here and closes {newlines} '
        'lines below, around other rows; wanted quotes in pairs around a cell'
      )


def _spaced(line: str) -> list[str]:
  """Splits a line at spaces into path and label; paths may contain spaces."""
  line = line.strip()
  match = _QUOTED.match(line)
  if match:
    return [match[2], *(match[3] or '').split()]
  match = _UNQUOTED.match(line)
  if match:
    return [match[1], *(match[2] or '').split()]
  return line.rsplit(None, 1)
