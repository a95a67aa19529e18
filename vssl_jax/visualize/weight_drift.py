"""Plots the weight drift of the encoder's blocks, and where it stops.

Source: the measurements of the health panel. `drift/block_i` is the relative
change of a block's weights since the previous measurement.
"""

import dataclasses
import pathlib
import sys

import jax
import numpy as np
from jaxtyping import Float, Int
from matplotlib import axes, colormaps, colors, figure, ticker
from matplotlib.backends import backend_agg

from vssl_jax.utils import metrics as metrics_lib
from vssl_jax.visualize import curves

PER = 100  # steps; the unit of a rate is change per PER steps
LOCKED = '0.75'  # grey
# With more phases than this, boundaries are marked without names.
NAMED = 12
CAPTION = (
  f'Above: relative change of the weights of each block in {PER} steps, a mean '
  'over the interval between two measurements; grey where a block did not '
  'change at all, white where nothing is known, as from one encoder to '
  'another. Middle: the same, divided by the geometric mean over the blocks '
  'that changed, which removes the effect of the learning rate: red changes '
  'more than the others, blue less, also where it was locked within an '
  'interval. Below: root mean square of the weights, by block. Dotted lines '
  'are where a phase begins.'
)


@dataclasses.dataclass(frozen=True)
class Looks:
  """Drift rates of all blocks between measurements of the health panel.

  Attributes:
    edges: steps of the measurements.
    norms: root mean square of the weights; NaN where a phase has no such
      block.
    rates: change per `PER` steps between neighbouring measurements; NaN where
      none was measured, as right after a resume or a change of encoder.
    phases: phase -> step at which it begins.
  """

  edges: Int[np.ndarray, ' E']
  norms: Float[np.ndarray, 'L E']
  rates: Float[np.ndarray, 'L E-1']
  phases: dict[str, int]


def read(path: pathlib.Path) -> Looks | None:
  """Reads norms and drift rates from a metrics file; None if it has none."""
  lines = metrics_lib.read(path)
  data = curves.series(lines)
  blocks = sorted(n for n in data if n.startswith('drift/block_'))
  if not blocks:
    return None
  sizes = [data[name.replace('drift/', 'norm/')] for name in blocks]
  # Phases may differ in depth: a measurement may lack some blocks.
  edges = np.unique(np.concatenate([steps for steps, _ in sizes]))
  norms = np.full((len(blocks), len(edges)), np.nan)
  for row, (steps, values) in zip(norms, sizes, strict=True):
    row[np.searchsorted(edges, steps)] = values
  rates = np.full((len(blocks), len(edges) - 1), np.nan)
  for row, name in zip(rates, blocks, strict=True):
    steps, moved = data[name]
    column = np.searchsorted(edges, steps) - 1
    row[column] = PER * moved / np.diff(edges)[column]
  return Looks(edges, norms, rates, _starts(lines))


def _starts(lines: list[dict]) -> dict[str, int]:
  """Returns phase -> last step that was logged before it."""
  last, out = 0, {}
  for line in lines:
    if 'phase' in line:
      out.setdefault(line['phase'], last)
      last = line['step']
  return out


def relative(
  rates: Float[np.ndarray, 'L C'],
) -> Float[np.ndarray, 'L C']:
  """Returns rates over the geometric mean of the blocks that moved.

  Args:
    rates: rates of blocks and intervals; 0 where locked, NaN where unknown.

  Returns:
    The ratios; NaN where a block did not move.
  """
  logs = np.log(np.where(rates > 0, rates, np.nan))
  count = np.isfinite(logs).sum(axis=0)
  mean = np.nansum(logs, axis=0) / np.maximum(count, 1)
  return np.exp(logs - mean)


def save(path: pathlib.Path, metrics: pathlib.Path) -> bool:
  """Draws the picture; returns whether there was anything to draw.

  Args:
    path: the PNG to write.
    metrics: `metrics.jsonl` of a run.
  """
  looks = read(metrics) if metrics.exists() else None
  if looks is None or not (looks.rates > 0).any():
    return False
  height = 2 * (2 + 0.12 * len(looks.rates)) + 2.5
  sheet = figure.Figure(figsize=(11, height), layout='constrained')
  backend_agg.FigureCanvasAgg(sheet)
  moving = looks.rates[looks.rates > 0]
  norm = colors.LogNorm(moving.min(), moving.max())
  rows = 2 + 0.12 * len(looks.rates)
  parts = sheet.subplots(3, 1, sharex=True, height_ratios=(rows, rows, 2.5))
  _rows(parts[0], looks, looks.rates, norm, 'viridis', f'in {PER} steps')
  ratios = relative(looks.rates)
  _rows(parts[1], looks, ratios, colors.LogNorm(0.5, 2), 'RdBu_r', 'over mean')
  _lines(parts[2], looks)
  for axis in parts:
    _mark(axis, looks.phases)
  sheet.savefig(path, dpi=90)
  return True


def save_in(workdir: str) -> None:
  """Saves the picture in the run folder, on process 0 only.

  A failure is printed and not raised: a scheduler that restarts failed runs
  would restart a finished run for ever.
  """
  path = pathlib.Path(workdir) / 'drift.png'
  if jax.process_index() == 0:
    try:
      save(path, path.with_name('metrics.jsonl'))
    except Exception as error:  # of any kind: the run is already finished
      print(
        f'{path} could not be drawn ({error!r}); the run itself is complete',
        file=sys.stderr,
      )


def _rows(
  axis: axes.Axes,
  looks: Looks,
  values: Float[np.ndarray, 'L C'],
  norm: colors.LogNorm,
  palette: str,
  title: str,
) -> None:
  """Draws blocks as rows, the first at the bottom, and intervals as columns."""
  rows = np.arange(len(values) + 1) - 0.5
  locked = np.where(looks.rates == 0, 1.0, np.nan)
  axis.pcolormesh(
    looks.edges, rows, locked, cmap=colors.ListedColormap([LOCKED])
  )
  shown = np.where(values > 0, values, np.nan)
  mesh = axis.pcolormesh(looks.edges, rows, shown, norm=norm, cmap=palette)
  formatter = ticker.FuncFormatter(lambda x, _: f'{x:g}')
  axis.figure.colorbar(
    mesh,
    ax=axis,
    label=title,
    format=formatter,
    ticks=ticker.LogLocator(subs=(1, 2, 5)),
  ).ax.minorticks_off()
  axis.set_ylabel('block')
  axis.set_yticks(range(0, len(values), -(-len(values) // 16)))


def _lines(axis: axes.Axes, looks: Looks) -> None:
  """Plots the weight norm of each block, deep blocks in yellow."""
  palette = colormaps['viridis'](np.linspace(0, 1, len(looks.norms)))
  for block, (values, colour) in enumerate(
    zip(looks.norms, palette, strict=True)
  ):
    axis.plot(looks.edges, values, color=colour, lw=1.2, label=f'{block}')
  axis.set_ylabel('norm')
  axis.set_xlabel('step')
  if len(looks.norms) <= NAMED:
    axis.legend(
      title='block',
      fontsize=7,
      title_fontsize=7,
      loc='upper left',
      bbox_to_anchor=(1, 1),
    )


def _mark(axis: axes.Axes, phases: dict[str, int]) -> None:
  """Marks the steps at which phases begin."""
  for name, step in list(phases.items())[1:]:
    axis.axvline(step, color='black', lw=0.8, ls=':')
    if len(phases) <= NAMED:
      place = axis.get_xaxis_transform()
      axis.text(step, 1.02, name, fontsize=7, transform=place)
