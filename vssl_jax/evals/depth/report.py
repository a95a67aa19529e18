"""Report of a depth readout, as a table that states the protocol."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vssl_jax.evals import clips, splits

KEYS = ('abs_rel', 'delta_1', 'rmse')
NOTES = {
  'selected': 'head chosen on held-out training examples, or the only one',
  'best': 'head with the smallest AbsRel on the test clips; optimistic',
  'mean': 'mean of the training clips at each pixel: no input is used',
}


def results(
  figures: Mapping[str, Mapping[str, np.ndarray]],
  pairs: Sequence[tuple[float, float]],
  selected: int | None,
) -> dict[str, Any]:
  """Returns the report entries on heads and baseline.

  Args:
    figures: figures of `heads`, `aligned` heads, `mean` and `aligned mean`.
    pairs: (learning rate, weight decay) of each head.
    selected: the selected head, or None.
  """
  error = figures['heads']['abs_rel']
  best = int(np.where(np.isnan(error), np.inf, error).argmin())
  rows = {'best': best} | ({} if selected is None else {'selected': selected})

  def row(name: str, aligned: str, number: int) -> dict[str, Any]:
    raw = {k: float(figures[name][k][number]) for k in KEYS}
    aligned_median = {k: float(figures[aligned][k][number]) for k in KEYS}
    return {**raw, 'align_median': aligned_median}

  out = {}
  for name, number in sorted(rows.items(), reverse=True):
    lr, wd = pairs[number]
    out[name] = row('heads', 'aligned', number) | {'lr': lr, 'wd': wd}
  out['mean'] = row('mean', 'aligned mean', 0)
  out['pixels'] = int(figures['heads']['pixels'][0])
  return out


def text(report: Mapping[str, Any]) -> str:
  """Returns the report as text for a console.

  Args:
    report: from `job.evaluate`.
  """
  test, train, entries = report['test'], report['train'], report['results']
  facts = {
    'encoder': report['encoder'],
    'protocol': f'{report["protocol"]}, frozen; tapped {report["tap"]}',
    'clips': f'{report["clips"]} clips x {report["views"]} views of an '
    f'example; {clips.describe(report)}',
    'train': f'{train["examples"]} examples of {train["source"]}, heads are '
    f'trained on {train["trained_on"]} of them',
    'test': f'{test["examples"]} examples of {test["source"]}, '
    f'{test["unreadable"]} unreadable; {entries["pixels"]} pixels with a depth',
  }
  overlap = splits.describe(report['overlap'])
  facts |= {'overlap': overlap + ' (pictures)'} if overlap else {}
  width = max(map(len, facts))
  lines = [f'{name.ljust(width)}  {value}' for name, value in facts.items()]
  lines += ['', f'{"":12}AbsRel  delta_1   RMSE   (tapped {report["tap"]})']
  for name, row in entries.items():
    if name != 'pixels':
      lines += _lines(name, row)
  lines.append(
    'Pixels of one scene depend on each other: no interval is given. Results '
    'on rooms that were trained on do not hold for other rooms.'
  )
  return '\n'.join(lines)


def _lines(name: str, row: Mapping[str, Any]) -> list[str]:
  grid = f'lr {row["lr"]:g}, wd {row["wd"]:g}; ' if 'lr' in row else ''
  return [
    f'{name:12}{_figures(row)}   {grid}{NOTES[name]}',
    f'{"":12}{_figures(row["align_median"])}   its median aligned to the '
    "truth's, clip by clip",
  ]


def _figures(row: Mapping[str, float]) -> str:
  return f'{row["abs_rel"]:6.4f}   {row["delta_1"]:6.4f}  {row["rmse"]:5.3f} m'
