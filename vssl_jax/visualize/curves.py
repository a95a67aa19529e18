"""Plots the metrics in `metrics.jsonl` of several runs as curves."""

import math
import pathlib
from collections.abc import Mapping

import numpy as np
from matplotlib import figure
from matplotlib.backends import backend_agg

from vssl_jax.utils import metrics

Series = Mapping[str, tuple[np.ndarray, np.ndarray]]

COLUMNS = 3
# Not plotted as curves: time shares, data loading figures, and the blocks,
# which have a picture of their own, `weight_drift.py`.
LEFT_OUT = ('time/', 'data/', 'lost_steps', 'streak', 'drift/', 'norm/')
FIRST = ('loss', 'lr', 'grad_norm', 'clips_per_s')


def series(lines: list[dict]) -> Series:
  """Returns metric -> (steps, values), sorted by name.

  If a step was logged twice, before and after a resume, the later line counts.
  Values that are not finite are NaN.
  """
  values_by_step: dict[str, dict[int, float]] = {}
  for line in lines:
    for name, value in line.items():
      is_number = isinstance(value, (int, float)) or value is None
      if name == 'step' or not is_number or isinstance(value, bool):
        continue
      number = math.nan if value is None else float(value)
      values_by_step.setdefault(name, {})[line['step']] = number
  return {
    name: (
      np.array(sorted(by_step)),
      np.array([by_step[s] for s in sorted(by_step)]),
    )
    for name, by_step in sorted(values_by_step.items())
  }


def boundaries(lines: list[dict]) -> dict[str, int]:
  """Returns phase -> first step that was logged in it."""
  out: dict[str, int] = {}
  for line in lines:
    if 'phase' in line:
      out.setdefault(line['phase'], line['step'])
  return out


def names(runs: Mapping[str, Series]) -> list[str]:
  """Returns the names of the metrics to plot, the common ones first.

  Metrics with one constant value in all runs are left out.
  """
  values: dict[str, set[float]] = {}
  for run in runs.values():
    for name, (_, y) in run.items():
      values.setdefault(name, set()).update(y[np.isfinite(y)].tolist())
  varying = [
    name
    for name in sorted(values)
    if not name.startswith(LEFT_OUT) and len(values[name]) > 1
  ]
  return sorted(varying, key=lambda n: FIRST.index(n) if n in FIRST else 99)


def save(path: pathlib.Path, runs: Mapping[str, pathlib.Path]) -> list[str]:
  """Plots metrics of several runs and returns the names of those plotted.

  Args:
    path: the PNG to write.
    runs: label -> metrics file.
  """
  lines = {label: metrics.read(file) for label, file in runs.items()}
  data = {label: series(run) for label, run in lines.items()}
  drawn = names(data)
  count = max(1, -(-len(drawn) // COLUMNS))
  sheet = figure.Figure(figsize=(5 * COLUMNS, 3 * count), layout='constrained')
  backend_agg.FigureCanvasAgg(sheet)
  axes = sheet.subplots(count, COLUMNS, squeeze=False).ravel()
  for axis, name in zip(axes, drawn, strict=False):
    for number, (label, run) in enumerate(data.items()):
      if name in run:
        marker = '.' if len(run[name][0]) < 20 else ''
        axis.plot(*run[name], label=label, color=f'C{number}', marker=marker)
      for step in list(boundaries(lines[label]).values())[1:]:
        axis.axvline(step, color=f'C{number}', lw=0.6, ls=':')
    axis.set_title(name, fontsize=10)
    axis.set_xlabel('step', fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
  for axis in axes[len(drawn) :]:
    axis.set_axis_off()
  if drawn and len(data) > 1:
    axes[0].legend(fontsize=8)
  sheet.savefig(path, dpi=90)
  return drawn
