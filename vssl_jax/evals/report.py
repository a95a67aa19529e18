"""Report of a probe, as JSON and as a table that states the protocol."""

import itertools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from vssl_jax.checkpoint import integrity
from vssl_jax.evals import clips, splits
from vssl_jax.utils import statistics

NOTES = {
  'selected': 'head chosen on held-out training clips',
  'max': 'best head on the test clips, as papers report; optimistic',
}
ONLY = 'the only head'
ONE_CLASS = (
  'The training or the test videos are of one class only: the accuracy does '
  'not describe the encoder.'
)
# Keys of a report that identify a measurement.
IDENTITY = (
  *('encoder', 'protocol', 'tap', 'clip', 'timing', 'probe', 'finetune'),
  *('seed', 'lr'),
)


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


def chance(labels: Int[np.ndarray, 'n']) -> dict[str, Any]:
  """Returns the accuracy of guessing among the classes that occur.

  Args:
    labels: of the test videos that were evaluated.
  """
  count = len(np.unique(labels))
  return {'test_classes': count, 'chance': 1 / count}


def place(
  report: Mapping[str, Any], folder: str | pathlib.Path
) -> pathlib.Path:
  """Returns the path of a report: `report.json`, `report-2.json` and so on.

  A report of the same encoder, measured in the same way, is replaced. Other
  reports are kept.

  Args:
    report: its keys `IDENTITY` are compared.
    folder: the run folder.
  """
  folder, identity = pathlib.Path(folder), _identity(report)
  for number in itertools.count(1):
    name = 'report.json' if number == 1 else f'report-{number}.json'
    path = folder / name
    if not path.exists():
      return path
    try:
      if _identity(integrity.load(path)) == identity:
        return path
    except integrity.CorruptError:  # never overwritten
      continue
  raise AssertionError('there is always a next number')


def _identity(report: Mapping[str, Any]) -> Any:
  """Returns the values that identify a measurement, as restored from JSON."""
  identity = {name: report.get(name) for name in IDENTITY}
  for side in ('train', 'test'):
    identity[side] = (report.get(side) or {}).get('source')
  return json.loads(json.dumps(identity))


def write(report: Mapping[str, Any], folder: str | pathlib.Path) -> str:
  """Writes a report to its `place` and returns the path."""
  path = place(report, folder)
  path.parent.mkdir(parents=True, exist_ok=True)
  integrity.write_atomic(path, report, indent=2)
  return str(path)


def text(report: Mapping[str, Any]) -> str:
  """Returns the report as text for a console.

  Args:
    report: from `job.evaluate`.
  """
  test, train = report['test'], report['train']
  facts = {
    'encoder': report['encoder'],
    'protocol': f'{report["protocol"]}, frozen; tapped {report["tap"]}',
    'clips': f'{_votes(report)}; {clips.describe(report)}',
    'train': f'{train["videos"]} videos of {train["source"]}, '
    f'{_trained(report)}',
    'test': f'{test["evaluated"]} videos of {test["source"]}, '
    f'{test["missing"]} missing (unreadable or without a label)',
    'classes': classes(report['classes']),
    'overlap': splits.describe(report['overlap']),
  }
  facts = {name: value for name, value in facts.items() if value}
  width = max(map(len, facts))
  lines = [f'{name.ljust(width)}  {value}' for name, value in facts.items()]
  lines += [
    '',
    f'{"":22}accuracy   95 % interval   (tapped {report["tap"]})',
  ]
  for name, result in report['results'].items():
    low, high = result['interval']
    line = (
      f'{name:22}{100 * result["accuracy"]:7.2f} %   '
      f'{100 * low:.2f} to {100 * high:.2f}'
    )
    if 'lr' in result:
      line += f'   lr {result["lr"]:g}, wd {result["wd"]:g}'
    note = ONLY if len(report.get('heads', ())) == 1 else NOTES.get(name)
    lines.append(line + (f'   ({note})' if note else ''))
  if 'median' in report:
    lines.append(f'{"median of the heads":22}{100 * report["median"]:7.2f} %')
  if report.get('left_out'):
    lines.append(
      f'left out: {", ".join(report["left_out"])}, more neighbours than there '
      'are training videos'
    )
  lines.append(
    f'{"chance":22}{100 * report["chance"]:7.2f} %   (one of the '
    f'{report["test_classes"]} classes that occur in the test videos)'
  )
  if len(report['classes']) == 1 or report['test_classes'] == 1:
    lines.append(ONE_CLASS)
  lines.append(
    'The interval is that of the sample of test videos; training seeds add '
    'to it.'
  )
  return '\n'.join(lines)


def _trained(report: Mapping[str, Any]) -> str:
  """Returns the share of training videos that heads are trained on, as text."""
  train, held_out = report['train'], report['held_out']
  if report['protocol'] == 'knn':
    return f'{train["trained_on"]} of them with a label, all of them neighbours'
  trained = (
    f'heads are trained on {train["trained_on"]} of them '
    f'({100 * train["trained_on"] / train["videos"]:.0f} %)'
  )
  if train.get('unlabelled'):
    trained += f', {train["unlabelled"]} have no label'
  if held_out:
    return f'{trained}, {held_out} are held out to choose a head'
  if len(report['heads']) == 1:
    return f'{trained}: one head leaves nothing to choose'
  return f'{trained}; none is chosen without the test videos'


def _votes(report: Mapping[str, Any]) -> str:
  """Returns the clips and crops of a test video, as text."""
  num_clips = report['clips']
  clips_text = f'{report["segments"]} segments' + (
    f' x {num_clips} clips' if num_clips > 1 else ''
  )
  return f'{clips_text} x {report["views"]} views'


def classes(names: list[str], shown: int = 8) -> str:
  """Returns the number of classes and the first of them in label order."""
  first = ', '.join(f'{i} {name}' for i, name in enumerate(names[:shown]))
  more = ', ...' if len(names) > shown else ''
  return f'{len(names)}: {first}{more}'
