"""Times the train step of a config on the available devices.

    python -m vssl_jax.planning.bench --config=configs/salt.py:L \
      --sweep=8,16,32 --out=salt_l.json

The clips are random and already on the device, so the result is the speed of
a run whose data loading keeps up. Parameters and teachers are random: their
values do not affect the speed. With a compilation cache
(`JAX_COMPILATION_CACHE_DIR`) the compile seconds are those of a warm start;
the result records whether there is a cache. `--sweep=phases` compares the
phases of a run, see `vssl_jax/planning/phase_sweep.py`.
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
from vssl_jax import encoder, methods, sharding
from vssl_jax.checkpoint import provenance
from vssl_jax.data import options
from vssl_jax.evals import feature_memory as feature_memory_lib
from vssl_jax.methods import cost as cost_lib
from vssl_jax.methods import phase as phase_lib
from vssl_jax.planning import phase_sweep, timing
from vssl_jax.train import run as run_lib
from vssl_jax.train import train_step
from vssl_jax.utils import config_io, flags, metrics

GIB = 2**30
PHASES = 'phases'


@dataclasses.dataclass(frozen=True)
class Limit:
  """Reference rate of the utilisation.

  Attributes:
    name: source of the rate.
    flops_per_s: FLOP/s of all devices of the mesh.
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
    phase: name of one phase; '' for all.
    steps: number of timed steps.
    sizes: batch sizes, in clips per step over all devices; () for the config's.
      A phase's sweep ends at the first size that does not fit into memory.
    matrix: side of the matrix product; 0: 2048 on CPU, 8192 elsewhere.
    say: called with each line of the output.

  Returns:
    The dict that `--out` writes; `results` has one entry per phase and batch
    size.

  Raises:
    ValueError: no such phase, `steps` below 1, or a batch size that does not
      divide over the devices and micro-batches.
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
    'provenance': provenance.describe(config_io.to_json(config)),
  }


def _spans(config: ml_collections.ConfigDict, phase: str) -> list[run_lib.Span]:
  video = options.spec(config.data.to_dict()).shape
  phases = methods.build(
    config.method, video, encoder.module_of, options.colours_of(config.data)
  )
  spans = list(run_lib.spans(phases))
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
  divisor = devices * config.optim.accumulate
  invalid = [n for n in sizes if n < 1 or n % divisor]
  if invalid:
    raise ValueError(
      f'batch sizes {invalid}: wanted multiples of {divisor} '
      f'({devices} devices x {config.optim.accumulate} micro-batches); see '
      '--sweep and --config.batch_size'
    )
  if steps < 1:
    raise ValueError(f'--steps: found {steps}, wanted at least 1')


def _limit(
  config: ml_collections.ConfigDict, devices: int, matrix: int, dtype: str
) -> Limit:
  device = jax.devices()[0]
  on_cpu = device.platform == 'cpu'
  side = matrix or (2048 if on_cpu else 8192)
  # All CPU devices share the same cores.
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
  """Measures one batch size, or records that it does not fit into memory."""
  entry = {'phase': span.phase.name, 'batch_size': size}
  try:
    with jax.set_mesh(mesh):
      return entry | measure(config, span, size, steps, mesh, limit)
  except (MemoryError, jax.errors.JaxRuntimeError) as error:
    reason = str(error).strip()
    if feature_memory_lib.is_exhausted(error):
      return entry | {'out_of_memory': reason.partition('\n')[0][:300]}
    raise


def measure(
  config: ml_collections.ConfigDict,
  span: run_lib.Span,
  size: int,
  steps: int,
  mesh: jax.sharding.Mesh,
  limit: Limit,
) -> dict[str, Any]:
  """Measures speed, memory and utilisation of a phase at one batch size."""
  video = options.spec(config.data.to_dict()).shape
  peak_before = _device_peak()
  prepared = timing.prepare(config, span, size, video, mesh)
  memory = _memory(prepared.compiled)
  seconds, state = timing.step_seconds(prepared, steps)
  # Before the forward pass of the teachers below can raise the peak.
  if _device_peak() > peak_before:
    memory = {'peak_gib': _device_peak() / GIB, 'peak_source': 'device'}
  cost = span.phase.cost(video)
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
    **_teacher_share(span.phase, prepared, state, cost, median, steps),
  }


def _device_peak() -> int:
  """Returns the peak bytes in use on the fullest device; 0: unknown."""
  stats = [d.memory_stats() or {} for d in jax.local_devices()]
  return max(s.get('peak_bytes_in_use', 0) for s in stats)


def _memory(compiled: Any) -> dict[str, Any]:
  """Returns the peak memory in GiB as estimated by the compiler.

  It serves devices that report no peak. A reported peak never decreases, so a
  smaller step after a larger one uses the estimate too.
  """
  analysis = compiled.memory_analysis()
  total = (
    analysis.argument_size_in_bytes
    + analysis.output_size_in_bytes
    + analysis.temp_size_in_bytes
    - analysis.alias_size_in_bytes
  )
  return {'peak_gib': total / GIB, 'peak_source': 'compiler'}


def _teacher_share(
  phase: phase_lib.Phase,
  prepared: timing.Prepared,
  state: train_step.TrainState,
  cost: cost_lib.Cost,
  seconds: float,
  steps: int,
) -> dict[str, float]:
  """Returns the teachers' share of the step in FLOPs and in time.

  The time is that of `Phase.targets`. It excludes teachers whose outputs
  depend on the mask.
  """
  total, video = 0.0, prepared.batch.video
  if phase.teachers:
    teachers = dict(prepared.teachers) | train_step.ema_teachers(
      phase, state.ema
    )
    targets = jax.jit(lambda t, v: phase.targets(t, v))
    forward = targets.lower(teachers, video).compile()
    times = timing.times(functools.partial(forward, teachers, video), steps)
    total = float(np.median(times))
  return {
    'teacher_share_flops': cost.frozen / cost.total,
    'teacher_share_seconds': total / seconds,
  }


def text(result: dict[str, Any]) -> str:
  """Returns a result as one line."""
  prefix = f'{result["phase"]}, batch {result["batch_size"]}: '
  if 'out_of_memory' in result:
    return prefix + f'out of memory ({result["out_of_memory"]})'
  low, high = result['step_seconds_quartiles']
  return prefix + (
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
  """Returns the flags and the `--config.<key>=<value>` assignments."""
  parser = flags.parser(
    'python -m vssl_jax.planning.bench',
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
    help='with --sweep=phases: a page whose first phase is the reference of '
    'the comparison; the keys that are set hold for both',
  )
  add('--out', default='', help='file for the result, as JSON')
  args, assignments = flags.parse(parser, argv)
  if args.sweep == PHASES:
    if args.phase:
      parser.error('--phase: --sweep=phases compares all of them')
    return args, assignments
  if args.against:
    parser.error('--against: wanted only together with --sweep=phases')
  try:
    args.sweep = tuple(int(x) for x in args.sweep.split(',') if x)
  except ValueError:
    parser.error(
      f'--sweep: found {args.sweep!r}, wanted sizes such as 8,16,32, or phases'
    )
  return args, assignments


def run(argv: Sequence[str] | None = None) -> int:
  """Runs the benchmark from the command line; returns its exit status."""
  args, assignments = parse(sys.argv[1:] if argv is None else argv)
  try:
    config = config_lib.resolve(
      args.config, assignments, tuple(args.config_root)
    )
    if args.sweep == PHASES:
      entries = phase_sweep.entries(config)
      if args.against:
        baseline = config_lib.resolve(
          args.against, assignments, tuple(args.config_root)
        )
        entries = phase_sweep.entries(baseline, 'against: ') + entries
      result = phase_sweep.phases(entries, steps=args.steps)
    else:
      result = bench(
        config, phase=args.phase, steps=args.steps, sizes=args.sweep
      )
  except ValueError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  if args.out:
    out = pathlib.Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + '\n')
    print(f'wrote {out}')
  return 0


if __name__ == '__main__':
  sys.exit(run())
