"""How fast the real train step of a config runs on the devices at hand.

    python -m vssl_jax.bench --config=configs/salt.py:L --sweep=8,16,32 \
      --out=salt_l.json

The clips are random and already on the device, so this is what a run reaches
when its data keep up. Parameters and teachers are random: values do not
change the speed. Kept programs (`JAX_COMPILATION_CACHE_DIR`) make the compile
seconds those of a warm start, which the result says. `--sweep=phases` compares
the phases of a run with each other, see `vssl_jax/sweep.py`.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from vssl_jax import config as config_lib
from vssl_jax import encoders, flags, main, methods, sharding, sweep, timing
from vssl_jax.data import options
from vssl_jax.evals import memory as memory_lib
from vssl_jax.methods import base
from vssl_jax.train import metrics, provenance, step
from vssl_jax.train import run as run_lib

GIB = 2**30
PHASES = 'phases'


@dataclasses.dataclass(frozen=True)
class Limit:
  """What utilisation is a ratio to.

  Attributes:
    name: where the figure comes from.
    flops_per_s: of all devices of the mesh.
    matrix_product: FLOP/s of a large matrix product timed in this run, of all
      devices of the mesh.
  """

  name: str
  flops_per_s: float
  matrix_product: float


def bench(
  config: ml_collections.ConfigDict,
  *,
  phase: str = '',
  steps: int = 30,
  sizes: Sequence[int] = (),
  matrix: int = 0,
  say: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Times the step of every phase at every batch size.

  Args:
    config: a resolved config.
    phase: one phase; '' for all.
    steps: timed steps.
    sizes: clips per step over all devices; () for the config's batch size.
      A phase's sweep ends at the first that does not fit into memory.
    matrix: side of the matrix product; 0: 2048 on CPU, 8192 elsewhere.
    say: takes a line per result.

  Returns:
    What `--out` writes; `results` has one entry per phase and batch size.

  Raises:
    ValueError: a phase that the run has not, or a size that does not divide.
  """
  sizes = tuple(sizes) or (config.batch_size,)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  spans = _spans(config, phase)
  _check(config, sizes, steps, mesh.size)
  dtype = getattr(spans[0].phase.encoder, 'dtype', 'float32')
  limit = _limit(config, mesh.size, matrix, dtype)
  say(
    f'limit: {limit.name}, {limit.flops_per_s / 1e12:.4g} TFLOP/s; a matrix '
    f'product reaches {limit.matrix_product / 1e12:.4g}'
  )
  results = []
  for span in spans:
    for size in sorted(sizes):
      results.append(_attempt(config, span, size, steps, mesh, limit))
      say(text(results[-1]))
      if 'out_of_memory' in results[-1]:
        break
  return {
    'limit': dataclasses.asdict(limit),
    'devices': mesh.size,
    'compile_cache': bool(jax.config.jax_compilation_cache_dir),
    'results': results,
    'provenance': provenance.describe(config_lib.to_json(config)),
  }


def _spans(config: ml_collections.ConfigDict, phase: str) -> list[run_lib.Span]:
  video = options.spec(config.data.to_dict()).shape
  method = methods.build(
    config.method, video, encoders.module_of, options.colours_of(config.data)
  )
  spans = list(run_lib.spans(method))
  names = [s.phase.name for s in spans]
  if phase and phase not in names:
    raise ValueError(f'--phase: found {phase!r}, wanted one of {names}')
  return [s for s in spans if phase in ('', s.phase.name)]


def _check(
  config: ml_collections.ConfigDict,
  sizes: Sequence[int],
  steps: int,
  devices: int,
) -> None:
  pieces = devices * config.optim.accumulate
  wrong = [n for n in sizes if n < 1 or n % pieces]
  if wrong:
    raise ValueError(
      f'batch sizes {wrong}: wanted multiples of {pieces} ({devices} devices x '
      f'{config.optim.accumulate} micro-batches); see --sweep and '
      '--config.batch_size'
    )
  if steps < 1:
    raise ValueError(f'--steps: found {steps}, wanted at least 1')


def _limit(
  config: ml_collections.ConfigDict, devices: int, matrix: int, dtype: str
) -> Limit:
  device = jax.devices()[0]
  on_cpu = device.platform == 'cpu'
  side = matrix or (2048 if on_cpu else 8192)
  # CPU devices are names for the same cores.
  product = timing.matrix_rate(side, dtype) * (1 if on_cpu else devices)
  peak = metrics.peak_flops(config.log.peak_tflops) * devices
  if peak:
    return Limit(f'{devices} x {device.device_kind}, peak', peak, product)
  name = f'matrix product of side {side}, {dtype}, on {device.device_kind}'
  return Limit(name, product, product)


def _attempt(
  config: ml_collections.ConfigDict,
  span: run_lib.Span,
  size: int,
  steps: int,
  mesh: jax.sharding.Mesh,
  limit: Limit,
) -> dict[str, Any]:
  """Measures one batch size, or says that it did not fit."""
  head = {'phase': span.phase.name, 'batch_size': size}
  try:
    with jax.set_mesh(mesh):
      return head | measure(config, span, size, steps, mesh, limit)
  except (MemoryError, jax.errors.JaxRuntimeError) as error:
    reason = str(error).strip()
    if memory_lib.is_exhausted(error):
      return head | {'out_of_memory': reason.partition('\n')[0][:300]}
    raise


def measure(
  config: ml_collections.ConfigDict,
  span: run_lib.Span,
  size: int,
  steps: int,
  mesh: jax.sharding.Mesh,
  limit: Limit,
) -> dict[str, Any]:
  """Returns the figures of one phase at one batch size."""
  video = options.spec(config.data.to_dict()).shape
  method = methods.build(
    config.method, video, encoders.module_of, options.colours_of(config.data)
  )
  peak_before = _device_peak()
  prepared = timing.prepare(config, method, span, size, video, mesh)
  memory = _memory(prepared.compiled)
  seconds, state = timing.step_seconds(prepared, steps)
  # Before the teacher's own forward pass below can raise it.
  if _device_peak() > peak_before:
    memory = {'peak_gib': _device_peak() / GIB, 'peak_source': 'device'}
  cost = method.cost(span.phase, video)
  median = float(np.median(seconds))
  rate = cost.total * size / median
  low, high = np.percentile(seconds, (25, 75))
  return {
    'video': list(video),
    'compile_seconds': prepared.compile_seconds,
    'steps': steps,
    'step_seconds': median,
    'step_seconds_quartiles': [float(low), float(high)],
    'clips_per_s': size / median,
    **memory,
    'flops_per_clip': cost.total,
    'utilisation': rate / limit.flops_per_s,
    'utilisation_of': limit.name,
    'of_matrix_product': rate / limit.matrix_product,
    **_teacher_share(method, span.phase, prepared, state, cost, median, steps),
  }


def _device_peak() -> int:
  """Returns the most bytes in use so far on the fullest device; 0: unknown."""
  stats = [d.memory_stats() or {} for d in jax.local_devices()]
  return max(s.get('peak_bytes_in_use', 0) for s in stats)


def _memory(compiled: Any) -> dict[str, Any]:
  """Returns the compiler's sum, for devices that keep no count.

  A device's count only ever rises, so a smaller step after a larger one has
  the compiler's sum too.
  """
  found = compiled.memory_analysis()
  total = (
    found.argument_size_in_bytes
    + found.output_size_in_bytes
    + found.temp_size_in_bytes
    - found.alias_size_in_bytes
  )
  return {'peak_gib': total / GIB, 'peak_source': 'compiler'}


def _teacher_share(
  method: base.Method,
  phase: base.Phase,
  prepared: timing.Prepared,
  state: step.TrainState,
  cost: base.Cost,
  seconds: float,
  steps: int,
) -> dict[str, float]:
  """Returns the teachers' part of the step by FLOPs and by the clock.

  The clock counts `Method.targets`: not a teacher whose answer depends on the
  mask.
  """
  total, video = 0.0, prepared.batch['video']
  if phase.teachers:
    teachers = dict(prepared.teachers) | step.ema_teachers(phase, state.ema)
    ask = jax.jit(lambda t, v: method.targets(t, v, phase))
    forward = ask.lower(teachers, video).compile()
    times = timing.times(functools.partial(forward, teachers, video), steps)
    total = float(np.median(times))
  return {
    'teacher_share_flops': cost.frozen / cost.total,
    'teacher_share_seconds': total / seconds,
  }


def text(result: dict[str, Any]) -> str:
  """Returns a result as one line."""
  head = f'{result["phase"]}, batch {result["batch_size"]}: '
  if 'out_of_memory' in result:
    return head + f'out of memory ({result["out_of_memory"]})'
  low, high = result['step_seconds_quartiles']
  return head + (
    f'{result["step_seconds"]:.4g} s per step ({low:.4g} to {high:.4g}), '
    f'{result["clips_per_s"]:.4g} clips/s, '
    f'{100 * result["utilisation"]:.1f} % of the limit, '
    f'{result["peak_gib"]:.3g} GiB ({result["peak_source"]}), '
    f'{result["flops_per_clip"] / 1e12:.3g} TF per clip, teacher '
    f'{100 * result["teacher_share_flops"]:.0f} % of FLOPs and '
    f'{100 * result["teacher_share_seconds"]:.0f} % of time, compiled in '
    f'{result["compile_seconds"]:.1f} s'
  )


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
  """Returns the flags, and the assignments of `--config.<key>=<value>`."""
  parser = flags.parser(
    'python -m vssl_jax.bench',
    'Times the train step of a config.',
    needs_page=True,
  )
  add = parser.add_argument
  add('--phase', default='', help='one phase; all if not given')
  add('--steps', type=int, default=30, help='timed steps')
  add(
    '--sweep',
    default='',
    help='batch sizes, separated by commas; or "phases" to compare them',
  )
  add(
    '--against',
    default='',
    help='with --sweep=phases: a page whose first phase is what all are '
    'compared with; the keys that are set hold for both',
  )
  add('--out', default='', help='file for the result, as JSON')
  args, assignments = flags.parse(parser, argv)
  if args.sweep == PHASES:
    if args.phase:
      parser.error('--phase: --sweep=phases compares all of them')
    return args, assignments
  if args.against:
    parser.error('--against: wanted beside --sweep=phases only')
  try:
    args.sweep = tuple(int(x) for x in args.sweep.split(',') if x)
  except ValueError:
    parser.error(
      f'--sweep: found {args.sweep!r}, wanted sizes such as 8,16,32, or phases'
    )
  return args, assignments


def run(argv: Sequence[str] | None = None) -> int:
  """Runs the benchmark as a program and returns its exit status."""
  args, assignments = parse(sys.argv[1:] if argv is None else argv)
  try:
    config = main.resolve(args.config, assignments, tuple(args.config_root))
    if args.sweep == PHASES:
      compared = sweep.entries(config)
      if args.against:
        other = main.resolve(args.against, assignments, tuple(args.config_root))
        compared = sweep.entries(other, 'against: ') + compared
      found = sweep.phases(compared, steps=args.steps)
    else:
      found = bench(
        config, phase=args.phase, steps=args.steps, sizes=args.sweep
      )
  except ValueError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  if args.out:
    out = pathlib.Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + '\n')
    print(f'wrote {out}')
  return 0


if __name__ == '__main__':
  sys.exit(run())
