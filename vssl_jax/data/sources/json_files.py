"""Reads untrusted JSON files, with limits; errors name the file."""

import json
import os
from typing import Any

MAX_BYTES = 2**26


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Loads a JSON file that holds one object.

  Args:
    path: path of the file.

  Raises:
    OSError: the file cannot be read.
    ValueError: the file is not a JSON object, is nested too deeply or is larger
      than `MAX_BYTES`; the message names the file.
  """
  with open(path, 'rb') as file:
    content = file.read(MAX_BYTES + 1)
  if len(content) > MAX_BYTES:
    raise ValueError(f'{path}: wanted at most {MAX_BYTES} bytes of JSON')
  try:
    return parse(content)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error


def parse(text: str | bytes) -> dict[str, Any]:
  """Parses text that holds one JSON object.

  Raises:
    ValueError: the text is not a JSON object, or is nested too deeply.
  """
  try:
    value = json.loads(text)
  except RecursionError as error:
    raise ValueError('JSON that is nested too deeply') from error
  except ValueError as error:  # including errors of the encoding
    raise ValueError(f'wanted a JSON object ({error})') from error
  if not isinstance(value, dict):
    raise ValueError(f'wanted a JSON object, found {str(value)[:80]!r}')
  return value
