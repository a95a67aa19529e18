"""What the memory of training examples adds to a step.

    python tests/benchmarks/rows_cost.py --out=rows_cost.jsonl

A small pixel phase (16 x 224 x 224, 1,568 patches) with and without rows of two
teachers for 240,000 examples, each with its window copy: float16 for every
patch (3.0 GB) and float32 for every tube (0.76 GB). The step without rows is
timed, and gathering and scattering as a program of its own: as the difference
of two steps it would be lost in their noise. The copy at a window's end is
timed as well; it is made once in thousands of steps.
Seconds are processor seconds of all threads: on a busy machine they are what
counts. A line of JSON is added to the file.
"""

import argparse
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from vssl_jax import config as config_lib
from vssl_jax import encoder, methods, sharding
from vssl_jax.checkpoint import provenance
from vssl_jax.data import batch as batch_lib
from vssl_jax.data import options
from vssl_jax.methods import phase
from vssl_jax.train import example_memory, phase_setup
from vssl_jax.train import run as run_lib

EXAMPLES, ROUNDS, REPEATS = 240_000, 3, 20
KINDS = {
  'float16 patch': {'dtype': 'float16', 'shape': (1568,)},
  'float32 tube': {'dtype': 'float32', 'shape': (196,)},
}


def smoothed(specs, memory, value):
  """Returns new rows: mostly a new value, a little of the old one."""
  return {k: 0.95 * value + 0.05 * memory[k] for k in specs}


def specs_of(kind):
  """Returns the rows of two teachers."""
  spec = phase.MemorySpec(**KINDS[kind], window=7500)
  return {'image': spec, 'video': spec}


def program(config, video, batch, mesh):
  """Returns the compiled step without rows, and its state."""
  phases = methods.build(config.method, video, encoder.module_of)
  (span,) = run_lib.spans(phases)
  shapes = phase_setup.build(config, span, video, EXAMPLES)
  at = sharding.shardings(shapes.state, mesh)
  state = jax.jit(shapes.fresh, out_shardings=at)()
  update = phase_setup.jitted(config, shapes, mesh)
  return update.lower(state, {}, batch).compile(), state


def draw(size, video):
  """Returns random clips of examples all over the table."""
  rng = np.random.default_rng(0)
  return {
    'video': rng.integers(0, 256, (size, *video), dtype=np.uint8),
    'index': rng.choice(EXAMPLES, size, replace=False).astype(np.int32),
    'repeat': np.zeros(size, np.int32),
    'substituted': np.zeros(size, bool),
    'progress': np.float32(0),
  }


def seconds(call):
  """Returns processor seconds of a call until its result is there."""
  start = time.process_time()
  out = jax.block_until_ready(call())
  return time.process_time() - start, out


def alone(kind, batch):
  """Returns the seconds of a gather and scatter, and of the window's copy."""
  specs = specs_of(kind)
  memory = jax.jit(lambda: example_memory.init(specs, EXAMPLES))()

  def turn(memory, index):
    got = example_memory.gather(specs, memory, index, EXAMPLES)
    new = smoothed(specs, got, jnp.float32(1))
    # As the step does: both tables of a row are read.
    told = [jnp.mean(got[f'{k}@window']) for k in specs]
    return example_memory.scatter(specs, memory, index, new, EXAMPLES), told

  index = batch.index
  compiled = jax.jit(turn, donate_argnums=0).lower(memory, index).compile()
  temporary = compiled.memory_analysis().temp_size_in_bytes
  turns, copies = [], []
  for _ in range(REPEATS):
    spent, (memory, _) = seconds(lambda m=memory: compiled(m, index))
    turns.append(spent)
  for _ in range(4):
    spent, memory = seconds(
      lambda m=memory: example_memory.end_windows(specs, m, 7500)
    )
    copies.append(spent)
  return {
    'gather_scatter_seconds': statistics.median(turns),
    'gather_scatter_temporary_bytes': temporary,
    'window_copy_seconds': statistics.median(copies[1:]),
  }


def measure(config, mesh):
  """Returns what a step takes without rows, and what rows of each kind add."""
  video = options.spec(config.data.to_dict()).shape
  arrays = sharding.put_batch(draw(config.batch_size, video), mesh)
  batch = batch_lib.Batch(**arrays)
  found = {kind: alone(kind, batch) for kind in KINDS}
  print(json.dumps(found), flush=True)
  compiled, state = program(config, video, batch, mesh)
  steps = []
  for _ in range(ROUNDS + 1):
    spent, (state, _) = seconds(lambda s=state: compiled(s, {}, batch))
    steps.append(spent)
  step = statistics.median(steps[1:])
  for kind, own in found.items():
    own['rows_bytes'] = example_memory.bytes_per_example(
      specs_of(kind)
    ) * example_memory.places(EXAMPLES)
    own['share_of_step'] = own['gather_scatter_seconds'] / step
  return {'step_seconds': step, 'steps': steps[1:], 'rows': found}


def main():
  """Measures, prints and adds a line."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--out', required=True)
  parser.add_argument('--batch', type=int, default=2)
  parser.add_argument('--width', type=int, default=192)
  parser.add_argument('--depth', type=int, default=12)
  args = parser.parse_args()
  config = config_lib.default('salt')
  config.method.phases = ('pixel_teacher',)
  small = dict(size='Ti', width=args.width, depth=args.depth, num_heads=3)
  small['mlp_width'] = 4 * args.width
  config.method.pixel_teacher.encoder.update(small)
  config.method.pixel_teacher.decoder.update(
    dict(width=args.width // 2, depth=2, num_heads=3)
  )
  config.method.pixel_teacher.masks = 'tube:0.9'
  config.batch_size, config.optim.warmup = args.batch, 0
  mesh = sharding.make_mesh()
  with jax.set_mesh(mesh):
    found = measure(config, mesh)
  line = {
    'batch': args.batch,
    'width': args.width,
    'depth': args.depth,
    'examples': EXAMPLES,
    'found': found,
    **provenance.describe({}),
  }
  print(json.dumps(found, indent=1))
  with pathlib.Path(args.out).open('a') as file:
    file.write(json.dumps(line) + '\n')


if __name__ == '__main__':
  main()
