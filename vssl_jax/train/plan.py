"""What a run will do and need, before it starts.

Nothing is allocated, read or compiled: parameters come from `eval_shape`,
FLOPs and activations from closed forms. Bytes of parameters, gradients,
optimizer, averages, teachers and rows are exact; activations are an estimate.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections

from vssl_jax import encoders, flops, methods, sharding, trees
from vssl_jax.data import options
from vssl_jax.methods import base
from vssl_jax.train import (
  ahead,
  begin,
  freezing,
  keeping,
  memory,
  metrics,
  optimizer,
  rows,
  target_plan,
)
from vssl_jax.train import run as run_lib

GIB = 2**30
# Runs of more phases than this are told by their first and last.
SHOWN = 4

DETAILS = ('shapes', 'phases', 'compile')
TPU = 'tpu:'


def check(detail: str) -> str:
  """Returns what `--plan` asks for.

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
    detail: `phases` has a line for every phase of a long run; `compile` also
      compiles the first and the last phase for the devices at hand, and
      `tpu:<kind>:<shape>` for a slice of TPUs that need not be there.

  Raises:
    ValueError: an unknown detail or slice, or a config that does not fit.
  """
  check(detail)
  # Before anything asks for devices: a slice that is not there has none.
  mesh = _mesh(config, detail)
  video = options.spec(config.data.to_dict()).shape
  method = methods.build(
    config.method, video, encoders.module_of, options.colours_of(config.data)
  )
  begin.check_sources(config, method.phases())
  examples, note = _examples(config)
  spans = run_lib.spans(method)
  ends = (spans[0], spans[-1]) if len(spans) > SHOWN else spans
  outlines = [
    ahead.outline(config, method, span, video, examples or 1) for span in ends
  ]
  data, fsdp = _mesh_sizes(config, mesh)
  sizes = {'data': data, 'fsdp': fsdp}
  told = [
    [
      *_phase(config, method, o, video, data, fsdp),
      *_rows(o.span.phase, examples, sizes),
    ]
    for o in outlines
  ]
  if len(spans) > SHOWN:
    told.insert(1, _between(config, method, spans[1:-1], video, detail))
  lines = [f'clips {_x(video)}, batch {config.batch_size}, {note}']
  lines += [line for part in told for line in part]
  lines += _totals(config, method, spans, video, examples, data * fsdp, mesh)
  lines += _rule_total(config, method, outlines, len(spans), video)
  lines.append(
    keeping.describe(config, method.phases(), [o.state for o in outlines])
  )
  if config.cache_targets:
    kept = ahead.cached_of(config, method, video)
    target_plan.check(config, kept, processes=1)
    lines += target_plan.describe(config, method.phases(), kept, examples)
  first_and_last = list(dict.fromkeys((0, len(outlines) - 1)))
  outlines = [outlines[i] for i in first_and_last]
  lines += memory.fits(config, method, outlines, video)
  for shapes in outlines if mesh is not None else ():
    lowered = ahead.lower(config, method, shapes, video, mesh)
    lines.append(ahead.report(lowered, mesh, shapes.span.phase.name))
  return '\n'.join(lines)


def _x(shape: tuple[int, ...]) -> str:
  return 'x'.join(map(str, shape))


def _mesh(
  config: ml_collections.ConfigDict, detail: str
) -> jax.sharding.Mesh | None:
  """Returns what to compile for; None to compile nothing."""
  if detail.startswith(TPU):
    return ahead.tpu_mesh(detail.removeprefix(TPU), max(config.mesh.data, 1))
  if detail == 'compile':
    return sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  return None


def _mesh_sizes(
  config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh | None
) -> tuple[int, int]:
  """Returns (data, fsdp): to compile for, else the config's or at hand."""
  if mesh is not None:
    return mesh.shape['data'], mesh.shape['fsdp']
  data, fsdp = config.mesh.data, config.mesh.fsdp
  if data > 0 and fsdp > 0:
    return data, fsdp
  known = max(data, fsdp, 1)
  rest = max(jax.device_count() // known, 1)
  return (rest, fsdp) if fsdp > 0 else (known, rest)


def _examples(config: ml_collections.ConfigDict) -> tuple[int, str]:
  """Returns how many videos there are, 0 if they are not at hand."""
  note = 'data.source is not set'
  if config.data.source:
    try:
      source = options.find(config.data.to_dict())
      return len(source), f'{len(source):,} videos\n{source.describe()}'
    except OSError as error:
      note = f'{config.data.source} is not at hand'
      if os.path.exists(config.data.source):
        note += f' ({error})'
  told = config.data.examples
  return told, note + (f', {told:,} videos by data.examples' if told else '')


def _phase(
  config: ml_collections.ConfigDict,
  method: base.Method,
  shapes: ahead.Outline,
  video: tuple[int, ...],
  data: int,
  fsdp: int,
) -> list[str]:
  """Returns the lines of one phase."""
  span, phase = shapes.span, shapes.span.phase
  cost = method.cost(phase, video)
  horizon = optimizer.horizon(phase, span.start, span.covers)
  warmup = optimizer.warmup_steps(config.optim, horizon, phase.name)
  warmup_text = f'warm-up {warmup} steps' + (
    f' of the run and {phase.rewarm[0]} of this phase'
    if phase.rewarm[0]
    else ''
  )
  needs = memory.per_device(config, method, shapes, video, data, fsdp)
  shown = ', '.join(f'{k} {v / GIB:.2f}' for k, v in needs.items())
  return [
    f'phase {phase.name}: steps {span.start} to {span.end}, {warmup_text}, '
    f'{optimizer.describe_lr(config.optim, config.batch_size)}',
    f'  parameters: {_sizes(shapes)}',
    *(
      f'  teacher {name}: {teacher.source}, '
      + _teacher_size(shapes, name, teacher)
      + teacher.dtype
      for name, teacher in phase.teachers.items()
    ),
    f'  per step: {cost.total * config.batch_size:.3g} FLOPs '
    f'({_flops(cost)} TFLOP per clip, {100 * cost.frozen / cost.total:.0f} % '
    'of it without a gradient: teachers, targets)',
    *_rule_text(_rule(shapes, cost), config.batch_size),
    f'  GiB per device, on {_devices(data, fsdp)}: {shown}; '
    f'{sum(needs.values()) / GIB:.2f} in all (activations are an estimate)',
  ]


def _rule(shapes: ahead.Outline, cost: base.Cost) -> float:
  """Returns FLOPs per clip by the papers' rule; 0 where it says nothing."""
  params, phase = shapes.state.params, shapes.span.phase
  teachers = {
    name: _teacher_shapes(shapes, name, teacher)
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


def _rows(
  phase: base.Phase, examples: int, sizes: Mapping[str, int]
) -> list[str]:
  """Returns what a phase remembers of every example, exactly, if anything."""
  if not phase.row_specs:
    return []
  each = rows.bytes_per_example(phase.row_specs)
  kept = ', '.join(
    f'{name} {_x(spec.shape) or 1} {spec.dtype}'
    + (f' twice (windows of {spec.window} steps)' if spec.window else '')
    for name, spec in phase.row_specs.items()
  )
  line = f'  rows: {kept}: {each:,} bytes per example'
  if not examples:
    return [f'{line}; --config.data.examples says how many to count']
  room = rows.places(examples)
  axes = sharding.example_axes(room, sizes)
  share = each * room // math.prod(sizes[axis] for axis in axes)
  devices = math.prod(sizes.values())
  return [
    f'{line}; for {examples:,} examples (room for {room:,}) {each * room:,} '
    f'bytes, {share:,} per device of {devices}'
  ]


def _devices(data: int, fsdp: int) -> str:
  """Returns which mesh the bytes of a phase are for."""
  if data * fsdp == 1:
    return 'one device alone'
  return f'a mesh of {data} x {fsdp}'


def _sizes(shapes: ahead.Outline) -> str:
  """Returns the millions of parameters by role, and how many are frozen."""
  sizes = [
    f'{role} {trees.count(tree) / 1e6:.2f} M'
    for role, tree in shapes.state.params.items()
  ]
  _, frozen = freezing.split(shapes.state.params, shapes.labels)
  if trees.count(frozen):
    sizes.append(f'of which frozen {trees.count(frozen) / 1e6:.2f} M')
  return ', '.join(sizes)


def _teacher_size(
  shapes: ahead.Outline, name: str, teacher: base.Teacher
) -> str:
  tree = _teacher_shapes(shapes, name, teacher)
  return f'{trees.count(tree) / 1e6:.2f} M, '


def _teacher_shapes(
  shapes: ahead.Outline, name: str, teacher: base.Teacher
) -> Any:
  """Returns the shapes of a teacher's parameters, or of the average it is."""
  average = teacher.source.removeprefix('@ema/')
  return shapes.teachers.get(name, shapes.state.ema.get(average))


def _flops(cost: base.Cost) -> str:
  return f'{cost.total / 1e12:.3f}'


def _per_example(phase: base.Phase) -> str:
  each = rows.bytes_per_example(phase.row_specs)
  return f', rows {each:,} bytes per example' if each else ''


def _between(
  config: ml_collections.ConfigDict,
  method: base.Method,
  spans: Sequence[run_lib.Span],
  video: tuple[int, ...],
  detail: str,
) -> list[str]:
  """Returns a line for the phases between first and last, or one for each."""
  costs = [method.cost(span.phase, video) for span in spans]
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
  method: base.Method,
  outlines: Sequence[ahead.Outline],
  phases: int,
  video: tuple[int, ...],
) -> list[str]:
  """Returns the FLOPs of the whole run by the papers' rule, if it has all."""
  each = [
    o.span.phase.steps * _rule(o, method.cost(o.span.phase, video))
    for o in outlines
  ]
  if len(each) < phases or not all(each):
    return []
  return _rule_text(sum(each), config.batch_size)


def _totals(
  config: ml_collections.ConfigDict,
  method: base.Method,
  spans: Sequence[run_lib.Span],
  video: tuple[int, ...],
  examples: int,
  devices: int,
  mesh: jax.sharding.Mesh | None,
) -> list[str]:
  """Returns what the run needs in all."""
  per_clip = sum(
    span.phase.steps * method.cost(span.phase, video).total for span in spans
  )
  flops = per_clip * config.batch_size
  clips = spans[-1].end * config.batch_size
  epochs = f', {clips / examples:.1f} epochs' if examples else ''
  lines = [
    f'in all: {spans[-1].end} steps, {clips:,} clips{epochs}, {flops:.3g} FLOPs'
  ]
  kind = mesh.devices.flat[0].device_kind if mesh is not None else ''
  peak = metrics.peak_flops(config.log.peak_tflops, kind)
  if peak:
    hours = flops / (0.4 * peak * devices * 3600)
    lines.append(f'about {hours:.1f} hours at 40 % of the peak of {devices}')
  return lines
