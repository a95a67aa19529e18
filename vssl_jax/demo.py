"""The demo: the job of `python -m vssl_jax.main` without flags.

It writes labelled video files, pretrains on them as on any folder of videos,
and evaluates the frozen encoder with probes. Baselines are the same encoder
before training and features without training. The classes are kinds of motion,
so single frames carry no information about them.
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
from vssl_jax import encoder as encoder_lib
from vssl_jax.checkpoint import provenance
from vssl_jax.data import pipeline
from vssl_jax.data.tools import synthetic
from vssl_jax.evals import features
from vssl_jax.evals.probe import linear, train_heads
from vssl_jax.train import loop, rewind
from vssl_jax.utils import config_io, knn
from vssl_jax.visualize import mask_pictures, weight_drift

# Number of videos for pretraining, for training the probe, and for testing it.
CLIPS = {'pretrain': 2560, 'train': 400, 'test': 1000}
OWN = 'written by the demo'  # data.source until the videos are written
SCENE: dict[str, Any] = {}


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """Returns the demo's config.

  Args:
    variant: the method; '' for `salt`.

  Raises:
    ValueError: there is no demo of that method.
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
  # Enough epochs for random features too, whose classes are hard to separate.
  c.probe.update(dict(protocol='linear', epochs=100, batch_size=64))
  c.probe.update(dict(lrs=(1e-1, 3e-2, 1e-2, 3e-3), wds=(0.01,)))
  return c


def _data(c: ml_collections.ConfigDict) -> None:
  """Sets the data keys: full clips as written, without crop or flip."""
  c.data.source = OWN
  c.data.update(dict(frames=8, stride=1, size=(32, 32)))
  c.data.update(dict(crop='centre', flip=False))
  # Worker processes are not needed: decoding our own files does not hang.
  c.data.isolate = False


def _salt(c: ml_collections.ConfigDict) -> None:
  """Sets the SALT keys: a teacher and a student that train in a minute each.

  Differences from the paper: sizes; sin-cos positions and Glorot
  initialisation; one mask per step, and one mask token; and the teacher's mask,
  which is the causal mask of the paper's ablation. The teacher sees the first
  half of the clip and predicts the second. SALT's blocks are masked in every
  frame, so the tokens next to a block suffice to predict it at any time,
  without features of motion. Probe accuracy after as many steps: 20 % with
  SALT's masks, 30 % at random initialisation, 69 % with the causal mask. The
  student's mask is SALT's short one. Glorot initialisation makes the random
  encoder a stronger baseline than V-JEPA's initialisation (30 against 18 %).
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


def _layerlock(c: ml_collections.ConfigDict) -> None:
  """Sets the LayerLock keys: half of the run on pixels, then three locks.

  The mask is causal, for the same reason as for SALT's teacher. Probe accuracy
  after as many steps: 15 % with random masks (mask_ratio .85), 18 % at random
  initialisation, 60 % with the causal mask. Pixels are centred: with pixels in
  [0, 1], as in 4DS, the same steps learned nothing (loss .99 of 1). The blocks
  do not converge in the order of depth, as reported for large models
  (`drift.png` of seed 0): all slow down with the learning rate.
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
  """Sets the keys of teachers that the run trains in its first phases.

  Args:
    c: the demo's config.
    depth: number of blocks of a teacher.
    **steps: teacher -> number of steps.

  Returns:
    The keys of the teachers' encoders and of their decoders.
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
  """Sets the PMD keys: two teachers from scratch, then four rising mask ratios.

  The video teacher's mask is causal, for the same reason as SALT's. The image
  teacher sees single frames and cannot learn motion. A frame has 16 positions
  here: 8, 6, 4 and 2 of them are visible, where the published ratios would give
  4, 4, 3 and 2. The window of the example memory is one epoch.
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
  """Sets the KDHiera keys: two teachers from scratch, then a Hiera student.

  The teachers are PMD's with one more block, so that each of the four stages
  has a target layer. A unit is 16 pixels, because a frame has 32: the
  convolution has a stride of 2 instead of 4 and a kernel of 3 pixels instead of
  7. Two of the four units of a time step are visible. An image teacher of so
  few steps attends to all units equally, which the run logs. Fewer steps are
  too few: with 1,200 for the video teacher (its probe at 30 %) and 250 for the
  student, every cosine is above .94, which is the part that all tokens of a
  clip share, and the student's probe is at 11 %.
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


def run(
  config: ml_collections.ConfigDict, back: rewind.Rewind | None = None
) -> int:
  """Writes the videos, pretrains, probes and prints; returns the exit status.

  Args:
    config: the demo's config.
    back: see `loop.train`.

  Raises:
    ValueError: `data.source` names other videos.
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
  status = loop.train(config, back, defaults=config_lib.defaults(config))
  if status:
    return status
  weight_drift.save_in(config.workdir)
  mask_pictures.save_in(config.workdir)
  report = measure(config, videos)
  (workdir / 'demo.json').write_text(json.dumps(report, indent=1))
  print(summary(report, config))
  return 0


def measure(
  config: ml_collections.ConfigDict, videos: pathlib.Path
) -> dict[str, Any]:
  """Evaluates the run's encoders and the baselines with probes.

  Args:
    config: config of the finished run.
    videos: folder with the labelled `train` and `test` videos.

  Returns:
    A JSON-compatible report: accuracies by encoder, chance, number of clips,
    provenance.
  """
  parts = encoder_lib.parts(config.workdir)
  trained = {
    name: encoder_lib.load(f'{config.workdir}@{name}') for name in parts
  }
  last_phase = [name for name in parts if '/' not in name][-1]
  encoders = {
    **{
      f'{name} ({"average" if "/" in name else "trained"})': encoder
      for name, encoder in trained.items()
    },
    f'{last_phase} at random initialisation': encoder_lib.random(
      trained[last_phase], config.seed
    ),
    'raw pixels': features.pixels,
    'motion energy': features.motion_energy,
    'a single frame': features.middle_frame,
  }
  batches = {
    split: _clips(config, videos / split) for split in ('train', 'test')
  }
  classes = len(synthetic.MOTIONS)
  fields = [f.name for f in dataclasses.fields(train_heads.Settings)]
  settings = train_heads.Settings(**{n: config.probe[n] for n in fields})
  rows = {}
  for name, encoder_fn in encoders.items():
    train, test = (
      features.table(encoder_fn, batches[split], pool=True)
      for split in ('train', 'test')
    )
    results = linear.fit(
      train,
      test,
      classes=classes,
      settings=settings,
      batch_size=config.probe.batch_size,
    )
    rows[name] = results.summary()['selected']
    rows[name]['knn'] = knn.accuracy(
      train.tokens[:, 0], train.label, test.tokens[:, 0], test.label
    )
  return {
    'accuracy': rows,
    'chance': 1 / classes,
    'test_clips': CLIPS['test'],
    'probe_clips': CLIPS['train'],
    'provenance': provenance.describe(config_io.to_json(config)),
  }


def _clips(
  config: ml_collections.ConfigDict, folder: pathlib.Path
) -> list[dict[str, np.ndarray]]:
  """Loads all labelled clips of a folder once."""
  data = config.data.to_dict() | {'source': str(folder)}
  return list(pipeline.evaluation(data, batch_size=100))


def summary(report: dict[str, Any], config: ml_collections.ConfigDict) -> str:
  """Formats the results and the commands to continue with."""
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
    f'The encoder is in {folder}. Next steps:',
    f'  {program} -c "import vssl_jax; print(vssl_jax.load(\'{folder}\'))"',
    f'  {program} -m vssl_jax.main --config=configs/{name}_single_gpu.py '
    '--config.data.source=<folder of videos> --plan',
    f'  {program} -m vssl_jax.main --config=configs/demo.py:{name} '
    '--config.seed=1 --config.workdir=runs/demo-1',
  ]
  return '\n'.join(lines)
