"""The job `finetune`: trains an encoder and a linear head on labelled videos.

    python -m vssl_jax.main --config=configs/finetune_ucf101.py \
      --config.encoder=<run folder or hub id> \
      --config.finetune.train=<train.csv> --config.finetune.test=<test.csv>

Without an encoder this is supervised training from scratch. The trainer runs
it: the same command resumes a run, and a SIGTERM saves it. After every epoch it
is validated on one centre view of each video. At the end the best checkpoint is
tested once on all views. Writes `report.json` into the run folder and prints
it.

Source of the recipe: the released code of VideoMAE (arXiv 2203.12602) and MVD
(arXiv 2212.04500), `run_class_finetuning.py` and scripts.
"""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
from absl import logging

from vssl_jax import encoder as encoder_lib
from vssl_jax import sharding
from vssl_jax.checkpoint import integrity, manager, provenance
from vssl_jax.evals import clips, report, splits
from vssl_jax.evals.finetune import model as model_lib
from vssl_jax.evals.finetune import report as finetune_report
from vssl_jax.evals.finetune import setup as finetune_setup
from vssl_jax.evals.finetune import validation
from vssl_jax.evals.finetune import videos as videos_lib
from vssl_jax.evals.probe import setup as setup_lib
from vssl_jax.train import loop
from vssl_jax.utils import config_io, statistics


def run(
  config: ml_collections.ConfigDict,
  defaults: Mapping[str, Any] | None = None,
) -> int:
  """Fine-tunes `config.encoder`, writes and prints the report.

  Args:
    config: a resolved config.
    defaults: see `loop.train`.

  Returns:
    The exit status: 0, or that of the trainer after a SIGTERM.
  """
  status, results = _carry_out(config, None, defaults)
  if results is not None and jax.process_index() == 0:
    path = report.place(results, config.workdir)
    print(f'\n{finetune_report.text(results)}\n\n{path}')
  return status


def evaluate(
  config: ml_collections.ConfigDict,
  encoder: encoder_lib.Encoder | None = None,
) -> dict[str, Any]:
  """Fine-tunes an encoder and tests it.

  Args:
    config: such as `config.fine_tuning()`, with `finetune.train` and
      `finetune.test`.
    encoder: used in place of `config.encoder`; without either, training starts
      from random values of the shape in `config.method`.

  Returns:
    The report: how it was trained, accuracy and interval.

  Raises:
    ValueError: no labels, or invalid options.
    TrainingError: the training was interrupted.
  """
  status, results = _carry_out(config, encoder)
  if results is None:
    raise loop.run_lib.TrainingError(
      f'fine-tuning ended with status {status} and is saved in '
      f'{config.workdir}; the same call resumes from there'
    )
  return results


def _carry_out(
  config: ml_collections.ConfigDict,
  encoder: encoder_lib.Encoder | None,
  defaults: Mapping[str, Any] | None = None,
) -> tuple[int, dict[str, Any] | None]:
  """Trains and tests; returns the trainer's status, and the report if it is 0.

  A run that has a report is not tested again.
  """
  start = time.time()
  if not config.workdir:
    raise ValueError(
      'config.workdir is empty; wanted a folder for checkpoints and report'
    )
  config = clips.follow(config, finetune_setup.clip_of(config, encoder))
  videos = videos_lib.find(config)
  config = finetune_setup.fill(config, videos)
  finetune_setup.write(config, encoder)
  if jax.process_index() == 0:
    print(describe(config, videos), flush=True)
  epoch_steps = config.method.steps // config.finetune.epochs
  hook = validation.Hook(config, videos, epoch_steps)
  with contextlib.closing(hook):
    status = loop.train(config, hooks=[hook], defaults=defaults)
  if status:
    return status, None
  results = _tested(config)
  if results is None:
    results = _test(config, videos)
    results['history'] = validation.history(config.workdir, epoch_steps)
    results['seconds'] = round(time.time() - start, 1)
    if jax.process_index() == 0:
      report.write(results, config.workdir)
  return 0, results


def describe(
  config: ml_collections.ConfigDict, videos: videos_lib.Videos
) -> str:
  """Returns the text that is printed before the first step."""
  settings = config.finetune
  lines = [
    f'fine-tuning {config.encoder or "an encoder at random initialisation"} on '
    f'{videos.count} videos of {splits.name(videos.train)}, '
    f'{len(videos.classes)} classes, {settings.epochs} epochs',
    f'clips: {clips.describe(resolved_clips(config))}',
    finetune_setup.describe_lr(config),
  ]
  if videos.held:
    lines.append(
      f'no finetune.valid is given: {100 * settings.holdout:g} % of the '
      'training videos are held out, to choose the best checkpoint by'
    )
  elif videos.chosen_by_test:
    lines.append(
      f'the best checkpoint is chosen on {videos.chosen.count} of the '
      f'{videos.chosen.total} test videos, as in published code; the result is '
      'optimistic'
    )
  return '\n'.join(lines)


def _tested(config: ml_collections.ConfigDict) -> dict[str, Any] | None:
  """Returns the report of this run, if it is already tested."""
  settings = config_io.to_json(config)['finetune']
  for path in sorted(pathlib.Path(config.workdir).glob('report*.json')):
    try:
      results = integrity.load(path)
    except integrity.CorruptError as error:
      logging.warning('%s: the videos are tested again', error)
      continue
    if results.get('finetune') == settings:
      return results
  return None


def _test(
  config: ml_collections.ConfigDict, videos: videos_lib.Videos
) -> dict[str, Any]:
  """Tests the best checkpoint on all views of the test videos."""
  settings = config.finetune
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  overrides = dict(config.mesh.overrides)
  model = model_lib.load(config.workdir, mesh, overrides)
  if model.saved.path.name != manager.BEST:
    raise ValueError(
      f'{config.workdir}/params/{manager.BEST}: the best checkpoint is '
      f'damaged or missing, and {model.saved.path.name} is another one. Put a '
      'copy of the folder back, or train again with another --config.workdir'
    )
  test_clips = videos_lib.all_views(config, videos)
  with contextlib.closing(test_clips), jax.set_mesh(mesh):
    predictions = model_lib.count(
      model,
      model.params,
      setup_lib.number_views(test_clips, 1, settings.clips),
      settings.clips * settings.views,
      mesh,
    )
  correct = int(predictions.correct()[0])
  return {
    'results': {
      'best': {
        'accuracy': correct / predictions.total,
        'interval': list(statistics.interval(correct, predictions.total)),
        'top5': int(predictions.correct(5)[0]) / predictions.total,
        'step': model.saved.step,
      }
    },
    'valid': {
      **model.saved.manifest['valid'],
      'source': splits.name(videos.valid),
      'held_out': videos.held,
      'chosen_by_test': videos.chosen_by_test,
    },
    'train': {
      'source': splits.name(videos.train),
      'videos': videos.count,
    },
    'test': {
      'source': splits.name(videos.test),
      'videos': test_clips.num_examples,
      'fingerprint': test_clips.fingerprint,
      'evaluated': predictions.total,
      'missing': test_clips.num_examples - predictions.total,
    },
    'overlap': {n: dataclasses.asdict(x) for n, x in videos.shared.items()},
    'chosen_by': dataclasses.asdict(videos.chosen),
    'classes': list(videos.classes),
    **report.chance(predictions.predictions()[1]),
    **_facts(config),
  }


def _facts(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the report entries on the fine-tuning."""
  return {
    'encoder': config.encoder or 'random initialisation',
    'protocol': 'fine-tuned',
    **resolved_clips(config),
    'lr': finetune_setup.describe_lr(config),
    'seed': config.seed,
    'steps': config.method.steps,
    **{
      name: config_io.to_json(config)[name]
      for name in ('finetune', 'method', 'optim')
    },
    **provenance.describe(config_io.to_json(config)),
  }


def resolved_clips(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the report entries on the clips."""
  source = config.method.source or config.encoder
  encoder_clip = encoder_lib.clip_of(source) if source else None
  return clips.report(config.data.to_dict(), encoder_clip)
