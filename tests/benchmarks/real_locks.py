"""LayerLock and its controls on real video, small; one line per run.

    python tests/benchmarks/real_locks.py --data=<folder> --out=<file.jsonl>
    python tests/benchmarks/real_locks.py --out=<file.jsonl> --table

The folder, the clips seen and the probes are those of `real_video.py`, with a
frozen depth readout within one room besides. Every run has the same steps and
clips. Finished cells are not run again. Each cell is a process of its own, and
leaves the picture of how its blocks drift beside the shards.
"""

import json
import pathlib
import tempfile
import time

import numpy as np
import real_video

STEPS = 1000
ROOM = 'rgbd_7scenes/redkitchen_a'
SPLITS = {'train': 'frames=0-699', 'test': 'frames=860-999'}
METHODS = {
  'MAE': dict(schedule=f'((0, {STEPS}),)'),
  'MAE, layers freeze': dict(target='pixels'),
  'LayerLock': {},
  'control: latent target, nothing frozen': dict(freeze=False),
  # As many visible tokens as at random.
  'control under block masks': dict(freeze=False, masks='short:10/40'),
}
SEEDS = (0, 1, 2)


def cells():
  """Yields (name, seed) of every run."""
  for seed in SEEDS:
    yield from ((name, seed) for name in METHODS)


def config(name, seed, data, workdir):
  """Returns the config of a run: twelve blocks, of which four decode."""
  from vssl_jax import config as config_lib

  c = config_lib.default('layerlock')
  c.seed, c.workdir, c.batch_size = seed, str(workdir), real_video.BATCH
  c.data.source = str(data)
  c.data.update(
    dict(
      frames=real_video.FRAMES,
      stride=2,
      size=(real_video.SIZE,) * 2,
      repeats=4,
      isolate=False,  # shards of our own making
    )
  )
  c.optim.update(dict(lr=1e-3, lr_start=0.0, lr_batch=real_video.BATCH))
  c.optim.update(dict(weight_decay=0.05, weight_decay_end=0.05, clip=1.0))
  c.optim.warmup = STEPS // 10
  c.checkpoint.every, c.log.every = 10_000, 200
  c.health.every = 0.05
  m = c.method
  m.vit.update(dict(patch=(2, 16, 16), dtype='float32', init='videomae'))
  c.data.update(dict(mean=(0.5,), std=(0.25,)))
  m.encoder.update(
    dict(size='Ti', width=96, depth=12, num_heads=4, mlp_width=384)
  )
  m.masks, m.total = 'random:0.85', STEPS
  m.update(METHODS[name])
  return c


def run_cell(name, seed, data, shards):
  """Trains one cell, probes it and reads depth from it."""
  from vssl_jax import encoder, methods
  from vssl_jax.checkpoint import provenance
  from vssl_jax.data import options
  from vssl_jax.train import loop
  from vssl_jax.utils import metrics
  from vssl_jax.visualize import weight_drift

  start = time.time()
  with tempfile.TemporaryDirectory() as folder:
    c = config(name, seed, shards, folder)
    assert loop.train(c) == 0
    trained = time.time()
    clip = (real_video.FRAMES, real_video.SIZE, real_video.SIZE, 3)
    phases = methods.build(c.method, clip, None, options.colours_of(c.data))
    flops = sum(p.cost(clip).total * p.steps * c.batch_size for p in phases)
    log = pathlib.Path(folder, metrics.FILE)
    health = [x for x in metrics.read(log) if 'health/feature_std' in x][-1]
    weight_drift.save(shards.with_name(f'drift-{name}-{seed}.png'), log)
    looks = weight_drift.read(log)
    encode = encoder.load(folder)
    sets = {
      s: real_video.probe(encode, data / s, stride)
      for s, stride in real_video.SETS.items()
    }
    found = depth(encode, data, folder)
  return {
    'cell': name,
    'seed': seed,
    'sets': sets,
    'depth': found,
    'flops': flops,
    'feature_std': health['health/feature_std'],
    'token_variance': health['health/token_variance'],
    'drift': {  # change of each block in 100 steps, by stretch of steps
      'edges': looks.edges.tolist(),
      'rates': np.round(looks.rates, 5).tolist(),
    },
    'steps': STEPS,
    'clips': STEPS * real_video.BATCH,
    'train_seconds': round(trained - start, 1),
    'cpu_seconds': round(time.process_time(), 1),
    **provenance.describe(),
  }


def depth(encode, data, folder):
  """Returns the figures of a frozen depth readout within one room."""
  from vssl_jax import config as config_lib
  from vssl_jax.evals.depth import job as job_lib

  _, c = config_lib.load('configs/depth_fast.py')
  c.data.frames, c.data.stride, c.data.size = 8, 2, (64, 64)
  room = str(data / ROOM)
  c.probe.train, c.probe.train_where = (room,), SPLITS['train']
  c.probe.test, c.probe.test_where = (room,), SPLITS['test']
  c.data.isolate, c.workdir, c.probe.pictures = False, str(folder), 0
  found = job_lib.evaluate(c, encode)['results']
  return {
    row: {k: float(found[row][k]) for k in ('abs_rel', 'delta_1')}
    for row in ('selected', 'mean')
  }


def table(out):
  """Returns the lines of a Markdown table; cells not reached say so."""
  lines = [json.loads(x) for x in out.read_text().splitlines()]
  heads = [*real_video.SETS, 'AbsRel', 'TFLOP', 'seconds', 'feature std']
  rows = ['| run | ' + ' | '.join(heads) + ' |', '|---' * (7) + '|']
  for name in METHODS:
    found = [x for x in lines if x['cell'] == name]
    shown = [
      real_video._cell([x['sets'][s] for x in found]) for s in real_video.SETS
    ]
    if found:
      figures = {
        'AbsRel': [x['depth']['selected']['abs_rel'] for x in found],
        'TFLOP': [x['flops'] / 1e12 for x in found],
        'seconds': [x['train_seconds'] for x in found],
        'feature std': [x['feature_std'] for x in found],
      }
      shown += [_range(x) for x in figures.values()]
    else:
      shown += ['not run'] * 4
    rows.append(f'| {name} | ' + ' | '.join(shown) + ' |')
  return '\n'.join(rows)


def _range(values):
  """Returns the mean of the seeds, and the lowest and highest."""
  low, high = min(values), max(values)
  if f'{low:.3g}' == f'{high:.3g}':
    return f'{low:.3g}'
  return f'{np.mean(values):.3g} ({low:.3g} to {high:.3g})'


if __name__ == '__main__':
  real_video.main(__doc__, cells, run_cell, table)
