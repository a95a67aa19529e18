"""What the encoder sees under each mask, and what a mask was drawn by."""

import pathlib
import sys

import jax
import numpy as np

from vssl_jax.methods import base
from vssl_jax.models import layers
from vssl_jax.show import opened, page, pixels, sheet

CLIPS = 3  # of those that a run saves


def draw(
  out: pathlib.Path, shown: opened.Shown, phase: base.Phase
) -> list[page.Picture]:
  """Draws one picture per mask of a phase's first step.

  Args:
    out: folder of the pictures.
    shown: the run.
    phase: one of its phases.

  Raises:
    ValueError: masks go by a teacher that is not there any more.
  """
  asked = [n for n in (getattr(phase, 'mask_teacher', ''),) if n]
  teachers = opened.teachers(shown, phase, asked)
  found = jax.jit(
    lambda teachers, batch, rng: shown.method.masks(teachers, batch, rng, phase)
  )(teachers, shown.batch, opened.rng(shown))
  return [
    _sheet(out, shown, phase, name, jax.device_get(seen))
    for name, seen in found.items()
  ]


def _sheet(
  out: pathlib.Path,
  shown: opened.Shown,
  phase: base.Phase,
  name: str,
  seen: base.Seen,
) -> page.Picture:
  """Draws the clips, their scores if there are any, and what is seen."""
  video, patch = shown.batch['video'], phase.encoder.patch
  grid = layers.grid_of(video.shape, patch)
  hidden = pixels.masked(video, seen.mask, patch)
  rows = {}
  for i in range(len(video)):
    rows[f'clip {i}'] = opened.frames(video, i)
    if seen.scores is not None:
      lit = pixels.lit(video, seen.scores, patch)
      rows[f'clip {i}, by score'] = opened.frames(lit, i)
    rows[f'clip {i}, what the encoder sees'] = opened.frames(hidden, i)
  visible, masked = (x.shape[1] for x in seen.mask)
  rest = int(np.prod(grid)) - visible - masked
  label = f'mask {name}' if name else 'its mask'
  hidden_ones = 'are to be predicted'
  if getattr(phase, 'compared', '') == 'visible':
    hidden_ones = 'are hidden'
  caption = (
    f'{phase.name}, {label}: {visible} tokens are seen and {masked} '
    f'{hidden_ones} (grey)' + (f'; {rest} are neither (dark).' if rest else '.')
  )
  if seen.scores is not None:
    kept = _kept(seen)
    share = visible / (visible + masked)
    caption += (
      f' By score: brightness is the score of the {phase.mask_teacher} '
      f'teacher, over the highest of its time step. Of all scores '
      f'{100 * kept:.0f} % are visible, by chance {100 * share:.0f} %.'
    )
  file = f'{phase.name}-mask-{name or "all"}.png'
  sheet.save(out / file, rows, caption)
  return page.Picture(file, caption)


def _kept(seen: base.Seen) -> float:
  """Returns the share of the scores that is visible."""
  scores = np.asarray(seen.scores, np.float32)
  visible = np.take_along_axis(scores, np.asarray(seen.mask.visible), axis=1)
  return float(np.mean(visible.sum(1) / scores.sum(1)))


def save_in(workdir: str) -> None:
  """Draws masks that go by a teacher into a run's folder, at its end.

  Other masks are in the report only. A picture that fails says so and ends
  nothing, see `drift.save_in`.
  """
  if jax.process_count() > 1:
    return  # the teachers are spread over the hosts
  folder = pathlib.Path(workdir)
  try:
    _, _, method = opened.method_of(folder)
    asking = [p for p in method.phases() if getattr(p, 'mask_teacher', '')]
    shown = opened.open_run(folder, CLIPS) if asking else None
    for phase in asking:
      draw(folder, shown, phase)
  except Exception as error:  # whatever it is
    print(
      f'{folder}: its masks could not be drawn ({error!r}); the run itself is '
      'whole',
      file=sys.stderr,
    )
