"""Draws masks: the clips as the encoder sees them, and the mask scores."""

import pathlib
import sys

import jax
import numpy as np

from vssl_jax.masks import tubelets
from vssl_jax.methods import phase as phase_lib
from vssl_jax.utils import image_grid
from vssl_jax.visualize import html, reconstructions, run_reader

CLIPS = 3  # in the pictures that a run saves


def draw(
  out: pathlib.Path, shown: run_reader.Shown, phase: phase_lib.Phase
) -> list[html.Picture]:
  """Draws one picture per mask of a phase's first step.

  Args:
    out: folder of the pictures.
    shown: the run.
    phase: one of its phases.

  Raises:
    ValueError: the teacher that the masks are drawn from is not available.
  """
  names = [n for n in (phase.mask_teacher,) if n]
  teachers = run_reader.teachers(shown, phase, names)
  masks = jax.jit(
    lambda teachers, batch, rng: phase.draw_masks(teachers, batch, rng)
  )(teachers, shown.batch, run_reader.rng(shown))
  return [
    _sheet(out, shown, phase, name, jax.device_get(mask))
    for name, mask in masks.items()
  ]


def _sheet(
  out: pathlib.Path,
  shown: run_reader.Shown,
  phase: phase_lib.Phase,
  name: str,
  drawn: phase_lib.DrawnMask,
) -> html.Picture:
  """Draws the clips, their mask scores if any, and the visible patches."""
  video, patch = shown.batch.video, phase.encoder.patch
  grid = tubelets.grid_of(video.shape, patch)
  hidden = reconstructions.masked(video, drawn.mask, patch)
  rows = {}
  for i in range(len(video)):
    rows[f'clip {i}'] = run_reader.frames(video, i)
    if drawn.scores is not None:
      lit_video = reconstructions.lit(video, drawn.scores, patch)
      rows[f'clip {i}, by score'] = run_reader.frames(lit_video, i)
    rows[f'clip {i}, what the encoder sees'] = run_reader.frames(hidden, i)
  visible, masked = (x.shape[1] for x in drawn.mask)
  unused = int(np.prod(grid)) - visible - masked
  label = f'mask {name}' if name else 'its mask'
  masked_text = 'are to be predicted' if drawn.predicted else 'are hidden'
  caption = (
    f'{phase.name}, {label}: {visible} tokens are drawn and {masked} '
    f'{masked_text} (grey)'
    + (f'; {unused} are neither (dark).' if unused else '.')
  )
  if drawn.scores is not None:
    score_share = _kept(drawn)
    chance = visible / (visible + masked)
    caption += (
      f' By score: brightness is the score of the {phase.mask_teacher} '
      f'teacher, over the highest of its time step. Of all scores '
      f'{100 * score_share:.0f} % are visible, with random masks '
      f'{100 * chance:.0f} %.'
    )
  file = f'{phase.name}-mask-{name or "all"}.png'
  image_grid.save(out / file, rows, caption)
  return html.Picture(file, caption)


def _kept(drawn: phase_lib.DrawnMask) -> float:
  """Returns the visible share of the total score."""
  scores = np.asarray(drawn.scores, np.float32)
  visible = np.take_along_axis(scores, np.asarray(drawn.mask.visible), axis=1)
  return float(np.mean(visible.sum(1) / scores.sum(1)))


def save_in(workdir: str) -> None:
  """Saves pictures of teacher-guided masks in the run folder, after the run.

  Other masks are drawn in the report only. A failure is printed and not raised,
  see `weight_drift.save_in`.
  """
  if jax.process_count() > 1:
    return  # the teachers are sharded over the hosts
  folder = pathlib.Path(workdir)
  try:
    _, _, phases = run_reader.phases_of(folder)
    guided_phases = [phase for phase in phases if phase.mask_teacher]
    shown = run_reader.open_run(folder, CLIPS) if guided_phases else None
    for phase in guided_phases:
      draw(folder, shown, phase)
  except Exception as error:  # of any kind: the run is already finished
    print(
      f'{folder}: its masks could not be drawn ({error!r}); the run itself is '
      'complete',
      file=sys.stderr,
    )
