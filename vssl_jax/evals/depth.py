"""The job `depth`: how well depth can be read from a frozen encoder.

    python -m vssl_jax.main --config=configs/depth_scannet.py \
      --config.encoder=<run folder or hub id>

The readout of 4DS is trained on frames with depth (`data.scenes` says how they
lie) and tested on others; a grid of learning rates at once, as in the probes.
Writes `report.json` and `depth_*.png` into the run's folder.
"""

import contextlib
import functools
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Array, Float

from vssl_jax import encoders
from vssl_jax.data import passes
from vssl_jax.evals import (
  depth_error,
  depth_fit,
  depth_report,
  features,
  heads,
  lists,
  options,
  probe,
  report,
)
from vssl_jax.evals import job as job_lib
from vssl_jax.models import readout
from vssl_jax.show import depths


def run(config: ml_collections.ConfigDict) -> int:
  """Measures `config.encoder`, writes and prints the report."""
  found = evaluate(config)
  if jax.process_index() == 0:
    path = report.write(found, config.workdir)
    print(f'\n{depth_report.text(found)}\n\n{path}')
  return 0


def evaluate(
  config: ml_collections.ConfigDict,
  encoder: encoders.Encoder | None = None,
) -> dict[str, Any]:
  """Trains the depth readout of an encoder and tests it.

  Args:
    config: with `encoder`, `data` and `probe`.
    encoder: measured in place of `config.encoder`.

  Returns:
    The report: how it was measured, AbsRel, delta_1 and RMSE in metres.

  Raises:
    ValueError: no encoder, no depth, or knobs that do not fit.
  """
  start, wanted = time.time(), config.probe
  _check(config)
  job = job_lib.make(config, encoder)
  fitted, source = _train(job)
  test = job.passes(
    job.test, wanted.test_batch_size, wanted.clips, wanted.views
  )
  with contextlib.closing(test):
    results = _test(job, fitted, test)
  return {
    'results': results,
    'history': fitted.history,
    'heads': [{'lr': lr, 'wd': wd} for lr, wd in fitted.spec.pairs],
    'held_out_pixels': fitted.held_out,
    'train': source,
    'test': {
      'source': lists.name(job.test),
      'examples': test.num_examples,
      'unreadable': len(test.bad),
      'fingerprint': test.fingerprint,
    },
    'seconds': round(time.time() - start, 1),
    **_described(job),
  }


def _described(job: job_lib.Job) -> dict[str, Any]:
  """Returns the part of the report on how depth is measured."""
  return {
    **job.describe(),
    'protocol': f'depth, {job.config.probe.loss}',
  }


def _pictures(job: job_lib.Job) -> tuple[pathlib.Path, str]:
  """Returns where pictures go, and how their names begin.

  They lie beside the report, and do not replace those of another one.
  """
  sides = {
    name: {'source': lists.name(data)}
    for name, data in (('train', job.train), ('test', job.test))
  }
  path = report.place(_described(job) | sides, job.config.workdir)
  return path.parent, 'depth' + path.stem.removeprefix('report')


def _check(config: ml_collections.ConfigDict) -> None:
  wanted = config.probe
  if not config.data.depth_units:
    raise ValueError(
      'data.depth_units is 0, so no depth is read; set it to the units per '
      'metre of your depth pictures, such as --config.data.depth_units=1000'
    )
  if wanted.segments != 1:
    raise ValueError(
      f'probe.segments: found {wanted.segments}, wanted 1: depth is read from '
      'one clip at a time; set probe.clips for several of each example'
    )
  if wanted.loss not in depth_fit.LOSSES:
    raise ValueError(
      f'probe.loss: found {wanted.loss!r}, wanted one of '
      f'{sorted(depth_fit.LOSSES)}'
    )


def network(
  config: ml_collections.ConfigDict,
  grid: tuple[int, int, int],
  clip: tuple[int, int, int, int],
) -> readout.Dense:
  """Returns the readout of depth.

  Args:
    config: `config.probe`.
    grid: tokens (t, h, w) of a clip.
    clip: (T, H, W, C).
  """
  return readout.Dense(
    grid,
    clip[:3],
    tuple(config.patch),
    dtype=config.dtype,
    **options.attention_of(config),
  )


def _train(job: job_lib.Job) -> tuple[depth_fit.Trained, dict[str, Any]]:
  """Trains the readouts; returns them and what a report says of the data."""
  config = job.config.probe
  settings = probe.Settings.of(config)
  seed = [job.config.seed]
  with job.epochs(config.clips, seed=seed) as (epochs, examples):
    found = depth_fit.fit(
      network(config, job.grid, job.clip),
      settings,
      train=epochs.train,
      steps_per_epoch=epochs.steps,
      held=epochs.held,
      loss=config.loss,
      key=jax.random.key(job.config.seed),
      log=functools.partial(_print, settings),
    )
  return found, {
    'source': lists.name(job.train),
    'examples': examples.num_examples,
    'trained_on': job.trained_on(examples.num_examples),
    'fingerprint': examples.fingerprint,
  }


def _test(
  job: job_lib.Job, fitted: depth_fit.Trained, test: passes.Pass
) -> dict[str, Any]:
  """Returns the figures of heads and baseline, and draws some clips."""
  config = job.config.probe
  names = ('heads', 'aligned', 'mean', 'aligned mean')
  totals = {name: depth_error.Total() for name in names}
  count = min(config.pictures, test.num_examples)
  drawn = np.linspace(0, test.num_examples - 1, count).round().astype(int)
  drawn = set(drawn.tolist())
  head = fitted.selected or 0
  for batch in test:
    (rows,) = features.encode_batches(job.encode, [batch], mesh=job.mesh)
    weight = features.fetch(rows.weight)
    predicted = heads.outputs(fitted.spec, fitted.state, rows.tokens)
    mean = jnp.broadcast_to(fitted.mean, (len(weight), 1, *fitted.mean.shape))
    found = (
      *depth_fit.judge(predicted, rows.depth),
      *depth_fit.judge(mean, rows.depth),
    )
    for name, sums in zip(names, found, strict=True):
      totals[name].add(sums, weight)
    drawn = _draw(job, batch, rows, predicted[:, head], drawn)
  figures = {name: total.figures() for name, total in totals.items()}
  return depth_report.results(figures, fitted.spec.pairs, fitted.selected)


def _draw(
  job: job_lib.Job,
  batch: Mapping[str, Any],
  rows: features.Tokens,
  predicted: Float[Array, 'R T H W'],
  wanted: set[int],
) -> set[int]:
  """Draws the first clip of wanted examples; returns those still wanted."""
  index = features.fetch(rows.index)
  here = wanted & set(index[features.fetch(rows.weight) > 0].tolist())
  if not here:
    return wanted
  video = features.put({'video': np.asarray(batch['video'])}, job.mesh)
  video, truth, guess = (
    features.fetch(x) for x in (video['video'], rows.depth, predicted)
  )
  if jax.process_index() == 0:
    folder, stem = _pictures(job)
    for number in sorted(here):
      row = int(np.flatnonzero(index == number)[0])
      caption = (
        f'{job.encoder.name}, tapped {job.tap()}; example {number} of '
        f'{lists.name(job.test)}. Grey: not measured.'
      )
      path = folder / f'{stem}_{number:06d}.png'
      depths.save(path, video[row], truth[row], guess[row], caption)
  return wanted - here


def _print(settings: probe.Settings, entry: Mapping[str, Any]) -> None:
  if jax.process_index() == 0:
    print(
      f'epoch {entry["epoch"]}/{settings.epochs}: loss '
      f'{min(entry["loss"]):.4f}',
      flush=True,
    )
