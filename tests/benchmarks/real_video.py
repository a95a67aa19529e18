"""Small pretraining runs on real video, probed by folds; one line per run.

    python tests/benchmarks/real_video.py --data=<folder> --out=<file.jsonl>
    python tests/benchmarks/real_video.py --out=<file.jsonl> --table

The folder holds folders of videos (`PRETRAIN`), of which `SETS` have a
`labels.csv` (path, label, fold, ...) whose folds keep what belongs together
apart: the recording day, the person. Every run sees the same number of clips
of all videos, without labels; the probes' clips are among them. Finished
cells are not run again. Each cell is a process of its own.
"""

import argparse
import csv
import json
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

SIZE, FRAMES, BATCH = 64, 8, 16
STEPS = 1000
PRETRAIN = ('skate_tricks_128', 'weizmann4_64', 'test_assets')
SETS = {'skate_tricks_128': 2, 'weizmann4_64': 2}  # stride of the probe's clips
TEACHERS = {'tiny': (64, 2), 'small': (96, 3), 'equal': (128, 4)}
SPLITS = {'1:3': 0.25, '1:1': 0.5}
DEFAULT = ('equal', '1:3')  # what the row `salt` is
SEEDS = (0, 1, 2)
BASELINES = ('pixels', 'motion')  # without a seed


def cells():
  """Yields (name, seed) of every run, the comparison first."""
  yield from ((name, 0) for name in BASELINES)
  for seed in SEEDS:
    yield from ((name, seed) for name in ('salt', 'videomae', 'vjepa'))
    yield 'random', seed
  for teacher in TEACHERS:
    for split in SPLITS:
      if (teacher, split) != DEFAULT:
        yield f'salt {teacher} {split}', 0


def config(name, seed, data, workdir):
  """Returns the config of a pretraining run."""
  from vssl_jax import config as config_lib

  c = config_lib.default('salt')
  c.seed, c.workdir, c.batch_size = seed, str(workdir), BATCH
  c.data.source = str(data)
  c.data.update(dict(frames=FRAMES, stride=2, size=(SIZE, SIZE), repeats=4))
  c.data.isolate = False  # shards of our own making
  c.optim.update(dict(lr=1e-3, lr_start=1e-4, lr_batch=BATCH, clip=1.0))
  c.optim.update(dict(weight_decay=0.05, weight_decay_end=0.05))
  c.checkpoint.every, c.log.every = 10_000, 200
  c.method.vit.update(dict(patch=(2, 16, 16), dtype='float32', init='videomae'))
  for section in ('pixel_teacher', 'latent_student'):
    c.method[section].encoder.update(_shape(128, 4))
    c.method[section].update(dict(masks='short:24/32', mask_tokens=1))
  head = dict(width=64, depth=2, num_heads=4)
  c.method.pixel_teacher.decoder.update(head)
  c.method.latent_student.predictor.update(head)
  teacher, student = c.method.pixel_teacher, c.method.latent_student
  method, *rest = name.split()
  if method == 'videomae':
    c.method.phases = ('pixel_teacher',)
    c.method.vit.update(dict(positions='sinusoid_1d', qkv_bias='qv'))
    teacher.decoder.kind = 'videomae'
    teacher.steps, teacher.masks, teacher.mask_tokens = STEPS, 'tube:0.75', 1
  elif method == 'vjepa':
    c.method.phases = ('latent_student',)
    student.steps, student.teacher, student.ema = (
      STEPS,
      '@ema/encoder',
      (
        0.99,
        1.0,
      ),
    )
  else:
    size, split = rest or DEFAULT
    teacher.encoder.update(_shape(*TEACHERS[size]))
    teacher.steps = round(SPLITS[split] * STEPS)
    student.steps = STEPS - teacher.steps
  return c


def _shape(width, depth):
  return dict(
    size='Ti', width=width, depth=depth, num_heads=4, mlp_width=4 * width
  )


def prepare(data, shards):
  """Writes all videos once at the size of the runs; killed, it goes on."""
  source = ','.join(str(data / name) for name in PRETRAIN)
  module = [sys.executable, '-m', 'vssl_jax.data.tools.prepare']
  flags = [f'--short_side={SIZE}', '--gop=8', f'--out={shards}']
  subprocess.run([*module, f'--source={source}', *flags], check=True)


def run_cell(name, seed, data, shards):
  """Trains one cell, or takes a baseline, and probes it."""
  from vssl_jax import encoder
  from vssl_jax.checkpoint import provenance
  from vssl_jax.evals import features
  from vssl_jax.train import loop

  start = time.time()
  with tempfile.TemporaryDirectory() as folder:
    untrained = name == 'random' or name in BASELINES
    c = config('salt' if untrained else name, seed, shards, folder)
    baselines = {'pixels': features.pixels, 'motion': features.motion_energy}
    if name in baselines:
      encode = baselines[name]
    elif name == 'random':
      encode = _untrained(c)
    else:
      assert loop.train(c) == 0
      average = '@latent_student/encoder' if name == 'vjepa' else ''
      encode = encoder.load(folder + average)
    trained = time.time()
    sets = {s: probe(encode, data / s, stride) for s, stride in SETS.items()}
  return {
    'cell': name,
    'seed': seed,
    'sets': sets,
    'steps': 0 if untrained else STEPS,
    'clips': 0 if untrained else STEPS * BATCH,
    'train_seconds': round(trained - start, 1),
    'probe_seconds': round(time.time() - trained, 1),
    'cpu_seconds': round(time.process_time(), 1),
    **provenance.describe(),
  }


def _untrained(c):
  """Returns the comparison's encoder with its first values."""
  import jax

  from vssl_jax import encoder, methods

  clip = (FRAMES, SIZE, SIZE, 3)
  module = methods.build(c.method, clip, None)[-1].encoder
  video = np.zeros((1, *clip), np.uint8)
  params = module.init(jax.random.key(c.seed), video)['params']
  return encoder.Encoder(module, params, 'random', clip)


def probe(encode, folder, stride):
  """Returns accuracy over all folds, each tested by the others' probe."""
  from vssl_jax.data import options, pipeline
  from vssl_jax.evals import features
  from vssl_jax.evals.probe import linear
  from vssl_jax.evals.probe import train_heads as train_heads_lib

  data = options.default()
  data.update(dict(source=str(folder / 'labels.csv'), label_column='label'))
  data.update(dict(frames=FRAMES, stride=stride, size=(SIZE, SIZE)))
  batches = pipeline.evaluation(data.to_dict(), batch_size=32)
  table = features.table(encode, batches, pool=True)
  with (folder / 'labels.csv').open() as file:
    folds = np.asarray([row['fold'] for row in csv.DictReader(file)])
  folds = folds[table.index]
  # One head: nothing is chosen on the clips it is tested on.
  settings = train_heads_lib.Settings(
    epochs=100, lrs=(1e-2,), wds=(1e-2,), holdout=0.0
  )
  right, count = {}, {}
  for fold in np.unique(folds):
    found = linear.fit(
      table.take(folds != fold),
      table.take(folds == fold),
      classes=int(table.label.max()) + 1,
      settings=settings,
      batch_size=32,
    )
    right[str(fold)] = int(found.correct[0])
    count[str(fold)] = int(found.total)
  return {'right': right, 'count': count}


def table(out):
  """Returns the lines of a Markdown table; cells not reached say so."""
  lines = [json.loads(x) for x in out.read_text().splitlines()]
  rows = ['| run | ' + ' | '.join(SETS) + ' |', '|---' * (1 + len(SETS)) + '|']
  for name in dict.fromkeys(n for n, _ in cells()):
    found = [x for x in lines if x['cell'] == name]
    shown = [_cell([x['sets'][s] for x in found]) for s in SETS]
    rows.append(f'| {name} | ' + ' | '.join(shown) + ' |')
  return '\n'.join(rows)


def _cell(found):
  """Returns mean accuracy, an interval over folds, and the seeds."""
  if not found:
    return 'not run'
  folds = [
    [x['right'][f] / x['count'][f] for x in found] for f in found[0]['right']
  ]
  accuracy = [
    sum(x['right'].values()) / sum(x['count'].values()) for x in found
  ]
  per_fold = np.mean(folds, axis=1)
  rng = np.random.default_rng(0)
  draws = rng.choice(per_fold, (10_000, len(per_fold))).mean(axis=1)
  low, high = 100 * np.percentile(draws, [2.5, 97.5])
  seeds = f'{len(found)} seed' + 's' * (len(found) > 1)
  return (
    f'{100 * np.mean(accuracy):.0f} (folds {low:.0f} to {high:.0f}; {seeds})'
  )


def main(describe, cells, run_cell, table):
  """Runs the cells that are missing, or prints the table.

  Args:
    describe: what `--help` says.
    cells: () -> (name, seed) of every run.
    run_cell: (name, seed, data, shards) -> its line.
    table: file of lines -> Markdown.
  """
  parser = argparse.ArgumentParser(description=describe)
  parser.add_argument('--data', type=pathlib.Path)
  parser.add_argument('--out', type=pathlib.Path, required=True)
  parser.add_argument('--shards', type=pathlib.Path)
  parser.add_argument('--table', action='store_true')
  parser.add_argument('--seconds', type=float, default=float('inf'))
  parser.add_argument('--cell', nargs=2, metavar=('NAME', 'SEED'))
  args = parser.parse_args()
  if args.table:
    print(table(args.out))
    return
  shards = args.shards or args.out.with_suffix('.shards')
  if args.cell:
    name, seed = args.cell
    line = run_cell(name, int(seed), args.data, shards)
    with args.out.open('a') as file:
      file.write(json.dumps(line) + '\n')
    return
  prepare(args.data, shards)
  end = time.time() + args.seconds
  done = set()
  if args.out.exists():
    lines = map(json.loads, args.out.read_text().splitlines())
    done = {(x['cell'], x['seed']) for x in lines}
  for name, seed in cells():
    if (name, seed) not in done and time.time() < end:
      again = [*sys.argv, '--cell', name, str(seed)]
      subprocess.run([sys.executable, *again], check=True)


if __name__ == '__main__':
  main(__doc__, cells, run_cell, table)
