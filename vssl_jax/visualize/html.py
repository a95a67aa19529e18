"""Renders the report as HTML without scripts or external files."""

import dataclasses
import html
from collections.abc import Mapping, Sequence
from typing import Any

STYLE = """
body { font: 15px sans-serif; max-width: 1200px; margin: 2em auto; }
img { max-width: 100%; border: 1px solid #ccc; }
th { text-align: left; vertical-align: top; padding-right: 2em; }
td { white-space: pre-wrap; }
"""


@dataclasses.dataclass(frozen=True)
class Picture:
  """A picture file in the folder of the page, and its caption."""

  file: str
  caption: str


@dataclasses.dataclass(frozen=True)
class Section:
  """A heading with pictures and an optional note."""

  title: str
  pictures: Sequence[Picture]
  note: str = ''


def render(
  title: str, facts: Mapping[str, Any], sections: Sequence[Section]
) -> str:
  """Returns the page as HTML.

  Args:
    title: title of the page.
    facts: table at the top of the page.
    sections: sections in page order.
  """
  rows = ''.join(
    f'<tr><th>{_safe(k)}</th><td>{_safe(v)}</td></tr>\n'
    for k, v in facts.items()
  )
  return (
    '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
    f'<title>{_safe(title)}</title>\n<style>{STYLE}</style>\n'
    f'<h1>{_safe(title)}</h1>\n<table>\n{rows}</table>\n'
    + ''.join(_section(s) for s in sections)
    + '</html>\n'
  )


def _section(section: Section) -> str:
  out = f'<h2>{_safe(section.title)}</h2>\n'
  if section.note:
    out += f'<p>{_safe(section.note)}</p>\n'
  for picture in section.pictures:
    out += (
      f'<figure><img src="{_safe(picture.file)}" '
      f'alt="{_safe(picture.caption)}">\n'
      f'<figcaption>{_safe(picture.caption)}</figcaption></figure>\n'
    )
  return out


def _safe(text: Any) -> str:
  return html.escape(str(text))
