"""Writes a report page of a run: curves, masks, predictions and features.

The pictures of a phase depend on what it implements: `Phase.draw_masks`,
`Phase.reconstruct` and `Phase.encode`.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from vssl_jax import config as config_lib
from vssl_jax import encoder, rngs
from vssl_jax.checkpoint import manager
from vssl_jax.masks import tubelets
from vssl_jax.methods import phase as phase_lib
from vssl_jax.utils import config_io, image_grid, metrics
from vssl_jax.visualize import (
  curves,
  html,
  mask_pictures,
  palette,
  reconstructions,
  run_reader,
  weight_drift,
)

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
    folder: a run folder.
    others: run folders whose curves are plotted in the same figure.
    clips: number of the run's clips to draw.

  Raises:
    ValueError: a folder is not a run folder, or the videos cannot be read.
  """
  runs = [pathlib.Path(f) for f in (folder, *others)]
  for run in runs:
    for name in ('run.json', 'metrics.jsonl'):
      if not (run / name).exists():
        raise ValueError(
          f'{run}: found no {name}, wanted the folder of a run '
          '(its --config.workdir)'
        )
  shown = run_reader.open_run(runs[0], clips)
  out = runs[0] / 'report'
  out.mkdir(exist_ok=True)
  sections = [_curves(out, runs), *_layers(out, runs[0])]
  for phase in shown.phases:
    sections.append(_phase(out, shown, phase))
  text = html.render(runs[0].name, _facts(shown), sections)
  path = out / 'index.html'
  path.write_text(text)
  return path


def _curves(out: pathlib.Path, runs: Sequence[pathlib.Path]) -> html.Section:
  labels = [str(r) for r in runs]
  if len({r.name for r in runs}) == len(runs):
    labels = [r.name for r in runs]
  files = [r / 'metrics.jsonl' for r in runs]
  curves.save(out / 'curves.png', dict(zip(labels, files, strict=True)))
  caption = 'Metrics by step; dotted lines are where a phase begins.'
  return html.Section('Curves', [html.Picture('curves.png', caption)])


def _layers(out: pathlib.Path, run: pathlib.Path) -> list[html.Section]:
  if not weight_drift.save(out / 'drift.png', run / 'metrics.jsonl'):
    return []
  pictures = [html.Picture('drift.png', weight_drift.CAPTION)]
  return [html.Section('Weight changes of the layers', pictures)]


def _phase(
  out: pathlib.Path, shown: run_reader.Shown, phase: phase_lib.Phase
) -> html.Section:
  """Draws the pictures of a phase; without a checkpoint, its masks only."""
  pictures, missing = [], ''
  try:
    pictures += mask_pictures.draw(out, shown, phase)
  except (ValueError, OSError, manager.CheckpointError) as error:
    missing = f' No masks, which need a teacher: {error}.'
  title, params = f'Phase {phase.name}', run_reader.params(shown.folder, phase)
  if params is None:
    note = 'No checkpoint: not started, or not one of checkpoint.keep_phases.'
    return html.Section(title, pictures, note + missing)
  pictures += _reconstructions(out, shown, phase, params)
  pictures += _features(out, shown, phase, params)
  averages = [
    part.partition('/')[2]
    for part in encoder.parts(shown.folder)
    if part.startswith(f'{phase.name}/')
  ]
  note = f'Its encoder: {shown.folder}@{phase.name}.{missing}'
  for average in averages:
    average_params = run_reader.params(shown.folder, phase, f'ema/{average}')
    merged_params = {**params, 'encoder': average_params}
    pictures += _features(out, shown, phase, merged_params, average)
    note += f' Its average {average}: {shown.folder}@{phase.name}/{average}.'
  return html.Section(title, pictures, note)


def _reconstructions(
  out: pathlib.Path,
  shown: run_reader.Shown,
  phase: phase_lib.Phase,
  params: Any,
) -> list[html.Picture]:
  """Draws one picture per mask of a phase that predicts pixels."""
  kinds: dict[str, tuple[str, int]] = {}

  @jax.jit
  def predict(params: Any, batch: Any, rng: rngs.Rng) -> Any:
    outputs = phase.reconstruct(params, batch, rng)
    # Set during tracing.
    kinds.update({name: (r.kind, r.every) for name, r in outputs.items()})
    return {name: (r.mask, r.predicted) for name, r in outputs.items()}

  outputs = predict(params, shown.batch, run_reader.rng(shown))
  pictures = []
  for label, (mask, output) in outputs.items():
    (kind, interval), predicted = kinds[label], np.asarray(output, np.float32)
    video, patch = shown.batch.video[:, ::interval], phase.encoder.patch
    patch = (patch[0] // interval, *patch[1:])
    masked = reconstructions.masked(video, mask, patch)
    reconstructed = reconstructions.reconstructed(
      video, mask, predicted, kind, patch
    )
    rows = {}
    for i in range(len(video)):
      rows[f'clip {i}'] = run_reader.frames(video, i)
      rows[f'clip {i}, what the encoder sees'] = run_reader.frames(masked, i)
      rows[f'clip {i}, predicted'] = run_reader.frames(reconstructed, i)
    statistics = (
      'no statistics of the truth are used' if kind == 'none' else TRUTH_USED
    )
    caption = (
      f'{phase.name}, reconstruction under mask {label}: hidden patches as '
      f'predicted, visible ones as they are. Target {kind}: {statistics}.'
    )
    name = f'{phase.name}-reconstruction-{label or "all"}.png'
    image_grid.save(out / name, rows, caption)
    pictures.append(html.Picture(name, caption))
  return pictures


def _features(
  out: pathlib.Path,
  shown: run_reader.Shown,
  phase: phase_lib.Phase,
  params: Any,
  average: str = '',
) -> list[html.Picture]:
  """Draws one picture of the clips and of their features as colours."""
  video, patch = shown.batch.video, phase.encoder.patch
  encode = jax.jit(lambda params, video: phase.encode(params, video))
  tokens = np.asarray(encode(params, video), np.float32)
  grid = tubelets.grid_of(video.shape, patch)
  rows = {}
  for i in range(len(video)):
    rows[f'clip {i}'] = run_reader.frames(video, i)
    colours = palette.of_clip(tokens[i], grid, patch)
    rows[f'clip {i}, features'] = list(image_grid.some(colours))
  source = f'average {average} of the encoder' if average else 'encoder'
  caption = (
    f'{phase.name}, features of the {source}: their first three principal '
    'components as red, green and blue, one basis and one scale for all '
    'frames of a clip. Colours of different clips are not comparable.'
  )
  name = '-'.join(filter(None, (phase.name, average, 'features.png')))
  image_grid.save(out / name, rows, caption)
  return [html.Picture(name, caption)]


def _facts(shown: run_reader.Shown) -> dict[str, Any]:
  """Returns the table at the top of the page."""
  provenance = shown.record['provenance']
  lines = metrics.read(shown.folder / metrics.FILE)
  last = lines[-1] if lines else {}
  total = sum(p.steps for p in shown.phases)
  default = config_lib.default(shown.config.method.name)
  changed = [
    line[2:]
    for line in config_io.describe(shown.config, default).splitlines()
    if line.startswith('*')
  ]
  return {
    'step': f'{last.get("step", 0)} of {total}',
    'phase': last.get('phase', ''),
    'data': f'{shown.config.data.source}, {shown.record["num_examples"]} '
    f'videos, hash {shown.record["data_fingerprint"]}',
    'device': provenance['device'],
    'commit': provenance['git'] or 'not in a clone',
    'versions': ', '.join(
      f'{k} {v}' for k, v in provenance['versions'].items()
    ),
    'command': ' '.join(provenance['command']),
    'config that differs from the default': '\n'.join(changed),
  }
