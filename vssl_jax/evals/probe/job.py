"""The job `probe`: measures a frozen encoder on labelled videos.

    python -m vssl_jax.main --config=configs/probe_ssv2.py \
      --config.encoder=<run folder or hub id>

Writes `report.json` into the run folder and prints it.
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
from vssl_jax.evals import features, report, splits
from vssl_jax.evals.probe import options as options_lib
from vssl_jax.evals.probe import setup as setup_lib
from vssl_jax.evals.probe import train_heads
from vssl_jax.utils import knn


def run(config: ml_collections.ConfigDict) -> int:
  """Measures `config.encoder`, writes and prints the report."""
  results = evaluate(config)
  if jax.process_index() == 0:
    path = report.write(results, config.workdir)
    print(f'\n{report.text(results)}\n\n{path}')
  return 0


def evaluate(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Measures an encoder.

  Args:
    config: with `encoder`, `data` and `probe`.

  Returns:
    The report: how it was measured, accuracies and intervals.

  Raises:
    ValueError: no encoder, no labels, or invalid options.
  """
  start = time.time()
  job = _job(config)
  measured = _knn(job) if config.probe.protocol == 'knn' else _heads(job)
  return {
    **measured,
    'seconds': round(time.time() - start, 1),
    **job.describe(),
  }


def _job(config: ml_collections.ConfigDict) -> setup_lib.Job:
  """Returns the job, with one class order for training and testing."""
  job = setup_lib.make(config)
  classes = options.find(job.train).classes
  if not classes:
    raise ValueError(
      f'probe.train: the videos of {job.train["source"]} have no labels; give '
      'class folders or a manifest with a label column'
    )
  # The order of the training videos also applies to the test videos.
  for data in (job.train, job.test):
    data['classes'] = tuple(classes)
  splits.check_labels('probe', train=job.train, test=job.test)
  return job


def _knn(job: setup_lib.Job) -> dict[str, Any]:
  """Returns the results of nearest neighbours; nothing is trained."""
  config = job.config.probe
  size = config.test_batch_size
  tables, passes = [], []
  for data in (job.train, job.test):
    videos = job.passes(data, size, 1, 1)
    if not passes:  # training videos: `ks` is checked before they are encoded
      _neighbours(config, videos.num_examples)
    table = features.table(job.encode, videos, pool=True, mesh=job.mesh)
    tables.append(table.take(table.label >= 0))
    passes.append(videos)
  train, test = tables
  if not len(test):
    raise ValueError('probe.test: no video has a label, or none can be read')
  ks = _neighbours(config, len(train))
  predictions = knn.predict(
    train.tokens[:, 0], train.label, test.tokens[:, 0], ks
  )
  correct = {k: int((x == test.label).sum()) for k, x in predictions.items()}
  return {
    'results': report.knn_results(correct, len(test)),
    'left_out': [f'k={k}' for k in config.ks if k not in ks],
    'held_out': 0,
    **_sides(job, passes[0], passes[1], len(train), test.label),
  }


def _neighbours(
  config: ml_collections.ConfigDict, count: int
) -> tuple[int, ...]:
  """Returns the numbers of neighbours that `count` training videos allow.

  Default values that are too large are left out; the report lists them.

  Raises:
    ValueError: no value is possible, or one that was set is not.
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


def _heads(job: setup_lib.Job) -> dict[str, Any]:
  """Trains and tests a grid of heads."""
  config = job.config.probe
  num_clips = config.segments * config.clips
  test = job.passes(job.test, config.test_batch_size, num_clips, config.views)
  settings = train_heads.Settings.of(config)
  network = train_heads.network(
    len(job.train['classes']), config, job.grid, job.clip[0]
  )

  def encode_test() -> Iterator[features.Tokens]:
    batches = setup_lib.number_views(test, config.segments, config.clips)
    return job.encoded(batches)

  pool = config.protocol == 'linear'
  seed = [0, job.config.seed]
  with job.epochs(config.segments, seed=seed, pool=pool) as (epochs, train):
    grid_results = train_heads.measure(
      network,
      settings,
      epochs,
      test=encode_test,
      views=config.clips * config.views,
      key=jax.random.key(job.config.seed),
      log=functools.partial(_print, settings),
    )
  summary = grid_results.summary()
  results = {n: summary[n] for n in ('selected', 'max') if n in summary}
  return {
    'results': results,
    'median': summary['median'],
    'held_out': grid_results.held_total,
    'history': grid_results.history,
    'heads': [{'lr': lr, 'wd': wd} for lr, wd in grid_results.pairs],
    **_sides(
      job,
      train,
      test,
      job.trained_on(train.num_examples),
      grid_results.predictions[1],
    ),
  }


def _sides(
  job: setup_lib.Job,
  train: Any,
  test: Any,
  trained_on: int,
  labels: Int[np.ndarray, 'n'],
) -> dict[str, Any]:
  """Returns the report entries on training and test videos.

  Args:
    job: the job.
    train: the training videos.
    test: the test videos.
    trained_on: number of training videos that heads are trained on.
    labels: labels of the evaluated test videos.
  """
  classes = [str(c) for c in job.train['classes']]
  return {
    'train': {
      'source': splits.name(job.train),
      'videos': train.num_examples,
      'trained_on': trained_on,
      'unlabelled': int((~splits.labelled(job.train)).sum()),
      'fingerprint': train.fingerprint,
    },
    'test': {
      'source': splits.name(job.test),
      'videos': test.num_examples,
      'fingerprint': test.fingerprint,
      'evaluated': len(labels),
      'missing': test.num_examples - len(labels),
    },
    'classes': classes,
    **report.chance(labels),
  }


def _print(settings: train_heads.Settings, entry: Mapping[str, Any]) -> None:
  if jax.process_index() == 0:
    best = max(entry['accuracy'])
    print(
      f'epoch {entry["epoch"]}/{settings.epochs}: loss '
      f'{min(entry["loss"]):.3f}, best head {100 * best:.2f} % on the test '
      'clips',
      flush=True,
    )
