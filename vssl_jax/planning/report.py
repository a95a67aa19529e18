"""Plan of a training run (`--plan`): phases, memory and FLOPs.

Nothing is allocated, and nothing is compiled unless requested: parameters come
from `eval_shape`, FLOPs and activations from closed forms. Bytes of parameters,
gradients, optimizer, averages, teachers and example memory are exact;
activations are an estimate.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections

from vssl_jax import encoder, flops, methods, sharding, trees
from vssl_jax.checkpoint import retention
from vssl_jax.data import options
from vssl_jax.methods import cost as cost_lib
from vssl_jax.methods import phase as phase_lib
from vssl_jax.planning import memory
from vssl_jax.target_cache import policy
from vssl_jax.train import (
  example_memory,
  freezing,
  optimizer,
  phase_setup,
  phase_start,
)
from vssl_jax.train import run as run_lib
from vssl_jax.utils import metrics

GIB = 2**30
# For runs with more phases only the first and the last are described.
SHOWN = 4

DETAILS = ('shapes', 'phases', 'compile')
TPU = 'tpu:'


def check(detail: str) -> str:
  """Returns the validated value of `--plan`.

  Raises:
    ValueError: it is none of `DETAILS` and no slice such as `tpu:v5p:2x2x2`.
  """
  if detail not in DETAILS and not detail.startswith(TPU):
    raise ValueError(
      f'--plan: found {detail!r}, wanted one of {DETAILS} or a TPU slice such '
      'as tpu:v5p:4x4x4'
    )
  return detail


def describe(config: ml_collections.ConfigDict, detail: str = 'shapes') -> str:
  """Returns the plan of a run as text.

  Args:
    config: a resolved config.
    detail: `shapes`; `phases` adds a line for every phase of a long run;
      `compile` also compiles the first and the last phase for the available
      devices, and `tpu:<kind>:<shape>` for a slice of TPUs, available or not.

  Raises:
    ValueError: an unknown detail or slice, or a config that does not fit.
  """
  check(detail)
  # Before any use of devices: a TPU slice that is not available has none.
  mesh = _mesh(config, detail)
  video = options.spec(config.data.to_dict()).shape
  phases = methods.build(
    config.method, video, encoder.module_of, options.colours_of(config.data)
  )
  phase_start.check_sources(config, phases)
  examples, note = _examples(config)
  spans = run_lib.spans(phases)
  shown_spans = (spans[0], spans[-1]) if len(spans) > SHOWN else spans
  setups = [
    phase_setup.build(config, span, video, examples or 1)
    for span in shown_spans
  ]
  data, fsdp = _mesh_sizes(config, mesh)
  sizes = {'data': data, 'fsdp': fsdp}
  phase_lines = [
    [
      *_phase(config, o, video, data, fsdp),
      *_example_memory(o.span.phase, examples, sizes),
    ]
    for o in setups
  ]
  if len(spans) > SHOWN:
    phase_lines.insert(1, _between(config, spans[1:-1], video, detail))
  lines = [f'clips {_x(video)}, batch {config.batch_size}, {note}']
  lines += [line for part in phase_lines for line in part]
  lines += _totals(config, spans, video, examples, data * fsdp, mesh)
  lines += _rule_total(config, setups, len(spans), video)
  lines.append(retention.describe(config, phases, [o.state for o in setups]))
  if config.cache_targets:
    cached = [phase_setup.cached(config, p, video) for p in phases]
    policy.check(config, cached, processes=1)
    lines += policy.describe(config, phases, cached, examples)
  first_and_last = list(dict.fromkeys((0, len(setups) - 1)))
  setups = [setups[i] for i in first_and_last]
  lines += memory.fits(config, setups, video)
  for setup in setups if mesh is not None else ():
    lowered = phase_setup.lower(config, setup, video, mesh)
    lines.append(phase_setup.report(lowered, mesh, setup.span.phase.name))
  return '\n'.join(lines)


def _x(shape: tuple[int, ...]) -> str:
  return 'x'.join(map(str, shape))


def _mesh(
  config: ml_collections.ConfigDict, detail: str
) -> jax.sharding.Mesh | None:
  """Returns the mesh to compile for; None to compile nothing."""
  if detail.startswith(TPU):
    return phase_setup.tpu_mesh(
      detail.removeprefix(TPU), max(config.mesh.data, 1)
    )
  if detail == 'compile':
    return sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  return None


def _mesh_sizes(
  config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh | None
) -> tuple[int, int]:
  """Returns the sizes (data, fsdp) of the mesh.

  They come from `mesh` if it is given, else from the config; a size that is
  open there is computed from the number of available devices.
  """
  if mesh is not None:
    return mesh.shape['data'], mesh.shape['fsdp']
  data, fsdp = config.mesh.data, config.mesh.fsdp
  if data > 0 and fsdp > 0:
    return data, fsdp
  known_size = max(data, fsdp, 1)
  rest = max(jax.device_count() // known_size, 1)
  return (rest, fsdp) if fsdp > 0 else (known_size, rest)


def _examples(config: ml_collections.ConfigDict) -> tuple[int, str]:
  """Returns the number of videos, 0 if unknown, and a note on them."""
  note = 'data.source is not set'
  if config.data.source:
    try:
      source = options.find(config.data.to_dict())
      return len(source), f'{len(source):,} videos\n{source.describe()}'
    except OSError as error:
      note = f'{config.data.source} is not available'
      if os.path.exists(config.data.source):
        note += f' ({error})'
  count = config.data.examples
  return count, note + (f', {count:,} videos by data.examples' if count else '')


def _phase(
  config: ml_collections.ConfigDict,
  setup: phase_setup.PhaseSetup,
  video: tuple[int, ...],
  data: int,
  fsdp: int,
) -> list[str]:
  """Returns the lines on one phase."""
  span, phase = setup.span, setup.span.phase
  cost = phase.cost(video)
  horizon = optimizer.horizon(phase, span.start, span.covers)
  warmup = optimizer.warmup_steps(config.optim, horizon, phase.name)
  warmup_text = f'warm-up {warmup} steps' + (
    f' of the run and {phase.rewarm[0]} of this phase'
    if phase.rewarm[0]
    else ''
  )
  needs = memory.per_device(config, setup, video, data, fsdp)
  shown = ', '.join(f'{k} {v / GIB:.2f}' for k, v in needs.items())
  return [
    f'phase {phase.name}: steps {span.start} to {span.end}, {warmup_text}, '
    f'{optimizer.describe_lr(config.optim, config.batch_size)}',
    f'  parameters: {_sizes(setup)}',
    *(
      f'  teacher {name}: {teacher.source}, '
      + _teacher_size(setup, name, teacher)
      + teacher.dtype
      for name, teacher in phase.teachers.items()
    ),
    f'  per step: {cost.total * config.batch_size:.3g} FLOPs '
    f'({_flops(cost)} TFLOP per clip, {100 * cost.frozen / cost.total:.0f} % '
    'of it without a gradient: teachers, targets)',
    *_rule_text(_rule(setup, cost), config.batch_size),
    f'  GiB per device, on {_devices(data, fsdp)}: {shown}; '
    f'{sum(needs.values()) / GIB:.2f} in total (activations are an estimate)',
  ]


def _rule(setup: phase_setup.PhaseSetup, cost: cost_lib.Cost) -> float:
  """Returns FLOPs per clip by the papers' rule; 0 where it does not apply."""
  params, phase = setup.state.params, setup.span.phase
  teachers = {
    name: _teacher_shapes(setup, name, teacher)
    for name, teacher in phase.teachers.items()
  }
  trained, frozen = (
    [(trees.count(part[n]), k) for n, k in cost.tokens.items() if n in part]
    for part in (params, teachers)
  )
  return flops.rule_of_six(trained, frozen)


def _rule_text(per_clip: float, clips: int) -> list[str]:
  if not per_clip:
    return []
  return [
    f'  by the rule 6ND + 2ND (parameters x tokens, without attention): '
    f'{per_clip * clips:.3g} FLOPs'
  ]


def _example_memory(
  phase: phase_lib.Phase, examples: int, sizes: Mapping[str, int]
) -> list[str]:
  """Returns a line on the exact size of the example memory, if there is one."""
  if not phase.memory_specs:
    return []
  nbytes = example_memory.bytes_per_example(phase.memory_specs)
  specs_text = ', '.join(
    f'{name} {_x(spec.shape) or 1} {spec.dtype}'
    + (f' twice (windows of {spec.window} steps)' if spec.window else '')
    for name, spec in phase.memory_specs.items()
  )
  line = f'  example memory: {specs_text}: {nbytes:,} bytes per example'
  if not examples:
    return [f'{line}; --config.data.examples sets how many to count']
  capacity = example_memory.places(examples)
  axes = sharding.example_axes(capacity, sizes)
  share = nbytes * capacity // math.prod(sizes[axis] for axis in axes)
  devices = math.prod(sizes.values())
  return [
    f'{line}; for {examples:,} examples (room for {capacity:,}) '
    f'{nbytes * capacity:,} bytes, {share:,} per device of {devices}'
  ]


def _devices(data: int, fsdp: int) -> str:
  """Returns the mesh that the bytes of a phase refer to, as text."""
  if data * fsdp == 1:
    return 'a single device'
  return f'a mesh of {data} x {fsdp}'


def _sizes(setup: phase_setup.PhaseSetup) -> str:
  """Returns the millions of parameters by role, and of frozen ones."""
  sizes = [
    f'{role} {trees.count(tree) / 1e6:.2f} M'
    for role, tree in setup.state.params.items()
  ]
  _, frozen = freezing.split(setup.state.params, setup.labels)
  if trees.count(frozen):
    sizes.append(f'of which frozen {trees.count(frozen) / 1e6:.2f} M')
  return ', '.join(sizes)


def _teacher_size(
  setup: phase_setup.PhaseSetup, name: str, teacher: phase_lib.Teacher
) -> str:
  tree = _teacher_shapes(setup, name, teacher)
  return f'{trees.count(tree) / 1e6:.2f} M, '


def _teacher_shapes(
  setup: phase_setup.PhaseSetup, name: str, teacher: phase_lib.Teacher
) -> Any:
  """Returns the parameter shapes of a teacher, which may be an EMA."""
  if isinstance(teacher.source, phase_lib.FromEma):
    return setup.state.ema[teacher.source.name]
  return setup.teachers[name]


def _flops(cost: cost_lib.Cost) -> str:
  return f'{cost.total / 1e12:.3f}'


def _per_example(phase: phase_lib.Phase) -> str:
  nbytes = example_memory.bytes_per_example(phase.memory_specs)
  return f', example memory {nbytes:,} bytes per example' if nbytes else ''


def _between(
  config: ml_collections.ConfigDict,
  spans: Sequence[run_lib.Span],
  video: tuple[int, ...],
  detail: str,
) -> list[str]:
  """Returns one line on the phases between first and last, or one for each."""
  costs = [span.phase.cost(video) for span in spans]
  if detail == 'phases':
    return [
      f'phase {span.phase.name}: steps {span.start} to {span.end}, '
      f'{_flops(cost)} TFLOP per clip ({cost.frozen / 1e12:.3f} of it for '
      f'targets), activations {cost.activations / GIB:.3f} GiB per clip'
      + _per_example(span.phase)
      for span, cost in zip(spans, costs, strict=True)
    ]
  steps = sorted(span.phase.steps for span in spans)
  first, last = spans[0], spans[-1]
  span_of_steps = '-'.join(map(str, dict.fromkeys((steps[0], steps[-1]))))
  return [
    f'{len(spans)} phases {first.phase.name} to {last.phase.name}: steps '
    f'{first.start} to {last.end}, {span_of_steps} each, {_flops(costs[0])} '
    f'to {_flops(costs[-1])} TFLOP per clip (--plan=phases has a line for each)'
  ]


def _rule_total(
  config: ml_collections.ConfigDict,
  setups: Sequence[phase_setup.PhaseSetup],
  count: int,
  video: tuple[int, ...],
) -> list[str]:
  """Returns the FLOPs of the run by the papers' rule, if all phases have it."""
  phase_flops = [
    o.span.phase.steps * _rule(o, o.span.phase.cost(video)) for o in setups
  ]
  if len(phase_flops) < count or not all(phase_flops):
    return []
  return _rule_text(sum(phase_flops), config.batch_size)


def _totals(
  config: ml_collections.ConfigDict,
  spans: Sequence[run_lib.Span],
  video: tuple[int, ...],
  examples: int,
  devices: int,
  mesh: jax.sharding.Mesh | None,
) -> list[str]:
  """Returns lines on steps, clips, FLOPs and hours of the whole run."""
  per_clip = sum(
    span.phase.steps * span.phase.cost(video).total for span in spans
  )
  flops = per_clip * config.batch_size
  clips = spans[-1].end * config.batch_size
  epochs = f', {clips / examples:.1f} epochs' if examples else ''
  lines = [
    f'total: {spans[-1].end} steps, {clips:,} clips{epochs}, {flops:.3g} FLOPs'
  ]
  kind = mesh.devices.flat[0].device_kind if mesh is not None else ''
  peak = metrics.peak_flops(config.log.peak_tflops, kind)
  if peak:
    hours = flops / (0.4 * peak * devices * 3600)
    lines.append(f'about {hours:.1f} hours at 40 % of the peak of {devices}')
  return lines
