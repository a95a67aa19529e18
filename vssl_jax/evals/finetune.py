"""The job `finetune`: trains an encoder and a linear head on labelled videos.

    python -m vssl_jax.main --config=configs/finetune_ucf101.py \
      --config.encoder=<run folder or hub id> \
      --config.finetune.train=<train.csv> --config.finetune.test=<test.csv>

Without an encoder the same is supervised training from scratch. The run is
one of the trainer's: the same command resumes it, a SIGTERM saves it. After
every epoch it is validated on one centre view of each video; the best
checkpoint is tested once, in the end, on all views. Writes `report.json` into
the run's folder and prints it.

Source of the recipe: the released code of VideoMAE (arXiv 2203.12602) and MVD
(arXiv 2212.04500), `run_class_finetuning.py` and scripts.
"""

import contextlib
import dataclasses
import pathlib
import time
from typing import Any

import jax
import ml_collections
from absl import logging

from vssl_jax import config as config_lib
from vssl_jax import encoders, sharding
from vssl_jax.evals import (
  clips,
  finetune_report,
  finetune_start,
  finetune_videos,
  finetuned,
  lists,
  report,
  statistics,
  validation,
)
from vssl_jax.evals import job as job_lib
from vssl_jax.train import checkpoint, manifests, provenance, trainer
from vssl_jax.train import plan as plan_lib


def run(config: ml_collections.ConfigDict) -> int:
  """Fine-tunes `config.encoder`, writes and prints the report.

  Returns:
    The exit status: 0, or that of the trainer after a SIGTERM.
  """
  status, found = _carry_out(config, None)
  if found is not None and jax.process_index() == 0:
    path = report.place(found, config.workdir)
    print(f'\n{finetune_report.text(found)}\n\n{path}')
  return status


def evaluate(
  config: ml_collections.ConfigDict,
  encoder: encoders.Encoder | None = None,
) -> dict[str, Any]:
  """Fine-tunes an encoder and tests it.

  Args:
    config: such as `config.fine_tuning()`, with `finetune.train` and
      `finetune.test`.
    encoder: taken in place of `config.encoder`; without either, training
      starts at random from the shape in `config.method`.

  Returns:
    The report: how it was trained, accuracy and interval.

  Raises:
    ValueError: no labels, or knobs that do not fit.
    TrainingError: the training was ended before its end.
  """
  status, found = _carry_out(config, encoder)
  if found is None:
    raise trainer.run_lib.TrainingError(
      f'fine-tuning ended with status {status} and is saved in '
      f'{config.workdir}; the same call goes on from there'
    )
  return found


def _carry_out(
  config: ml_collections.ConfigDict, encoder: encoders.Encoder | None
) -> tuple[int, dict[str, Any] | None]:
  """Trains and tests; returns the trainer's status, and the report if it is 0.

  A run that was tested is not tested again.
  """
  start = time.time()
  if not config.workdir:
    raise ValueError(
      'config.workdir is empty; wanted a folder for checkpoints and report'
    )
  config = clips.follow(config, finetune_start.clip_of(config, encoder))
  videos = finetune_videos.find(config)
  config = finetune_start.fill(config, videos)
  finetune_start.write(config, encoder)
  if jax.process_index() == 0:
    print(_told(config, videos), flush=True)
  every = config.method.steps // config.finetune.epochs
  watcher = validation.Watcher(config, videos, every)
  with contextlib.closing(watcher):
    status = trainer.train(config, watchers=[watcher])
  if status:
    return status, None
  found = _tested(config)
  if found is None:
    found = _test(config, videos)
    found['history'] = validation.history(config.workdir, every)
    found['seconds'] = round(time.time() - start, 1)
    if jax.process_index() == 0:
      report.write(found, config.workdir)
  return 0, found


def _told(
  config: ml_collections.ConfigDict, videos: finetune_videos.Videos
) -> str:
  """Returns what is said before the first step."""
  wanted = config.finetune
  lines = [
    f'fine-tuning {config.encoder or "an encoder at random initialisation"} on '
    f'{videos.count} videos of {lists.name(videos.train)}, '
    f'{len(videos.classes)} classes, {wanted.epochs} epochs',
    f'clips: {clips.describe(_clips(config))}',
    finetune_start.describe_lr(config),
  ]
  if videos.held:
    lines.append(
      f'no finetune.valid is given: {100 * wanted.holdout:g} % of the training '
      'videos are held out, to choose the best checkpoint by'
    )
  elif videos.chosen_by_test:
    lines.append(
      f'the best checkpoint is chosen on {videos.chosen.count} of the '
      f'{videos.chosen.total} test videos, as published codes do; that flatters'
    )
  return '\n'.join(lines)


def _tested(config: ml_collections.ConfigDict) -> dict[str, Any] | None:
  """Returns the report of this run, if it was tested before."""
  wanted = config_lib.to_json(config)['finetune']
  for path in sorted(pathlib.Path(config.workdir).glob('report*.json')):
    try:
      found = manifests.load(path)
    except manifests.CorruptError as error:
      logging.warning('%s: the videos are tested again', error)
      continue
    if found.get('finetune') == wanted:
      return found
  return None


def _test(
  config: ml_collections.ConfigDict, videos: finetune_videos.Videos
) -> dict[str, Any]:
  """Tests the best checkpoint on all views of the test videos."""
  wanted = config.finetune
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  overrides = dict(config.mesh.overrides)
  model = finetuned.load(config.workdir, mesh, overrides)
  if model.saved.path.name != checkpoint.BEST:
    raise ValueError(
      f'{config.workdir}/params/{checkpoint.BEST}: the best checkpoint is '
      f'damaged or missing, and {model.saved.path.name} is not it. Put a copy '
      'of the folder back, or train anew with another --config.workdir'
    )
  clips = finetune_videos.all_views(config, videos)
  with contextlib.closing(clips), jax.set_mesh(mesh):
    found = finetuned.count(
      model,
      model.params,
      job_lib.voting(clips, 1, wanted.clips),
      wanted.clips * wanted.views,
      mesh,
    )
  correct = int(found.correct()[0])
  return {
    'results': {
      'best': {
        'accuracy': correct / found.total,
        'interval': list(statistics.interval(correct, found.total)),
        'top5': int(found.correct(5)[0]) / found.total,
        'step': model.saved.step,
      }
    },
    'valid': {
      **model.saved.manifest['valid'],
      'source': lists.name(videos.valid),
      'held_out': videos.held,
      'chosen_by_test': videos.chosen_by_test,
    },
    'train': {
      'source': lists.name(videos.train),
      'videos': videos.count,
    },
    'test': {
      'source': lists.name(videos.test),
      'videos': clips.num_examples,
      'fingerprint': clips.fingerprint,
      'evaluated': found.total,
      'missing': clips.num_examples - found.total,
    },
    'overlap': {n: dataclasses.asdict(x) for n, x in videos.shared.items()},
    'chosen_by': dataclasses.asdict(videos.chosen),
    'classes': list(videos.classes),
    **report.chance(found.predictions()[1]),
    **_facts(config),
  }


def _facts(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns how a model was fine-tuned."""
  return {
    'encoder': config.encoder or 'random initialisation',
    'protocol': 'fine-tuned',
    **_clips(config),
    'lr': finetune_start.describe_lr(config),
    'seed': config.seed,
    'steps': config.method.steps,
    **{
      name: config_lib.to_json(config)[name]
      for name in ('finetune', 'method', 'optim')
    },
    **provenance.describe(config_lib.to_json(config)),
  }


def _clips(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns the part of the report on the clips."""
  source = config.method.source or config.encoder
  own = encoders.clip_of(source) if source else None
  return clips.report(config.data.to_dict(), own)


def plan(config: ml_collections.ConfigDict, detail: str = 'shapes') -> str:
  """Returns what the job will do and need, without starting it.

  Args:
    config: a resolved config.
    detail: see `train.plan.describe`.

  Raises:
    ValueError: an encoder or a list of videos that cannot be read.
  """
  c, note = clips.follow(config, finetune_start.clip_of(config, None)), ''
  if any(c.finetune.train) or c.data.source:
    videos = finetune_videos.find(c)
    c = finetune_start.fill(c, videos)
    note = _told(c, videos)
  else:
    finetune_start.set_steps(c, 100)
    c.method.classes = c.method.classes or 400
    note = (
      f'clips: {clips.describe(_clips(c))}\n'
      'finetune.train is not set: an epoch is shown as 100 steps, with '
      f'{c.method.classes} classes\n{finetune_start.describe_lr(c)}'
    )
  if c.encoder:
    module = encoders.module_of(c.encoder)
    clips.check_patches(c, module.patch)
    finetune_start.set_encoder(c, module)
  return f'{note}\n{plan_lib.describe(c, detail)}'
