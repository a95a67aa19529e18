"""Reads JSON Lines files and opens them for appending.

A killed process can leave an incomplete line, and a power failure zeros. Lines
that are not JSON objects are skipped, and appending starts on a new line.
"""

import json
import os
import pathlib
from typing import Any, TextIO

from absl import logging


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Reads the objects of a file in order; [] if there is no file."""
  path = pathlib.Path(path)
  try:
    lines = path.read_text(errors='replace').split('\n')
  except FileNotFoundError:
    return []
  objects, skipped = [], []
  for number, line in enumerate(lines, 1):
    try:
      value = json.loads(line)
    except (ValueError, RecursionError):
      value = None
    if isinstance(value, dict):
      objects.append(value)
    elif line and number < len(lines):  # the last one may be incomplete
      skipped.append(number)
  if skipped:
    logging.warning(
      '%s: skipping %d of %d lines that are not JSON objects, the first '
      'of them line %d',
      path,
      len(skipped),
      len(lines) - 1,
      skipped[0],
    )
  return objects


def append_to(path: str | os.PathLike[str]) -> TextIO:
  """Opens a file to append lines; terminates an incomplete last line."""
  file = open(path, 'a', encoding='utf-8')  # noqa: SIM115 # the caller closes
  if file.tell():
    with open(path, 'rb') as end:
      end.seek(-1, os.SEEK_END)
      if end.read() != b'\n':
        file.write('\n')
  return file
