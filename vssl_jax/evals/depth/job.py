"""The job `depth`: measures how well a frozen encoder predicts depth.

    python -m vssl_jax.main --config=configs/depth_scannet.py \
      --config.encoder=<run folder or hub id>

The readout of 4DS is trained on frames with depth (`data.scenes` describes
their layout) and tested on others. A grid of learning rates is trained at once,
as in the probes. Writes `report.json` and `depth_*.png` into the run folder.
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

from vssl_jax import encoder as encoder_lib
from vssl_jax.data import eval_epoch
from vssl_jax.evals import features, report, splits
from vssl_jax.evals.depth import errors, fit, pictures
from vssl_jax.evals.depth import report as depth_report
from vssl_jax.evals.probe import head_grid, options, train_heads
from vssl_jax.evals.probe import setup as setup_lib
from vssl_jax.models import readout


def run(config: ml_collections.ConfigDict) -> int:
  """Measures `config.encoder`, writes and prints the report."""
  results = evaluate(config)
  if jax.process_index() == 0:
    path = report.write(results, config.workdir)
    print(f'\n{depth_report.text(results)}\n\n{path}')
  return 0


def evaluate(
  config: ml_collections.ConfigDict,
  encoder: encoder_lib.Encoder | None = None,
) -> dict[str, Any]:
  """Trains the depth readout of an encoder and tests it.

  Args:
    config: with `encoder`, `data` and `probe`.
    encoder: evaluated in place of `config.encoder`.

  Returns:
    The report: how it was measured, AbsRel, delta_1 and RMSE in metres.

  Raises:
    ValueError: no encoder, no depth, or invalid options.
  """
  start, probe_config = time.time(), config.probe
  _check(config)
  job = setup_lib.make(config, encoder)
  fitted, source = _train(job)
  test = job.passes(
    job.test,
    probe_config.test_batch_size,
    probe_config.clips,
    probe_config.views,
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
      'source': splits.name(job.test),
      'examples': test.num_examples,
      'unreadable': len(test.bad),
      'fingerprint': test.fingerprint,
    },
    'seconds': round(time.time() - start, 1),
    **_described(job),
  }


def _described(job: setup_lib.Job) -> dict[str, Any]:
  """Returns the report entries on the protocol."""
  return {
    **job.describe(),
    'protocol': f'depth, {job.config.probe.loss}',
  }


def _pictures(job: setup_lib.Job) -> tuple[pathlib.Path, str]:
  """Returns the folder of the pictures and the prefix of their names.

  They are saved next to the report; those of another report are kept.
  """
  sides = {
    name: {'source': splits.name(data)}
    for name, data in (('train', job.train), ('test', job.test))
  }
  path = report.place(_described(job) | sides, job.config.workdir)
  return path.parent, 'depth' + path.stem.removeprefix('report')


def _check(config: ml_collections.ConfigDict) -> None:
  probe = config.probe
  if not config.data.depth_units:
    raise ValueError(
      'data.depth_units is 0, so no depth is read; set it to the units per '
      'metre of your depth pictures, such as --config.data.depth_units=1000'
    )
  if probe.segments != 1:
    raise ValueError(
      f'probe.segments: found {probe.segments}, wanted 1: depth is read from '
      'one clip at a time; set probe.clips for several of each example'
    )
  if probe.loss not in fit.LOSSES:
    raise ValueError(
      f'probe.loss: found {probe.loss!r}, wanted one of {sorted(fit.LOSSES)}'
    )


def network(
  config: ml_collections.ConfigDict,
  grid: tuple[int, int, int],
  clip: tuple[int, int, int, int],
) -> readout.Dense:
  """Returns the depth readout.

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


def _train(job: setup_lib.Job) -> tuple[fit.Trained, dict[str, Any]]:
  """Trains the readouts; returns them and the report entries on the data."""
  config = job.config.probe
  settings = train_heads.Settings.of(config)
  seed = [job.config.seed]
  with job.epochs(config.clips, seed=seed) as (epochs, examples):
    fitted = fit.fit(
      network(config, job.grid, job.clip),
      settings,
      train=epochs.train,
      steps_per_epoch=epochs.steps,
      held=epochs.held,
      loss=config.loss,
      key=jax.random.key(job.config.seed),
      log=functools.partial(_print, settings),
    )
  return fitted, {
    'source': splits.name(job.train),
    'examples': examples.num_examples,
    'trained_on': job.trained_on(examples.num_examples),
    'fingerprint': examples.fingerprint,
  }


def _test(
  job: setup_lib.Job, fitted: fit.Trained, test: eval_epoch.Pass
) -> dict[str, Any]:
  """Returns the figures of heads and baseline, and draws some clips."""
  config = job.config.probe
  names = ('heads', 'aligned', 'mean', 'aligned mean')
  totals = {name: errors.Total() for name in names}
  count = min(config.pictures, test.num_examples)
  to_draw = np.linspace(0, test.num_examples - 1, count).round().astype(int)
  to_draw = set(to_draw.tolist())
  head = fitted.selected or 0
  for batch in test:
    (rows,) = features.encode_batches(job.encode, [batch], mesh=job.mesh)
    weight = features.fetch(rows.weight)
    predicted = head_grid.outputs(fitted.spec, fitted.state, rows.tokens)
    mean = jnp.broadcast_to(fitted.mean, (len(weight), 1, *fitted.mean.shape))
    batch_sums = (
      *fit.judge(predicted, rows.depth),
      *fit.judge(mean, rows.depth),
    )
    for name, sums in zip(names, batch_sums, strict=True):
      totals[name].add(sums, weight)
    to_draw = _draw(job, batch, rows, predicted[:, head], to_draw)
  figures = {name: total.figures() for name, total in totals.items()}
  return depth_report.results(figures, fitted.spec.pairs, fitted.selected)


def _draw(
  job: setup_lib.Job,
  batch: Mapping[str, Any],
  rows: features.Tokens,
  predicted: Float[Array, 'R T H W'],
  wanted: set[int],
) -> set[int]:
  """Draws the first clip of wanted examples in a batch; returns the others."""
  index = features.fetch(rows.index)
  numbers = wanted & set(index[features.fetch(rows.weight) > 0].tolist())
  if not numbers:
    return wanted
  video = features.put({'video': np.asarray(batch['video'])}, job.mesh)
  video, truth, prediction = (
    features.fetch(x) for x in (video['video'], rows.depth, predicted)
  )
  if jax.process_index() == 0:
    folder, stem = _pictures(job)
    for number in sorted(numbers):
      row = int(np.flatnonzero(index == number)[0])
      caption = (
        f'{job.encoder.name}, tapped {job.tap()}; example {number} of '
        f'{splits.name(job.test)}. Grey: not measured.'
      )
      path = folder / f'{stem}_{number:06d}.png'
      pictures.save(path, video[row], truth[row], prediction[row], caption)
  return wanted - numbers


def _print(settings: train_heads.Settings, entry: Mapping[str, Any]) -> None:
  if jax.process_index() == 0:
    print(
      f'epoch {entry["epoch"]}/{settings.epochs}: loss '
      f'{min(entry["loss"]):.4f}',
      flush=True,
    )
