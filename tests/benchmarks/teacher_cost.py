"""Processor seconds of a step by how the targets of its teachers are come by.

    python tests/benchmarks/teacher_cost.py --out=teacher_cost.jsonl
    python tests/benchmarks/teacher_cost.py --method=kdhiera \
      --out=teacher_cost.jsonl

The step asks its teachers under 1, 2 and 4 masks a clip, or reads from the
disk what they said (`cache_targets`; the files are in the page cache, as on a
machine with memory for them). Small widths for a CPU (those of pmd_terms.py)
and the last phase, which in PMD has the guide as well. Ways take turns, step
by step; a step's seconds are those of all threads of this process, so that
others on the machine hardly matter. Clips and parameters are random. Further
arguments are those of a config, such as
--config.method.image_teacher.encoder.depth=4.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile
import time

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from tests.benchmarks import pmd_terms
from vssl_jax import config as config_lib
from vssl_jax import encoder, methods, sharding
from vssl_jax.checkpoint import provenance
from vssl_jax.data import options
from vssl_jax.planning import timing
from vssl_jax.target_cache import store as store_lib
from vssl_jax.train import phase_setup
from vssl_jax.train import run as run_lib


def pmd(assignments):
  """Returns PMD of small widths, whose teachers are its own."""
  return pmd_terms.config('', assignments)


def kdhiera(assignments):
  """Returns KDHiera with the same teachers: a student of 192 channels too."""
  like = pmd_terms.config('', [])
  _, c = config_lib.load('configs/kdhiera_k400.py:B-self')
  c.batch_size = like.batch_size
  c.data.frames, c.data.size = like.data.frames, like.data.size
  c.data.repeats = like.data.repeats
  m = c.method
  m.vit.update(like.method.vit.to_dict())
  m.encoder.update(dict(size='T', channels=24))
  m.hiera.update(dict(stride=(2, 2, 2), dtype='float32'))
  for name in ('image', 'video'):
    m[name].dtype = 'float32'
    own = f'{name}_teacher'
    m[own].encoder.update(like.method[own].encoder.to_dict())
  return config_lib.override(c, assignments)


METHODS = {'pmd': pmd, 'kdhiera': kdhiera}


def prepare(config, masks, mesh):
  """Returns the last phase's step, ready to run, and its build."""
  config = config.copy_and_resolve_references()
  config.method.masks_per_clip = masks
  video = options.spec(config.data.to_dict()).shape
  phases = methods.build(config.method, video, encoder.module_of)
  span = run_lib.spans(phases)[-1]
  ready = timing.prepare(config, span, config.batch_size, video, mesh)
  cost = span.phase.cost(video)
  shapes = phase_setup.build(config, span, video, config.batch_size)
  return ready, cost, shapes


def asking(ready):
  """Returns a call that takes a step."""

  def step():
    ready.state, values = ready.compiled(
      ready.state, ready.teachers, ready.batch
    )
    jax.block_until_ready(values)

  return step


def reading(config, mesh, folder):
  """Returns a call that takes a step with targets from the disk."""
  config = config.copy_and_resolve_references()
  config.data.update(options.FIXED)
  config.cache_targets = str(folder)
  ready, _, shapes = prepare(config, 1, mesh)
  kept, size = shapes.cached, config.batch_size
  key = {'examples': size, 'targets': kept.stored}
  store = store_lib.Store(folder / 'kept', key)
  rng, index = np.random.default_rng(0), np.arange(size)
  store.write(
    index,
    {
      name: rng.normal(size=(size, *x.shape)).astype(x.dtype)
      for name, x in kept.shapes.items()
    },
  )
  teachers = {n: ready.teachers[n] for n in shapes.step_teachers}
  update = phase_setup.jitted(config, shapes, mesh)

  def batch():
    found = store.read(rng.permutation(index))
    targets = sharding.put_batch(found, mesh)
    return dataclasses.replace(ready.batch, targets=targets)

  compiled = update.lower(ready.state, teachers, batch()).compile()

  def step():
    ready.state, values = compiled(ready.state, teachers, batch())
    jax.block_until_ready(values)

  return step, store_lib.row_nbytes(kept.stored)


def measure(calls, steps):
  """Returns name -> processor seconds of each step; calls take turns."""
  found = {name: [] for name in calls}
  for number in range(steps + 1):
    for name, call in calls.items():
      start = time.process_time()
      call()
      if number:  # the first one warms up
        found[name].append(time.process_time() - start)
  return found


def main():
  """Measures, prints a row for each way, and adds a line to the file."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--method', choices=sorted(METHODS), default='pmd')
  parser.add_argument('--steps', type=int, default=10)
  parser.add_argument('--out', type=pathlib.Path)
  args, rest = parser.parse_known_args()
  config = METHODS[args.method]([x.removeprefix('--config.') for x in rest])
  mesh, calls, frozen = sharding.make_mesh(), {}, {}
  with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
    for masks in (1, 2, 4):
      ready, cost, _ = prepare(config, masks, mesh)
      calls[f'masks_{masks}'] = asking(ready)
      frozen[f'masks_{masks}'] = cost.frozen / cost.total
    calls['kept'], row = reading(config, mesh, pathlib.Path(folder))
    seconds = measure(calls, args.steps)
  one = statistics.median(seconds['masks_1'])
  results = {
    name: {
      'cpu_seconds': statistics.median(times),
      'quartiles': statistics.quantiles(times, n=4)[::2],
      'of_one_mask': statistics.median(times) / one,
      'frozen_share_of_flops': frozen.get(name),
    }
    for name, times in seconds.items()
  }
  for name, found in results.items():
    print(name, json.dumps(found))
  line = {
    'method': args.method,
    'batch_size': config.batch_size,
    'steps': args.steps,
    'bytes_per_clip': row,
    'results': results,
  } | provenance.describe({})
  if args.out:
    with args.out.open('a') as f:
      f.write(json.dumps(line) + '\n')


if __name__ == '__main__':
  main()
