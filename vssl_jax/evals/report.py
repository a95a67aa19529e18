"""What a probe found, as JSON and as a table that says how it was found."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from vssl_jax.evals import lists, statistics

NOTES = {
  'selected': 'head chosen on held-out training clips',
  'max': 'best head on the test clips, as papers report; flatters',
}
ONLY = 'the only head'


def knn_results(
  correct: Mapping[int, int], total: int
) -> dict[str, dict[str, Any]]:
  """Returns accuracy and interval per number of neighbours."""
  return {
    f'k={k}': {
      'accuracy': count / total,
      'interval': list(statistics.interval(count, total)),
    }
    for k, count in correct.items()
  }


def write(report: Mapping[str, Any], folder: str | pathlib.Path) -> str:
  """Writes `report.json` and returns its path."""
  path = pathlib.Path(folder) / 'report.json'
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(report, indent=2) + '\n')
  return str(path)


def text(report: Mapping[str, Any]) -> str:
  """Returns the report for a console.

  Args:
    report: as `run.evaluate` makes it.
  """
  test, train = report['test'], report['train']
  facts = {
    'encoder': report['encoder'],
    'protocol': f'{report["protocol"]}, frozen; tapped {report["tap"]}',
    'clips': f'{shape(report["clip"])}, {report["timing"]}, {_votes(report)}',
    'train': f'{train["videos"]} videos of {train["source"]}, '
    f'{_trained(report)}',
    'test': f'{test["evaluated"]} videos of {test["source"]}, '
    f'{test["missing"]} missing (unreadable or without a label)',
    'classes': classes(report['classes']),
    'overlap': lists.describe(report['overlap']),
  }
  facts = {name: value for name, value in facts.items() if value}
  width = max(map(len, facts))
  lines = [f'{name.ljust(width)}  {value}' for name, value in facts.items()]
  lines += [
    '',
    f'{"":22}accuracy   95 % interval   (tapped {report["tap"]})',
  ]
  for name, found in report['results'].items():
    low, high = found['interval']
    line = (
      f'{name:22}{100 * found["accuracy"]:7.2f} %   '
      f'{100 * low:.2f} to {100 * high:.2f}'
    )
    if 'lr' in found:
      line += f'   lr {found["lr"]:g}, wd {found["wd"]:g}'
    note = ONLY if len(report.get('heads', ())) == 1 else NOTES.get(name)
    lines.append(line + (f'   ({note})' if note else ''))
  if 'median' in report:
    lines.append(f'{"median of the heads":22}{100 * report["median"]:7.2f} %')
  lines.append(f'{"chance":22}{100 * report["chance"]:7.2f} %')
  lines.append(
    'The interval is that of the sample of test videos; training seeds add '
    'to it.'
  )
  return '\n'.join(lines)


def _trained(report: Mapping[str, Any]) -> str:
  """Returns which share of the training videos heads are trained on."""
  train, held = report['train'], report['held_out']
  if report['protocol'] == 'knn':
    return f'{train["trained_on"]} of them with a label, all of them neighbours'
  text = (
    f'heads are trained on {train["trained_on"]} of them '
    f'({100 * train["trained_on"] / train["videos"]:.0f} %)'
  )
  if held:
    return f'{text}, {held} are held out to choose a head'
  if len(report['heads']) == 1:
    return f'{text}: one head leaves nothing to choose'
  return f'{text}; none is chosen without the test videos'


def _votes(report: Mapping[str, Any]) -> str:
  """Returns how a test video is seen."""
  clips = report['clips']
  along = f'{report["segments"]} segments' + (
    f' x {clips} clips' if clips > 1 else ''
  )
  return f'{along} x {report["views"]} views'


def shape(clip: list[int]) -> str:
  """Returns frames, height and width as text."""
  return 'x'.join(map(str, clip[:3]))


def classes(names: list[str], shown: int = 8) -> str:
  """Returns the number of classes and the first of them in label order."""
  first = ', '.join(f'{i} {name}' for i, name in enumerate(names[:shown]))
  more = ', ...' if len(names) > shown else ''
  return f'{len(names)}: {first}{more}'
