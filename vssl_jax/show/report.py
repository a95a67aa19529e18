"""One page per run: its curves, and what each phase sees, predicts and learns.

A phase is drawn by what its method offers: `masks` of the phase,
`Method.reconstruct`, and `Method.encode`.
"""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from vssl_jax import config as config_lib
from vssl_jax import encoders, rngs
from vssl_jax.methods import base
from vssl_jax.models import layers
from vssl_jax.show import (
  colours,
  curves,
  drift,
  masks,
  opened,
  page,
  pixels,
  sheet,
)
from vssl_jax.train import checkpoint, metrics

TRUTH_USED = (
  "each predicted patch is un-normalised with the true patch's mean and "
  'deviation, so brightness and contrast are not predicted'
)


def write(
  folder: str | pathlib.Path,
  others: Sequence[str | pathlib.Path] = (),
  clips: int = 3,
) -> pathlib.Path:
  """Writes `<folder>/report/index.html` and its pictures; returns its path.

  Args:
    folder: a run's.
    others: runs whose curves are drawn beside.
    clips: how many of the run's clips to draw.

  Raises:
    ValueError: no run there, or its videos are not where they were.
  """
  runs = [pathlib.Path(f) for f in (folder, *others)]
  for run in runs:
    for name in ('run.json', 'metrics.jsonl'):
      if not (run / name).exists():
        raise ValueError(
          f'{run}: found no {name}, wanted the folder of a run '
          '(its --config.workdir)'
        )
  shown = opened.open_run(runs[0], clips)
  out = runs[0] / 'report'
  out.mkdir(exist_ok=True)
  sections = [_curves(out, runs), *_layers(out, runs[0])]
  for phase in shown.method.phases():
    sections.append(_phase(out, shown, phase))
  text = page.render(runs[0].name, _facts(shown), sections)
  path = out / 'index.html'
  path.write_text(text)
  return path


def _curves(out: pathlib.Path, runs: Sequence[pathlib.Path]) -> page.Section:
  labels = [str(r) for r in runs]
  if len({r.name for r in runs}) == len(runs):
    labels = [r.name for r in runs]
  files = [r / 'metrics.jsonl' for r in runs]
  curves.save(out / 'curves.png', dict(zip(labels, files, strict=True)))
  caption = 'Metrics by step; dotted lines are where a phase begins.'
  return page.Section('Curves', [page.Picture('curves.png', caption)])


def _layers(out: pathlib.Path, run: pathlib.Path) -> list[page.Section]:
  if not drift.save(out / 'drift.png', run / 'metrics.jsonl'):
    return []
  pictures = [page.Picture('drift.png', drift.CAPTION)]
  return [page.Section('How the layers move', pictures)]


def _phase(
  out: pathlib.Path, shown: opened.Shown, phase: base.Phase
) -> page.Section:
  """Draws what a phase offers; without a checkpoint, its masks alone."""
  pictures, missing = [], ''
  try:
    pictures += masks.draw(out, shown, phase)
  except (ValueError, OSError, checkpoint.CheckpointError) as error:
    missing = f' No masks, which go by a teacher: {error}.'
  title, params = f'Phase {phase.name}', opened.params(shown.folder, phase)
  if params is None:
    note = 'No checkpoint: not begun, or not one of checkpoint.keep_phases.'
    return page.Section(title, pictures, note + missing)
  pictures += _reconstructions(out, shown, phase, params)
  pictures += _features(out, shown, phase, params)
  averages = [
    part.partition('/')[2]
    for part in encoders.parts(shown.folder)
    if part.startswith(f'{phase.name}/')
  ]
  note = f'Its encoder: {shown.folder}@{phase.name}.{missing}'
  for average in averages:
    mean = opened.params(shown.folder, phase, f'ema/{average}')
    both = {**params, 'encoder': mean}
    pictures += _features(out, shown, phase, both, average)
    note += f' Its average {average}: {shown.folder}@{phase.name}/{average}.'
  return page.Section(title, pictures, note)


def _reconstructions(
  out: pathlib.Path, shown: opened.Shown, phase: base.Phase, params: Any
) -> list[page.Picture]:
  """One picture per mask of a phase that predicts pixels."""
  kinds: dict[str, tuple[str, int]] = {}

  @jax.jit
  def predict(params: Any, batch: Any, rng: rngs.Rng) -> Any:
    found = shown.method.reconstruct(params, batch, rng, phase)
    # Filled when traced.
    kinds.update({name: (r.kind, r.every) for name, r in found.items()})
    return {name: (r.mask, r.predicted) for name, r in found.items()}

  found = predict(params, shown.batch, opened.rng(shown))
  pictures = []
  for label, (mask, output) in found.items():
    (kind, every), predicted = kinds[label], np.asarray(output, np.float32)
    video, patch = shown.batch['video'][:, ::every], phase.encoder.patch
    patch = (patch[0] // every, *patch[1:])
    seen = pixels.masked(video, mask, patch)
    made = pixels.reconstructed(video, mask, predicted, kind, patch)
    rows = {}
    for i in range(len(video)):
      rows[f'clip {i}'] = opened.frames(video, i)
      rows[f'clip {i}, what the encoder sees'] = opened.frames(seen, i)
      rows[f'clip {i}, predicted'] = opened.frames(made, i)
    how = (
      'no statistics of the truth are used' if kind == 'none' else TRUTH_USED
    )
    caption = (
      f'{phase.name}, reconstruction under mask {label}: hidden patches as '
      f'predicted, visible ones as they are. Target {kind}: {how}.'
    )
    name = f'{phase.name}-reconstruction-{label or "all"}.png'
    sheet.save(out / name, rows, caption)
    pictures.append(page.Picture(name, caption))
  return pictures


def _features(
  out: pathlib.Path,
  shown: opened.Shown,
  phase: base.Phase,
  params: Any,
  average: str = '',
) -> list[page.Picture]:
  """One picture of the clips and of their features as colours."""
  video, patch = shown.batch['video'], phase.encoder.patch
  encode = jax.jit(functools.partial(shown.method.encode, phase=phase))
  tokens = np.asarray(encode(params, video), np.float32)
  grid = layers.grid_of(video.shape, patch)
  rows = {}
  for i in range(len(video)):
    rows[f'clip {i}'] = opened.frames(video, i)
    painted = colours.of_clip(tokens[i], grid, patch)
    rows[f'clip {i}, features'] = list(sheet.some(painted))
  whose = f'average {average} of the encoder' if average else 'encoder'
  caption = (
    f'{phase.name}, features of the {whose}: their first three principal '
    'components as red, green and blue, one basis and one scale for all '
    'frames of a clip. Colours of different clips do not compare.'
  )
  name = '-'.join(filter(None, (phase.name, average, 'features.png')))
  sheet.save(out / name, rows, caption)
  return [page.Picture(name, caption)]


def _facts(shown: opened.Shown) -> dict[str, Any]:
  """Returns what the head of the page says."""
  made = shown.record['provenance']
  lines = metrics.read(shown.folder / metrics.FILE)
  last = lines[-1] if lines else {}
  total = sum(p.steps for p in shown.method.phases())
  default = config_lib.default(shown.config.method.name)
  changed = [
    line[2:]
    for line in config_lib.describe(shown.config, default).splitlines()
    if line.startswith('*')
  ]
  return {
    'step': f'{last.get("step", 0)} of {total}',
    'phase': last.get('phase', ''),
    'data': f'{shown.config.data.source}, {shown.record["num_examples"]} '
    f'videos, hash {shown.record["data_fingerprint"]}',
    'device': made['device'],
    'commit': made['git'] or 'not in a clone',
    'versions': ', '.join(f'{k} {v}' for k, v in made['versions'].items()),
    'command': ' '.join(made['command']),
    'config that differs from the default': '\n'.join(changed),
  }
