"""Small LayerLock runs, and what they leave behind."""

import json
import pathlib
import shutil

import jax

from vssl_jax import config as config_lib
from vssl_jax import trees
from vssl_jax.checkpoint import integrity, manager
from vssl_jax.methods import lock_schedule

SCHEDULE = '((0, 4), (1, 4), (2, 4))'


def tiny(clips, workdir, schedule=SCHEDULE, width=16):
  """Three blocks, the last of which decodes; some steps per lock."""
  c = config_lib.default('layerlock')
  c.workdir, c.batch_size = str(workdir), 8
  c.data.source = str(clips)
  c.data.frames, c.data.stride, c.data.size = 4, 1, (16, 16)
  c.data.isolate, c.data.decode_processes = False, 1
  m = c.method
  m.encoder.update(
    dict(size='Ti', width=width, depth=3, num_heads=2, mlp_width=2 * width)
  )
  m.vit.update(dict(patch=(2, 8, 8), dtype='float32'))
  m.decoder_blocks, m.masks = 1, 'random:0.75'
  m.schedule = schedule
  m.total = sum(n for _, n in lock_schedule.parse(schedule))
  m.rewarm = (0.5, 0.1)
  c.optim.update(dict(lr=1e-2, lr_start=0.0, lr_end=1e-4, lr_batch=8))
  c.optim.update(dict(warmup=2, weight_decay=0.5, weight_decay_end=0.5))
  c.optim.clip = 1.0
  c.checkpoint.update(dict(every=2, keep=100))
  c.log.update(dict(every=1, tensorboard=False))
  c.health.every = 0.0
  return c


def states(workdir):
  """Returns {step: the state saved after it}."""
  found = integrity.listing(pathlib.Path(workdir))
  return {s.step: s for s in found if 'opt' in s.shapes()}


def sums(saved):
  """Returns {name: sum of bits} of a state."""
  return {n: x['sum'] for n, x in saved.manifest['leaves'].items()}


def logged(workdir, key):
  text = (pathlib.Path(workdir) / 'metrics.jsonl').read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  return {x['step']: x[key] for x in lines if key in x}


def truncate(workdir, step):
  """Removes what came after a step."""
  for saved in integrity.listing(pathlib.Path(workdir)):
    if saved.step > step:
      shutil.rmtree(saved.path)
      saved.path.with_suffix('.json').unlink()


def read(saved, start):
  """Returns {name: array} of the leaves of a state that begin so."""
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shapes = trees.named_leaves(saved.shapes())
  return manager.read_leaves(
    saved,
    {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
      for name, x in shapes
      if name.startswith(start)
    },
  )


def named(leaves, *starts):
  return {
    n for n in leaves if n.startswith(tuple(f'params/{s}' for s in starts))
  }


# Blocks that each lock freezes, with what comes before them.
LOCKED = {1: ('encoder/embed', 'encoder/block_00')}
LOCKED[2] = (*LOCKED[1], 'encoder/block_01')
