"""PMD's parts on real video, small; one line per run.

    python tests/benchmarks/real_pmd.py --data=<folder> --out=<file.jsonl>
    python tests/benchmarks/real_pmd.py --out=<file.jsonl> --table

The folder and the probes are those of `real_video.py`; the comparison is
fine-tuned besides, on some persons' clips, and tested on others'. An image and
a video teacher are trained once for each seed, on the same videos; every run
then has the same steps and clips under these teachers. Finished cells are not
run again. Each cell is a process of its own.
"""

import json
import pathlib
import tempfile
import time
import zlib

import real_video

STEPS, TEACHER_STEPS = 600, 500
# A picture has 16 positions: 8, 6, 4 and 2 of them are visible.
RATIOS = (0.5, 0.625, 0.75, 0.875)
WINDOW = 30  # steps, two epochs
PATCH = (2, 16, 16)
SHAPE = dict(size='Ti', width=96, depth=6, num_heads=4, mlp_width=384)
NONE = dict(lambda_pg=0.0, lambda_df=0.0, lambda_al=0.0)
FIRST = ('base', 'all')  # of three seeds and fine-tuned; the others of one
TUNED, SPLIT = 'weizmann4_64', {'train': 'fold!=0,1,2', 'test': 'fold=0,1,2'}
SCRATCH = 'from scratch'
METHODS = {
  'base': NONE,
  '+PSD': NONE | dict(lambda_pg=0.05),
  '+DARE, smoothing only': NONE | dict(lambda_df=1.0, dare='smooth'),
  '+DARE, weights only': NONE | dict(lambda_df=1.0, dare='weights'),
  '+DARE': NONE | dict(lambda_df=1.0),
  '+CLFA': NONE | dict(lambda_al=1.0),
  'all': {},
  'all, image teacher': dict(teachers=('image',)),
  'all, video teacher': dict(teachers=('video',)),
  'all, one phase': dict(mask_ratios=(0.875,)),
  'all, two phases': dict(mask_ratios=(0.5, 0.875)),
  'all, three phases': dict(mask_ratios=(0.5, 0.75, 0.875)),
  'MVD (one phase, smooth L1)': NONE
  | dict(mask_ratios=(0.875,), feature_loss='smooth_l1'),
}
SEEDS = (0, 1, 2)


def cells():
  """Yields (name, seed) of every run, those of the first seed first."""
  first = (*FIRST, SCRATCH)
  yield from ((name, 0) for name in dict.fromkeys((*first, *METHODS)))
  yield from ((name, seed) for seed in SEEDS[1:] for name in first)


def recipe(c, data, warmup):
  """Fills in what the runs of every method share."""
  c.batch_size, c.data.source = real_video.BATCH, str(data)
  c.data.update(dict(frames=real_video.FRAMES, stride=2, flip=False))
  c.data.size = (real_video.SIZE,) * 2
  c.data.crop = 'multi_scale'
  c.data.isolate = False  # shards of our own making
  c.optim.update(dict(lr=1e-3, lr_start=0.0, lr_end=1e-5, clip=1.0))
  c.optim.update(dict(lr_batch=real_video.BATCH, warmup=warmup))
  c.optim.update(dict(weight_decay=0.05, weight_decay_end=0.05))
  c.checkpoint.every, c.log.every = 10_000, 200


def config(seed, data, workdir):
  """Returns the config of a run that trains its teachers first."""
  from vssl_jax import config as config_lib

  c = config_lib.default('pmd')
  c.seed, c.workdir = seed, str(workdir)
  recipe(c, data, TEACHER_STEPS // 10)
  m = c.method
  m.vit.update(dict(patch=PATCH, dtype='float32'))
  head = dict(width=64, depth=1, num_heads=4)
  for name in ('image', 'video'):
    section = m[f'{name}_teacher']
    section.steps = TEACHER_STEPS
    section.encoder.update(SHAPE)
    section.decoder.update(head)
    m[name].update(dict(teacher=f'@{name}_teacher', dtype='float32'))
  m.video_teacher.masks = 'tube:0.75'
  m.encoder.update(SHAPE)
  m.decoder.update(head)
  m.drop_path, m.previous_dtype, m.window = 0.0, 'float32', WINDOW
  m.mask_ratios = RATIOS
  return c


def teachers(seed, shards):
  """Returns the folder of the run that trained the teachers of a seed."""
  from vssl_jax.train import loop

  folder = shards.with_name(f'{shards.name}-teachers-{seed}')
  c = config(seed, shards, folder)
  # The step that follows makes a run of it that has an end.
  c.method.update(NONE | dict(mask_ratios=(0.5,), steps=(1,)))
  c.optim.warmup = 0
  assert loop.train(c) == 0
  return folder


def tuning(c, data, seed, folder):
  """Fills in what every fine-tuning shares."""
  c.seed, c.workdir = seed, str(folder)
  c.data.update(dict(frames=8, stride=2, size=(real_video.SIZE,) * 2))
  c.data.update(dict(label_column='label', isolate=False))
  labels = (str(data / TUNED / 'labels.csv'),)
  c.finetune.update(dict(train=labels, valid=labels, test=labels))
  c.finetune.train_where = SPLIT['train']
  c.finetune.valid_where = c.finetune.test_where = SPLIT['test']
  c.finetune.update(dict(batch_size=8, epochs=40, clips=1))


def tuned(found):
  """Returns right answers and clips of a fine-tuning's report.

  The last epoch's: with so few clips nothing is chosen by them.
  """
  last, total = found['history'][-1], found['test']['evaluated']
  return {'right': round(last['accuracy'] * total), 'count': total}


def tune(encode, data, seed, folder):
  """Returns right answers and clips of a fine-tuned encoder's test."""
  from vssl_jax import config as config_lib
  from vssl_jax.evals.finetune import job

  _, c = config_lib.load('configs/finetune_fast.py')
  tuning(c, data, seed, folder)
  c.method.encoder.update(SHAPE)
  c.method.vit.update(dict(patch=PATCH, positions='sincos_3d_mvd'))
  return tuned(job.evaluate(c, encode))


def spent(c, folder):
  """Returns a run's FLOPs, and the last line of its log."""
  from vssl_jax import encoder, methods

  clip = (real_video.FRAMES, real_video.SIZE, real_video.SIZE, 3)
  phases = methods.build(c.method, clip, encoder.module_of)
  flops = sum(p.cost(clip).total * p.steps * c.batch_size for p in phases)
  log = pathlib.Path(folder, 'metrics.jsonl').read_text().splitlines()
  logged = [x for x in map(json.loads, log) if ' loss/' in ' '.join(x)]
  return flops, {k: x for k, x in logged[-1].items() if '/' in k}


def scratch(tune, seed, data):
  """Returns the line of a fine-tuning that begins at random."""
  from vssl_jax.checkpoint import provenance

  with tempfile.TemporaryDirectory() as folder:
    right = tune(None, data, seed, folder)
  return {'cell': SCRATCH, 'seed': seed, 'tuned': right} | provenance.describe()


def fingerprint(encode):
  """Returns a number of an encoder's values: other runs have another."""
  import jax
  import numpy as np

  leaves = jax.tree.leaves(encode.params)
  return zlib.crc32(b''.join(np.asarray(x).tobytes() for x in leaves))


def measured(name, c, data, made_by, tune):
  """Trains under a folder's teachers, probes, and returns the line of it.

  Args:
    name: of the cell.
    c: config of the run, but for its teachers.
    data: folder of the videos.
    made_by: folder of the run that trained the teachers.
    tune: how it is fine-tuned; None for not.
  """
  from vssl_jax import encoder
  from vssl_jax.checkpoint import provenance
  from vssl_jax.train import loop

  start = time.time()
  for teacher in ('image', 'video'):
    c.method[teacher].teacher = f'{made_by}@{teacher}_teacher'
  c.optim.warmup = STEPS // 10
  assert loop.train(c) == 0
  seconds = time.time() - start
  flops, last = spent(c, c.workdir)
  encode, right = encoder.load(c.workdir), None
  if tune:
    with tempfile.TemporaryDirectory() as folder:
      right = tune(encode, data, c.seed, folder)
  sets = {
    s: real_video.probe(encode, data / s, stride)
    for s, stride in real_video.SETS.items()
  }
  return {
    'cell': name,
    'seed': c.seed,
    'sets': sets,
    'tuned': right,
    'encoder': fingerprint(encode),
    'flops': flops,
    'last': last,
    'steps': STEPS,
    'clips': STEPS * real_video.BATCH,
    'train_seconds': round(seconds, 1),
    'cpu_seconds': round(time.process_time(), 1),
    **provenance.describe(),
  }


def run_cell(name, seed, data, shards):
  """Trains one cell under the seed's teachers, probes and fine-tunes it."""
  if name == SCRATCH:
    return scratch(tune, seed, data)
  made_by = teachers(seed, shards)
  with tempfile.TemporaryDirectory() as folder:
    c = config(seed, shards, folder)
    # Layers of so small a teacher reach hundreds: tau is for losses of order 1.
    c.method.target_norm = c.method.align_norm = 'ln'
    c.method.update(METHODS[name])
    ratios = c.method.mask_ratios
    c.method.steps = (STEPS // len(ratios),) * len(ratios)
    return measured(name, c, data, made_by, tune if name in FIRST else None)


def rows(lines, names):
  """Returns the lines of a Markdown table of some cells."""
  heads = [*real_video.SETS, 'fine-tuned', 'TFLOP']
  found = ['| run | ' + ' | '.join(heads) + ' |', '|---' * 5 + '|']
  for name in names:
    of = [x for x in lines if x['cell'] == name]
    probed = [x['sets'] for x in of if 'sets' in x]
    shown = [real_video._cell([x[s] for x in probed]) for s in real_video.SETS]
    tunings = [x['tuned'] for x in of if x['tuned']]
    right, count = (sum(x[k] for x in tunings) for k in ('right', 'count'))
    shown.append(f'{right} of {count}' if tunings else 'not run')
    flops = [x['flops'] for x in of if 'flops' in x]
    shown.append(f'{flops[0] / 1e12:.1f}' if flops else 'not run')
    found.append(f'| {name} | ' + ' | '.join(shown) + ' |')
  return '\n'.join(found)


def table(out):
  """Returns the lines of a Markdown table; cells not reached say so."""
  lines = [json.loads(x) for x in out.read_text().splitlines()]
  return rows(lines, (*METHODS, SCRATCH))


if __name__ == '__main__':
  real_video.main(__doc__, cells, run_cell, table)
