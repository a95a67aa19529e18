"""Seconds that a lock's step takes to compile, unrolled and in loops.

    python tests/benchmarks/compile_locks.py --out=compile_locks.json

ViT-G (48 blocks, 33 phases) and ViT-e (56 blocks, 38 phases) at the settings
of configs/layerlock_2b.py and configs/layerlock_4b.py, from shapes: nothing is
allocated, and the compiler is that of this machine. Every step is compiled
cold, and again from the persistent cache as a restarted run does. A run's total
is the mean over the locks measured times its phases, and is compared with the
hours that the published run takes on 256 TPU v5p at 40 % of their peak.
Processor seconds are those of all threads: on a busy machine they are what
counts, and wall seconds say how busy it was.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time

import jax
from jax.experimental.compilation_cache import compilation_cache

from vssl_jax import config as config_lib
from vssl_jax import encoder, methods, sharding
from vssl_jax.checkpoint import provenance
from vssl_jax.data import options
from vssl_jax.train import phase_setup
from vssl_jax.train import run as run_lib
from vssl_jax.utils import metrics

PAGES = {'G': 'configs/layerlock_2b.py', 'e': 'configs/layerlock_4b.py'}
DEVICES, SHARE = 256, 0.4


def compile_once(config, span, video, mesh):
  """Returns seconds to trace and to compile, and processor seconds of both."""
  jax.clear_caches()
  start, cpu = time.perf_counter(), time.process_time()
  shapes = phase_setup.build(config, span, video)
  lowered = phase_setup.lower(config, shapes, video, mesh)
  traced = time.perf_counter()
  lowered.compile()
  return {
    'trace_seconds': traced - start,
    'compile_seconds': time.perf_counter() - traced,
    'cpu_seconds': time.process_time() - cpu,
  }


def measure(size, layout, locks, mesh):
  """Yields a row for every lock that is measured."""
  _, config = config_lib.load(PAGES[size])
  config.batch_size = 1
  config.method.layout = layout
  video = options.spec(config.data.to_dict()).shape
  phases = methods.build(config.method, video, encoder.module_of)
  spans = run_lib.spans(phases)
  for share in locks:
    span = spans[round(share * (len(spans) - 1))]
    head = {'size': size, 'layout': layout, 'lock_depth': span.phase.lock_depth}
    for start in ('cold', 'warm'):
      yield head | {
        'start': start,
        **compile_once(config, span, video, mesh),
      }


def run_seconds(size):
  """Returns the seconds of the published run, and its phases."""
  _, config = config_lib.load(PAGES[size])
  video = options.spec(config.data.to_dict()).shape
  phases = methods.build(config.method, video, encoder.module_of)
  flops = sum(p.steps * p.cost(video).total for p in phases)
  peak = metrics.peak_flops(kind='TPU v5p') * DEVICES
  return flops * config.batch_size / (SHARE * peak), len(phases)


def summarise(rows):
  """Returns what a whole run compiles, for every size and layout."""
  out = []
  for size, layout in dict.fromkeys((r['size'], r['layout']) for r in rows):
    seconds, phases = run_seconds(size)
    found = {'size': size, 'layout': layout, 'phases': phases}
    found['run_hours'] = seconds / 3600
    for start in ('cold', 'warm'):
      each = [
        r['cpu_seconds']
        for r in rows
        if (r['size'], r['layout'], r['start']) == (size, layout, start)
      ]
      if each:
        found[f'{start}_cpu_seconds_per_lock'] = statistics.mean(each)
        found[f'{start}_cpu_minutes'] = phases * statistics.mean(each) / 60
        found[f'{start}_share_of_run'] = (
          phases * statistics.mean(each) / seconds
        )
    out.append(found)
  return out


def main():
  """Measures, prints and writes after every step."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--out', required=True)
  parser.add_argument('--sizes', default='G,e')
  parser.add_argument('--layouts', default='loops,unrolled')
  parser.add_argument('--locks', default='0,0.5,1', help='shares of the phases')
  args = parser.parse_args()
  mesh = sharding.make_mesh()
  locks, rows = [float(x) for x in args.locks.split(',')], []
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  for layout in args.layouts.split(','):
    for size in args.sizes.split(','):
      with tempfile.TemporaryDirectory() as cache:
        jax.config.update('jax_compilation_cache_dir', cache)
        compilation_cache.reset_cache()  # it keeps the folder it began with
        for row in measure(size, layout, locks, mesh):
          rows.append(row)
          print(json.dumps(row), flush=True)
          write(args.out, rows)
  for line in summarise(rows):
    print(json.dumps(line))


def write(path, rows):
  """Writes what there is so far."""
  found = {
    'rows': rows,
    'summary': summarise(rows),
    'provenance': provenance.describe({}),
  }
  pathlib.Path(path).write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
  main()
