"""The job `probe`: measures an encoder on labelled videos.

    python -m vssl_jax.main --config=configs/probe_ssv2.py \
      --config.encoder=<run folder or hub id>

Writes `report.json` into the run's folder and prints it.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from vssl_jax import encoders, sharding
from vssl_jax.data import options, passes, pipeline
from vssl_jax.evals import features, knn, outcome, probe, report
from vssl_jax.train import provenance

# Features kept in memory beyond this are refused, with a remedy.
MAX_TABLE_BYTES = 32 * 2**30


def run(config: ml_collections.ConfigDict) -> int:
  """Measures `config.encoder`, writes and prints the report."""
  found = evaluate(config)
  if jax.process_index() == 0:
    path = report.write(found, config.workdir)
    print(f'\n{report.text(found)}\n\n{path}')
  return 0


@dataclasses.dataclass
class Job:
  """What one evaluation works with.

  Attributes:
    config: the whole config.
    encode: clips -> tokens.
    mesh: devices that split the rows.
    train: `config.data` of the training videos.
    test: `config.data` of the test videos.
  """

  config: ml_collections.ConfigDict
  encode: features.Encode
  mesh: jax.sharding.Mesh
  train: dict[str, Any]
  test: dict[str, Any]

  def passes(
    self, data: Mapping[str, Any], batch_size: int, segments: int, views: int
  ) -> passes.Pass:
    """Opens one pass over videos, `batch_size` of them at once."""
    return pipeline.evaluation(
      data,
      batch_size=batch_size * segments * views,
      segments=segments,
      views=views,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      folder=self.config.workdir,
    )


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
  if not config.encoder:
    raise ValueError(
      'config.encoder is empty; give --config.encoder=<run folder, folder with '
      'published weights, or hub id>'
    )
  encoder = encoders.load(config.encoder)
  job = _job(config, encoder)
  measured = _knn(job) if config.probe.protocol == 'knn' else _heads(job)
  clip = options.spec(job.test).shape
  tap = config.probe.depth
  return {
    'encoder': encoder.name,
    'protocol': config.probe.protocol,
    'tap': f'{tap:g} of the blocks' if tap else 'last block, final norm',
    'clip': list(clip),
    'encoder_clip': list(encoder.video),
    'timing': _timing(job.test),
    'segments': config.probe.segments,
    'views': config.probe.views,
    **measured,
    'seconds': round(time.time() - start, 1),
    'probe': config.probe.to_dict(),
    'seed': config.seed,
    **provenance.describe(),
  }


def _job(config: ml_collections.ConfigDict, encoder: encoders.Encoder) -> Job:
  mesh = sharding.make_mesh(data=-1, fsdp=1)
  params = jax.device_put(encoder.params, sharding.replicated(mesh))
  encoder = dataclasses.replace(encoder, params=params)
  wanted = config.probe
  for name in ('batch_size', 'test_batch_size'):
    if wanted[name] % jax.device_count():
      raise ValueError(
        f'probe.{name}: found {wanted[name]}, wanted a multiple of the '
        f'{jax.device_count()} devices'
      )
  data = config.data.to_dict()
  train = data | {'where': wanted.train_where or data['where']}
  train['source'] = _given(wanted.train) or data['source']
  classes = options.find(train).classes
  if not classes:
    raise ValueError(
      f'probe.train: the videos of {train["source"]} have no labels; give '
      'class folders or a manifest with a label column'
    )
  # One order of labels for both, whatever order the test videos come in.
  train['classes'] = tuple(classes)
  test = train | {'where': wanted.test_where or data['where']}
  test['source'] = _given(wanted.test) or data['source']
  if (train['source'], train['where']) == (test['source'], test['where']):
    raise ValueError(
      'probe.train and probe.test name the same videos; an accuracy on clips '
      'that the probe was trained on says nothing'
    )
  encode = functools.partial(encoder, depth=wanted.depth or None)
  return Job(config, encode, mesh, train, test)


def _given(source: Any) -> tuple[str, ...]:
  return tuple(s for s in source if s)


def _knn(job: Job) -> dict[str, Any]:
  """Votes by nearest neighbours; nothing is trained."""
  config = job.config.probe
  size = config.test_batch_size
  tables, passes = [], []
  for data in (job.train, job.test):
    videos = job.passes(data, size, 1, 1)
    table = features.table(job.encode, videos, pool=True, mesh=job.mesh)
    tables.append(table.take(table.label >= 0))
    passes.append(videos)
  train, test = tables
  found = knn.predict(
    train.tokens[:, 0], train.label, test.tokens[:, 0], tuple(config.ks)
  )
  correct = {k: int((x == test.label).sum()) for k, x in found.items()}
  return {
    'results': report.knn_results(correct, len(test)),
    'held_out': 0,
    **_sides(job, passes[0], passes[1], len(test)),
  }


def _heads(job: Job) -> dict[str, Any]:
  """Trains and tests a grid of heads."""
  config = job.config.probe
  test = job.passes(
    job.test, config.test_batch_size, config.segments, config.views
  )
  fields = [f.name for f in dataclasses.fields(probe.Settings)]
  settings = probe.Settings(**{name: config[name] for name in fields})
  network = probe.network(config.protocol, len(job.train['classes']), config)

  def tests() -> Iterator[features.Tokens]:
    return _encoded(job, test, config.segments)

  common = {
    'views': config.views,
    'key': jax.random.key(job.config.seed),
    'log': functools.partial(_print, settings),
  }
  measure = _streamed if config.augment else _stored
  found, train = measure(job, network, settings, tests, common)
  summary = found.summary()
  results = {n: summary[n] for n in ('selected', 'max') if n in summary}
  return {
    'results': results,
    'median': summary['median'],
    'held_out': found.held_total,
    'history': found.history,
    'heads': [{'lr': lr, 'wd': wd} for lr, wd in found.pairs],
    **_sides(job, train, test, found.total),
  }


def _encoded(
  job: Job,
  batches: features.Batches,
  segments: int,
) -> Iterator[features.Tokens]:
  return features.encode_batches(
    job.encode, batches, segments=segments, mesh=job.mesh
  )


def _streamed(
  job: Job,
  network: Any,
  settings: probe.Settings,
  tests: Callable[[], Iterator[features.Tokens]],
  common: dict[str, Any],
) -> tuple[outcome.Outcome, Any]:
  """Trains on new crops in every epoch; the encoder runs each time."""
  config = job.config.probe
  clips = pipeline.make(
    job.train | {'repeats': config.segments},
    batch_size=config.batch_size * config.segments,
    seed=job.config.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    folder=job.config.workdir,
  )
  steps = max(clips.num_examples // config.batch_size, 1)
  stream = clips.iterator()
  fraction = settings.holdout

  def epoch(_: int) -> Iterator[features.Tokens]:
    return _encoded(job, itertools.islice(stream, steps), config.segments)

  def held() -> Iterator[features.Tokens]:
    batches = job.passes(job.train, config.test_batch_size, config.segments, 1)
    # Encoding the others would be wasted. Several processes must agree on
    # the number of batches, so there they all are encoded, and not counted.
    if jax.process_count() == 1:
      keep = functools.partial(probe.held_out, fraction=fraction)
      batches = features.only(batches, keep)
    return _encoded(job, batches, config.segments)

  try:
    found = probe.measure(
      network,
      settings,
      train=epoch,
      steps_per_epoch=steps,
      test=tests,
      held=held if fraction else None,
      **common,
    )
  finally:
    clips.close()
  return found, clips


def _stored(
  job: Job,
  network: Any,
  settings: probe.Settings,
  tests: Callable[[], Iterator[features.Tokens]],
  common: dict[str, Any],
) -> tuple[outcome.Outcome, Any]:
  """Encodes centre crops of the training videos once and keeps them."""
  config = job.config.probe
  videos = job.passes(job.train, config.test_batch_size, config.segments, 1)
  pool = config.protocol == 'linear'
  clip = options.spec(job.train).shape
  shape = jax.eval_shape(
    job.encode, jax.ShapeDtypeStruct((1, *clip), np.uint8)
  ).shape
  tokens = 1 if pool else shape[1] * config.segments
  size = 4 * videos.num_examples * tokens * shape[2]
  if size > MAX_TABLE_BYTES:
    raise ValueError(
      f'probe.augment=False keeps {size / 2**30:.0f} GiB of features in '
      f'memory, more than {MAX_TABLE_BYTES / 2**30:.0f}; set '
      '--config.probe.augment=True, which encodes new crops in every epoch'
    )
  table = features.table(
    job.encode, videos, segments=config.segments, pool=pool, mesh=job.mesh
  )
  found = probe.on_tables(
    network,
    settings,
    table,
    tests,
    batch_size=config.batch_size,
    mesh=job.mesh,
    **common,
  )
  return found, videos


def _sides(job: Job, train: Any, test: Any, evaluated: int) -> dict[str, Any]:
  """Returns what the report says of the videos."""
  classes = [str(c) for c in job.train['classes']]
  return {
    'train': {
      'source': _name(job.train),
      'videos': train.num_examples,
      'fingerprint': train.fingerprint,
    },
    'test': {
      'source': _name(job.test),
      'videos': test.num_examples,
      'fingerprint': test.fingerprint,
      'evaluated': evaluated,
      'missing': test.num_examples - evaluated,
    },
    'classes': classes,
    'chance': 1 / len(classes),
  }


def _name(data: Mapping[str, Any]) -> str:
  where = f' where {data["where"]}' if data['where'] else ''
  return ', '.join(data['source']) + where


def _timing(data: Mapping[str, Any]) -> str:
  return f'{data["fps"]:g} fps' if data['fps'] else f'stride {data["stride"]}'


def _print(settings: probe.Settings, entry: Mapping[str, Any]) -> None:
  if jax.process_index() == 0:
    best = max(entry['accuracy'])
    print(
      f'epoch {entry["epoch"]}/{settings.epochs}: loss '
      f'{min(entry["loss"]):.3f}, best head {100 * best:.2f} % on the test '
      'clips',
      flush=True,
    )
