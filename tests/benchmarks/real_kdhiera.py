"""KDHiera, interpretation of the abstract, on real video, small.

    python tests/benchmarks/real_kdhiera.py --data=<folder> --out=<file.jsonl>
    python tests/benchmarks/real_kdhiera.py --out=<file.jsonl> --table

The folder and the probes are those of `real_video.py`, the fine-tuning is that
of `real_pmd.py`. An image and a video teacher are trained once for each seed,
on the same videos; every run then has the same steps and clips. Finished cells
are not run again. Each cell is a process of its own.
"""

import json
import tempfile

import real_pmd
import real_video

# Units of 16 pixels: four of the sixteen of a time step are visible.
RATIO, PATCH = 0.75, (2, 8, 8)
# A kernel of 3 x 7 x 7 takes most of a step on a CPU.
SMALL = dict(
  stride=(2, 2, 2), kernel=(3, 3, 3), padding=(1, 1, 1), dtype='float32'
)
SHAPE = dict(size='Ti', width=96, depth=4, num_heads=4, mlp_width=384)
STUDENT = dict(channels=32, depths=(1, 2, 3, 1), num_heads=1)
LAST = dict(stages=(4,), image=dict(layers=(4,)), video=dict(layers=(4,)))
METHODS = {
  'Hiera-MAE': dict(objective='pixels', units='random', teachers=()),
  'KDHiera, last layer': LAST,
  'KDHiera, four layers': {},
  'KDHiera, four layers, random mask': dict(units='random'),
}
SEEDS = (0, 1, 2)


def cells():
  """Yields (name, seed) of every run."""
  names = (*METHODS, real_pmd.SCRATCH)
  yield from ((name, seed) for seed in SEEDS for name in names)


def config(seed, data, workdir):
  """Returns the config of a run that trains its teachers first."""
  from vssl_jax import config as config_lib

  c = config_lib.default('kdhiera')
  c.seed, c.workdir = seed, str(workdir)
  real_pmd.recipe(c, data, real_pmd.TEACHER_STEPS // 10)
  m = c.method
  m.vit.update(dict(patch=PATCH, dtype='float32'))
  head = dict(width=64, depth=1, num_heads=4)
  for name in ('image', 'video'):
    section = m[f'{name}_teacher']
    section.steps = real_pmd.TEACHER_STEPS
    section.encoder.update(SHAPE)
    section.decoder.update(head)
    m[name].update(dict(teacher=f'@{name}_teacher', dtype='float32'))
    m[name].layers = (1, 2, 3, 4)
  m.video_teacher.masks = 'tube:0.75'
  m.encoder.update(STUDENT)
  m.hiera.update(SMALL)
  m.decoder.update(dict(width=64, depth=2, num_heads=4))
  m.scores = 'column_mean'  # an MAE of our own has no class token
  m.drop_path, m.mask_ratio, m.steps = 0.0, RATIO, real_pmd.STEPS
  return c


def teachers(seed, shards):
  """Returns the folder of the run that trained the teachers of a seed."""
  from vssl_jax.train import loop

  folder = shards.with_name(f'{shards.name}-units-teachers-{seed}')
  c = config(seed, shards, folder)
  # The step that follows makes a run of it that has an end.
  c.method.steps, c.optim.warmup = 1, 0
  assert loop.train(c) == 0
  return folder


def tune(encode, data, seed, folder):
  """Returns right answers and clips of a fine-tuned Hiera's test."""
  from vssl_jax import config as config_lib
  from vssl_jax.evals.finetune import job

  _, c = config_lib.load('configs/finetune_fast.py')
  real_pmd.tuning(c, data, seed, folder)
  c.method.family = 'hiera'
  with c.unlocked():
    c.method.hiera.update(dict(**STUDENT, **SMALL))
  return real_pmd.tuned(job.evaluate(c, encode))


def run_cell(name, seed, data, shards):
  """Trains one cell under the seed's teachers, probes and fine-tunes it."""
  if name == real_pmd.SCRATCH:
    return real_pmd.scratch(tune, seed, data)
  made_by = teachers(seed, shards)
  with tempfile.TemporaryDirectory() as folder:
    c = config(seed, shards, folder)
    c.method.update(METHODS[name])
    return real_pmd.measured(name, c, data, made_by, tune)


def table(out):
  """Returns the lines of a Markdown table; cells not reached say so."""
  lines = [json.loads(x) for x in out.read_text().splitlines()]
  return real_pmd.rows(lines, (*METHODS, real_pmd.SCRATCH))


if __name__ == '__main__':
  real_video.main(__doc__, cells, run_cell, table)
