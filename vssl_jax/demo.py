"""The demo: what `python -m vssl_jax.main` does when it is told nothing.

It writes labelled video files, runs a method on them as on any folder of
videos, and measures the encoder with frozen probes beside the same encoder
before training and beside features that learn nothing. The classes are kinds
of motion, so a single frame gives nothing away.
"""

import dataclasses
import json
import pathlib
import sys
from typing import Any

import jax
import ml_collections
import numpy as np

from vssl_jax import config as config_lib
from vssl_jax import encoders
from vssl_jax.data import pipeline, synthetic
from vssl_jax.evals import features, knn, linear, probe
from vssl_jax.evals import unused as unused_keys
from vssl_jax.show import drift
from vssl_jax.show import masks as mask_pictures
from vssl_jax.train import provenance, rewind, trainer

# Videos to pretrain on, to train the probe on, and to test it on.
CLIPS = {'pretrain': 2560, 'train': 400, 'test': 1000}
OWN = 'written by the demo'  # data.source until it is
SCENE: dict[str, Any] = {}


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """Returns the demo's config.

  Args:
    variant: the method; `salt` when empty.

  Raises:
    ValueError: no demo of that name.
  """
  variant = variant or 'salt'
  methods = {
    'salt': _salt,
    'layerlock': _layerlock,
    'pmd': _pmd,
    'kdhiera': _kdhiera,
  }
  if variant not in methods:
    raise ValueError(
      f'demo.py: found :{variant}, wanted one of {list(methods)}'
    )
  c = config_lib.default(variant)
  c.job = 'demo'
  c.batch_size = 16
  _data(c)
  methods[variant](c)
  c.optim.update(
    dict(lr=2e-3, lr_start=2e-4, lr_end=1e-6, lr_batch=16, clip=1.0)
  )
  c.optim.update(dict(weight_decay=0.04, weight_decay_end=0.04))
  c.checkpoint.every = 1000
  c.log.every = 250
  c.health.every = 0.2
  # Enough for random features too, whose classes lie close together.
  c.probe.update(dict(protocol='linear', epochs=100, batch_size=64))
  c.probe.update(dict(lrs=(1e-1, 3e-2, 1e-2, 3e-3), wds=(0.01,)))
  return c


def _data(c: ml_collections.ConfigDict) -> None:
  """Whole clips as they were written: no crop, no flip."""
  c.data.source = OWN
  c.data.update(dict(frames=8, stride=1, size=(32, 32)))
  c.data.update(dict(crop='centre', flip=False))
  # The files are our own: no reader of them will hang.
  c.data.isolate = False


def _salt(c: ml_collections.ConfigDict) -> None:
  """A teacher and a student that train in a minute each.

  One thing has to differ from the paper in so small a run: the teacher's
  mask. It sees the first half of the clip and predicts the second, the causal
  mask of the paper's ablation. Blocks are masked in every frame, so tokens
  beside a block show at each moment what goes on behind it, and nothing needs
  to be known of motion: after as many steps on them a teacher's probe stood at
  20 %, where random initialisation stands at 30 % and this teacher at 69 %.
  The student's masks are SALT's. Glorot's initial values make the random
  encoder a stronger opponent than those of V-JEPA (30 against 18 %).
  """
  c.method.vit.update(
    dict(
      patch=(2, 8, 8),
      positions='sincos_3d_vjepa',
      init='videomae',
      dtype='float32',
    )
  )
  for name, steps, masks in (
    ('pixel_teacher', 3000, 'causal:0.5'),
    ('latent_student', 2000, 'short:24/32'),
    ('latent_student_2', 2000, 'short:24/32'),  # not run, unless asked for
  ):
    section = c.method[name]
    section.steps = steps
    section.masks = masks
    section.encoder.update(
      dict(size='Ti', width=64, depth=3, num_heads=4, mlp_width=256)
    )
    section.mask_tokens = 1
  head = dict(width=64, depth=1, num_heads=4)
  c.method.pixel_teacher.decoder.update(head)
  c.method.latent_student.predictor.update(head)
  c.method.latent_student_2.predictor.update(head)


def _layerlock(c: ml_collections.ConfigDict) -> None:
  """Half of the run on pixels, then three locks.

  The mask is causal, as for SALT's teacher and for the same reason: under
  random masks (85 % hidden) the probe stood at 15 % after as many steps, random
  initialisation at 18 % and this encoder at 60 %. Pixels are centred: left in
  [0, 1], as in 4DS, the same steps learned nothing (loss .99 of 1). Its blocks
  do not come to rest in the order of depth, as those of large models are said
  to (`drift.png` of seed 0): all slow down with the learning rate.
  """
  m = c.method
  m.vit.update(dict(patch=(2, 8, 8), init='videomae', dtype='float32'))
  c.data.update(dict(mean=(0.5,), std=(0.25,)))
  m.encoder.update(
    dict(size='Ti', width=64, depth=6, num_heads=4, mlp_width=256)
  )
  m.decoder_blocks = 2
  m.masks = 'causal:0.5'
  m.total, m.start, m.last = 2000, 0.5, 3.0
  c.optim.warmup = 200


def _own_teachers(
  c: ml_collections.ConfigDict, depth: int, **steps: int
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Has the run train its teachers first; returns their shape and their head's.

  Args:
    c: the demo's config.
    depth: blocks of a teacher.
    **steps: teacher -> its steps.
  """
  m = c.method
  m.vit.update(dict(patch=(2, 8, 8), dtype='float32'))
  shape = dict(size='Ti', width=64, depth=depth, num_heads=4, mlp_width=256)
  head = dict(width=64, depth=1, num_heads=4)
  for name, count in steps.items():
    section = m[f'{name}_teacher']
    section.encoder.update(shape)
    section.decoder.update(head)
    section.steps = count
    m[name].update(dict(teacher=f'@{name}_teacher', dtype='float32'))
  m.video_teacher.masks = 'causal:0.5'
  return shape, head


def _pmd(c: ml_collections.ConfigDict) -> None:
  """Two teachers from nothing, then four phases of rising mask ratio.

  The video teacher's mask is causal, as for SALT's and for the same reason;
  the image teacher sees single frames and can know nothing of motion. A
  picture has 16 positions here: the ratios show 8, 6, 4 and 2 of them, where
  the published ones would show 4, 4, 3 and 2. Memory is looked at once an
  epoch.
  """
  m = c.method
  shape, head = _own_teachers(c, depth=3, image=500, video=3000)
  m.encoder.update(shape)
  m.decoder.update(head)
  m.drop_path = 0.0
  m.previous_dtype = 'float32'
  m.mask_ratios = (0.5, 0.625, 0.75, 0.875)
  m.steps = (CLIPS['pretrain'] // 16 * 3,) * 4
  m.window = CLIPS['pretrain'] // 16
  c.optim.warmup = 200


def _kdhiera(c: ml_collections.ConfigDict) -> None:
  """Two teachers from nothing, then a Hiera that follows all their layers.

  The teachers are PMD's but for one block more, so that each of the four
  stages has a layer to follow. A unit is 16 pixels, as a picture has 32: the
  convolution has a stride of 2 where it would have 4, and sees 3 pixels
  instead of 7. Of the four units of a time step two are visible; an image
  teacher of so few steps attends to all alike, which the run's log says. It
  can be too short: with 1,200 steps of the video teacher (its probe at 30 %)
  and 250 of the student every cosine stands above .94, which is what all
  tokens of a clip have in common, and the student's probe at 11 %.
  """
  m = c.method
  _own_teachers(c, depth=4, image=300, video=3000)
  m.image.layers = m.video.layers = (1, 2, 3, 4)
  m.scores = 'column_mean'  # an MAE of our own has no class token
  m.encoder.update(dict(channels=32, depths=(1, 1, 2, 1), num_heads=1))
  m.hiera.update(dict(kernel=(3, 3, 3), padding=(1, 1, 1), dtype='float32'))
  m.hiera.stride = (2, 2, 2)
  m.drop_path, m.mask_ratio, m.steps = 0.0, 0.5, 1500
  c.optim.warmup = 100


def unused(config: ml_collections.ConfigDict) -> dict[str, str]:
  """Returns patterns of keys that the demo does not read, and remedies."""
  own = (
    'the demo writes its own videos. For yours take a page such as '
    'configs/salt_single_gpu.py with --config.data.source'
  )
  names = ('source', 'where', 'path_column', 'label_column', 'split', 'classes')
  read = {f.name for f in dataclasses.fields(probe.Settings)} | {'batch_size'}
  linear = 'the demo measures with linear probes and nearest neighbours alone'
  return {
    **{f'data.{name}': own for name in (*names, 'examples', 'weights')},
    **{f'probe.{n}': linear for n in config.probe if n not in read},
    **unused_keys.of_data(config.data, config.data.repeats, tested=False),
    **unused_keys.one_head(config.probe),
    'encoder': 'the demo measures the encoder that it trains',
    'finetune.*': 'the demo fine-tunes nothing',
  }


def run(
  config: ml_collections.ConfigDict, back: rewind.Rewind | None = None
) -> int:
  """Writes the videos, trains, probes, prints; returns the exit status.

  Args:
    config: the demo's.
    back: see `trainer.train`.

  Raises:
    ValueError: a page names other videos.
  """
  workdir = pathlib.Path(config.workdir)
  videos = workdir / 'videos'
  if config.data.source not in (OWN, str(videos / 'pretrain')):
    raise ValueError(
      f'data.source: found {config.data.source!r}, which the demo would '
      'overwrite with videos of its own; for yours take a page such as '
      'configs/salt_single_gpu.py'
    )
  if jax.process_index() == 0:
    print(f'writing {sum(CLIPS.values())} videos to {videos}', flush=True)
    synthetic.write(videos, clips=CLIPS, seed=config.seed, **SCENE)
  config.data.source = str(videos / 'pretrain')
  status = trainer.train(config, back)
  if status:
    return status
  drift.save_in(config.workdir)
  mask_pictures.save_in(config.workdir)
  report = measure(config, videos)
  (workdir / 'demo.json').write_text(json.dumps(report, indent=1))
  print(summary(report, config))
  return 0


def measure(
  config: ml_collections.ConfigDict, videos: pathlib.Path
) -> dict[str, Any]:
  """Returns probe accuracies of the encoders and of the baselines.

  Args:
    config: the demo's, finished.
    videos: folder with the labelled `train` and `test` videos.
  """
  parts = encoders.parts(config.workdir)
  trained = {name: encoders.load(f'{config.workdir}@{name}') for name in parts}
  last = [name for name in parts if '/' not in name][-1]
  encode = {
    **{
      f'{name} ({"average" if "/" in name else "trained"})': encoder
      for name, encoder in trained.items()
    },
    f'{last} at random initialisation': encoders.random(
      trained[last], config.seed
    ),
    'raw pixels': features.pixels,
    'motion energy': features.motion_energy,
    'a single frame': features.middle_frame,
  }
  loaded = {
    split: _clips(config, videos / split) for split in ('train', 'test')
  }
  classes = len(synthetic.MOTIONS)
  fields = [f.name for f in dataclasses.fields(probe.Settings)]
  settings = probe.Settings(**{n: config.probe[n] for n in fields})
  rows = {}
  for name, one in encode.items():
    train, test = (
      features.table(one, loaded[split], pool=True)
      for split in ('train', 'test')
    )
    found = linear.fit(
      train,
      test,
      classes=classes,
      settings=settings,
      batch_size=config.probe.batch_size,
    )
    rows[name] = found.summary()['selected']
    rows[name]['knn'] = knn.accuracy(
      train.tokens[:, 0], train.label, test.tokens[:, 0], test.label
    )
  return {
    'accuracy': rows,
    'chance': 1 / classes,
    'test_clips': CLIPS['test'],
    'probe_clips': CLIPS['train'],
    'provenance': provenance.describe(config_lib.to_json(config)),
  }


def _clips(
  config: ml_collections.ConfigDict, folder: pathlib.Path
) -> list[dict[str, np.ndarray]]:
  """Reads all labelled clips of a folder once."""
  data = config.data.to_dict() | {'source': str(folder)}
  return list(pipeline.evaluation(data, batch_size=100))


def summary(report: dict[str, Any], config: ml_collections.ConfigDict) -> str:
  """Returns the last lines of the demo."""
  lines = [
    '',
    f'Which of {round(1 / report["chance"])} motions? Accuracy on '
    f'{report["test_clips"]} test clips with {report["probe_clips"]} labels, '
    f'chance {100 * report["chance"]:.0f} %:',
    f'  {"frozen features":45s} {"linear":>6s} (95 % interval)  20 neighbours',
  ]
  for name, row in report['accuracy'].items():
    low, high = row['interval']
    lines.append(
      f'  {name:45s} {100 * row["accuracy"]:5.1f} % '
      f'({100 * low:4.1f} to {100 * high:4.1f})  {100 * row["knn"]:10.1f} %'
    )
  folder, name = config.workdir, config.method.name
  program = pathlib.Path(sys.executable).name
  lines += [
    f'The encoder is in {folder}. To go on:',
    f'  {program} -c "import vssl_jax; print(vssl_jax.load(\'{folder}\'))"',
    f'  {program} -m vssl_jax.main --config=configs/{name}_single_gpu.py '
    '--config.data.source=<folder of videos> --plan',
    f'  {program} -m vssl_jax.main --config=configs/demo.py:{name} '
    '--config.seed=1 --config.workdir=runs/demo-1',
  ]
  return '\n'.join(lines)
