"""The job `probe`: measures an encoder on labelled videos.

    python -m vssl_jax.main --config=configs/probe_ssv2.py \
      --config.encoder=<run folder or hub id>

Writes `report.json` into the run's folder and prints it.
"""

import functools
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np
from jaxtyping import Int

from vssl_jax.data import options
from vssl_jax.evals import features, knn, lists, probe, report
from vssl_jax.evals import job as job_lib
from vssl_jax.evals import options as options_lib


def run(config: ml_collections.ConfigDict) -> int:
  """Measures `config.encoder`, writes and prints the report."""
  found = evaluate(config)
  if jax.process_index() == 0:
    path = report.write(found, config.workdir)
    print(f'\n{report.text(found)}\n\n{path}')
  return 0


def evaluate(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Measures an encoder.

  Args:
    config: with `encoder`, `data` and `probe`.

  Returns:
    The report: how it was measured, accuracies and intervals.

  Raises:
    ValueError: no encoder, no labels, or knobs that do not fit.
  """
  start = time.time()
  job = _job(config)
  measured = _knn(job) if config.probe.protocol == 'knn' else _heads(job)
  return {
    **measured,
    'seconds': round(time.time() - start, 1),
    **job.describe(),
  }


def _job(config: ml_collections.ConfigDict) -> job_lib.Job:
  """Returns the job, its labels in one order for training and testing."""
  job = job_lib.make(config)
  classes = options.find(job.train).classes
  if not classes:
    raise ValueError(
      f'probe.train: the videos of {job.train["source"]} have no labels; give '
      'class folders or a manifest with a label column'
    )
  # Whatever order the test videos come in.
  for data in (job.train, job.test):
    data['classes'] = tuple(classes)
  lists.check_labels('probe', train=job.train, test=job.test)
  return job


def _knn(job: job_lib.Job) -> dict[str, Any]:
  """Votes by nearest neighbours; nothing is trained."""
  config = job.config.probe
  size = config.test_batch_size
  tables, passes = [], []
  for data in (job.train, job.test):
    videos = job.passes(data, size, 1, 1)
    if not passes:  # the training videos: refused before they are encoded
      _neighbours(config, videos.num_examples)
    table = features.table(job.encode, videos, pool=True, mesh=job.mesh)
    tables.append(table.take(table.label >= 0))
    passes.append(videos)
  train, test = tables
  if not len(test):
    raise ValueError('probe.test: no video has a label, or none can be read')
  ks = _neighbours(config, len(train))
  found = knn.predict(train.tokens[:, 0], train.label, test.tokens[:, 0], ks)
  correct = {k: int((x == test.label).sum()) for k, x in found.items()}
  return {
    'results': report.knn_results(correct, len(test)),
    'left_out': [f'k={k}' for k in config.ks if k not in ks],
    'held_out': 0,
    **_sides(job, passes[0], passes[1], len(train), test.label),
  }


def _neighbours(
  config: ml_collections.ConfigDict, count: int
) -> tuple[int, ...]:
  """Returns the numbers of neighbours that a bank of `count` videos has.

  Those of the default that are too large are left out, and the report lists
  them.

  Raises:
    ValueError: none fits, or one that was set does not.
  """
  ks = tuple(config.ks)
  fitting = tuple(k for k in ks if 0 < k <= count)
  is_default = ks == tuple(options_lib.default().ks)
  if not fitting or (len(fitting) < len(ks) and not is_default):
    raise ValueError(
      f'probe.ks: found {ks}, wanted numbers of neighbours from 1 to the '
      f'{count} training videos with a label, such as '
      f'--config.probe.ks=({min(20, max(count, 1))},)'
    )
  return fitting


def _heads(job: job_lib.Job) -> dict[str, Any]:
  """Trains and tests a grid of heads."""
  config = job.config.probe
  along = config.segments * config.clips
  test = job.passes(job.test, config.test_batch_size, along, config.views)
  settings = probe.Settings.of(config)
  network = probe.network(
    len(job.train['classes']), config, job.grid, job.clip[0]
  )

  def tests() -> Iterator[features.Tokens]:
    batches = job_lib.voting(test, config.segments, config.clips)
    return job.encoded(batches)

  pool = config.protocol == 'linear'
  seed = [0, job.config.seed]
  with job.epochs(config.segments, seed=seed, pool=pool) as (epochs, train):
    found = probe.measure(
      network,
      settings,
      epochs,
      test=tests,
      views=config.clips * config.views,
      key=jax.random.key(job.config.seed),
      log=functools.partial(_print, settings),
    )
  summary = found.summary()
  results = {n: summary[n] for n in ('selected', 'max') if n in summary}
  return {
    'results': results,
    'median': summary['median'],
    'held_out': found.held_total,
    'history': found.history,
    'heads': [{'lr': lr, 'wd': wd} for lr, wd in found.pairs],
    **_sides(
      job,
      train,
      test,
      job.trained_on(train.num_examples),
      found.predictions[1],
    ),
  }


def _sides(
  job: job_lib.Job,
  train: Any,
  test: Any,
  trained_on: int,
  labels: Int[np.ndarray, 'n'],
) -> dict[str, Any]:
  """Returns the part of the report on the videos.

  Args:
    job: the job.
    train: the training videos.
    test: the test videos.
    trained_on: training videos that count.
    labels: of the test videos that were evaluated.
  """
  classes = [str(c) for c in job.train['classes']]
  return {
    'train': {
      'source': lists.name(job.train),
      'videos': train.num_examples,
      'trained_on': trained_on,
      'unlabelled': int((~lists.labelled(job.train)).sum()),
      'fingerprint': train.fingerprint,
    },
    'test': {
      'source': lists.name(job.test),
      'videos': test.num_examples,
      'fingerprint': test.fingerprint,
      'evaluated': len(labels),
      'missing': test.num_examples - len(labels),
    },
    'classes': classes,
    **report.chance(labels),
  }


def _print(settings: probe.Settings, entry: Mapping[str, Any]) -> None:
  if jax.process_index() == 0:
    best = max(entry['accuracy'])
    print(
      f'epoch {entry["epoch"]}/{settings.epochs}: loss '
      f'{min(entry["loss"]):.3f}, best head {100 * best:.2f} % on the test '
      'clips',
      flush=True,
    )
