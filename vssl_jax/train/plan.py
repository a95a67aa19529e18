"""What a run will do and need, before it starts.

Nothing is allocated, read or compiled: parameters come from `eval_shape`,
FLOPs and activations from closed forms. Bytes of parameters, optimizer,
averages, teachers and rows are exact; activations are an estimate.
"""

import contextlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from vssl_jax import encoders, methods, sharding, trees
from vssl_jax.data import options
from vssl_jax.methods import base
from vssl_jax.train import freezing, metrics, optimizer, step
from vssl_jax.train import run as run_lib

GIB = 2**30


def describe(
  config: ml_collections.ConfigDict, compile_phases: bool = False
) -> str:
  """Returns the plan of a run as text.

  Args:
    config: a resolved config.
    compile_phases: also compile the first and the last phase on the devices
      at hand, and report what the compiler says.
  """
  video = options.spec(config.data.to_dict()).shape
  method = methods.build(config.method, video, encoders.module_of)
  devices = _devices(config)
  examples, note = _examples(config)
  lines = [f'clips {_x(video)}, batch {config.batch_size}, {note}']
  total_flops = 0.0
  spans = run_lib.spans(method)
  for span in spans:
    text, flops = _phase(config, method, span, video, devices, examples or 1)
    lines += text
    total_flops += flops * span.phase.steps
  steps = spans[-1].end
  clips = steps * config.batch_size
  epochs = f', {clips / examples:.1f} epochs' if examples else ''
  lines.append(
    f'in all: {steps} steps, {clips:,} clips{epochs}, {total_flops:.3g} FLOPs'
  )
  peak = metrics.peak_flops(config.log.peak_tflops)
  if peak:
    hours = total_flops / (0.4 * peak * devices * 3600)
    lines.append(f'about {hours:.1f} hours at 40 % of the peak of {devices}')
  if compile_phases:
    for span in {s.phase.name: s for s in (spans[0], spans[-1])}.values():
      lines.append(_compiled(config, method, span, video, examples or 1))
  return '\n'.join(lines)


def _x(shape: tuple[int, ...]) -> str:
  return 'x'.join(map(str, shape))


def _devices(config: ml_collections.ConfigDict) -> int:
  """Returns the devices planned for: the config's, else those at hand."""
  if config.mesh.data > 0 and config.mesh.fsdp > 0:
    return config.mesh.data * config.mesh.fsdp
  return jax.device_count()


def _fsdp(config: ml_collections.ConfigDict, devices: int) -> int:
  return (
    config.mesh.fsdp
    if config.mesh.fsdp > 0
    else (devices // max(config.mesh.data, 1))
  )


def _examples(config: ml_collections.ConfigDict) -> tuple[int, str]:
  """Returns how many videos there are, 0 if they are not at hand."""
  if not config.data.source:
    return 0, 'data.source is not set'
  with contextlib.suppress(OSError, ValueError):
    found = len(options.find(config.data.to_dict()))
    return found, f'{found:,} videos'
  return 0, f'{config.data.source} is not at hand'


def _phase(
  config: ml_collections.ConfigDict,
  method: base.Method,
  span: run_lib.Span,
  video: tuple[int, ...],
  devices: int,
  examples: int,
) -> tuple[list[str], float]:
  """Returns the lines of one phase, and the FLOPs of its step."""
  phase = span.phase
  state, _ = _state(config, method, span, video, examples)
  cost = method.cost(phase, video)
  horizon = optimizer.horizon(phase, span.start, span.total)
  warmup = optimizer.warmup_steps(config.optim, horizon, phase.name)
  sizes = ', '.join(
    f'{role} {trees.count(tree) / 1e6:.2f} M'
    for role, tree in state.params.items()
  )
  per_step = cost.total * config.batch_size
  memory = _memory(config, method, phase, state, video, devices)
  shown = ', '.join(f'{k} {v / GIB:.2f}' for k, v in memory.items())
  lines = [
    f'phase {phase.name}: steps {span.start} to {span.end}, warm-up {warmup}, '
    f'{optimizer.describe_lr(config.optim, config.batch_size)}',
    f'  parameters: {sizes}',
    *(
      f'  teacher {name}: {t.source}, '
      f'{trees.count(_teacher_shapes(t, video)) / 1e6:.2f} M, {t.dtype}, '
      f'{100 * cost.frozen / cost.total:.0f} % of the FLOPs'
      for name, t in phase.teachers.items()
    ),
    f'  per step: {per_step:.3g} FLOPs ({cost.total / 1e12:.3f} TF per clip)',
    f'  GiB per device of {devices}: {shown}; '
    f'{sum(memory.values()) / GIB:.2f} in all (activations are an estimate)',
  ]
  return lines, per_step


def _state(
  config: ml_collections.ConfigDict,
  method: base.Method,
  span: run_lib.Span,
  video: tuple[int, ...],
  examples: int,
) -> tuple[step.TrainState, Any]:
  """Returns the shapes of a phase's state, and its optimizer and labels."""
  phase, key = span.phase, jax.random.key(0)
  clip = jax.ShapeDtypeStruct((1, *video), jnp.uint8)
  shapes = jax.eval_shape(lambda k, v: method.init(k, v, phase), key, clip)
  labels = freezing.labels(shapes, phase.frozen)
  horizon = optimizer.horizon(phase, span.start, span.total)
  tx = optimizer.make(
    config.optim,
    labels,
    optimizer.learning_rate(config.optim, horizon, config.batch_size),
    optimizer.weight_decay(config.optim, horizon),
  )
  state = jax.eval_shape(
    lambda: step.init_state(method, phase, tx, key, video, examples, span.start)
  )
  return state, (tx, labels)


def _teacher_shapes(teacher: base.Teacher, video: tuple[int, ...]) -> Any:
  shapes = jax.eval_shape(
    teacher.module.init,
    jax.random.key(0),
    jax.ShapeDtypeStruct((1, *video), jnp.uint8),
  )['params']
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(teacher.dtype)), shapes
  )


def _memory(
  config: ml_collections.ConfigDict,
  method: base.Method,
  phase: base.Phase,
  state: step.TrainState,
  video: tuple[int, ...],
  devices: int,
) -> dict[str, float]:
  """Returns bytes per device by what they are for."""
  fsdp = _fsdp(config, devices)

  def share(tree: Any) -> float:
    return sum(
      math.prod(x.shape)
      * x.dtype.itemsize
      / (fsdp if sharding.spec(name, x.shape, fsdp) else 1)
      for name, x in trees.named_leaves(tree)
    )

  teachers = {n: _teacher_shapes(t, video) for n, t in phase.teachers.items()}
  local = config.batch_size / devices / config.optim.accumulate
  memory = {
    'parameters': share(state.params),
    'gradients': share(state.params),
    'optimizer': share(state.opt),
    'averages': share(state.ema),
    'teachers': share(teachers),
    'rows': share(state.rows),
    'batch': 2 * config.batch_size / devices * math.prod(video),
    'activations': local * method.cost(phase, video).activations,
  }
  return {k: v for k, v in memory.items() if v}


def _compiled(
  config: ml_collections.ConfigDict,
  method: base.Method,
  span: run_lib.Span,
  video: tuple[int, ...],
  examples: int,
) -> str:
  """Compiles a phase's step for the devices at hand."""
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  state, (tx, labels) = _state(config, method, span, video, examples)
  teachers = {
    n: _teacher_shapes(t, video)
    for n, t in span.phase.teachers.items()
    if not t.source.startswith('@ema/')
  }
  update = step.make_update(
    method,
    span.phase,
    tx,
    labels,
    key=jax.random.key(0),
    start=span.start,
    accumulate=config.optim.accumulate,
  )
  at = sharding.batch_sharding(mesh)
  size = config.batch_size
  batch = {
    'video': jax.ShapeDtypeStruct((size, *video), np.uint8, sharding=at),
    'index': jax.ShapeDtypeStruct((size,), np.int32, sharding=at),
    'repeat': jax.ShapeDtypeStruct((size,), np.int32, sharding=at),
    'progress': jax.ShapeDtypeStruct((), np.float32),
  }
  with jax.set_mesh(mesh):
    compiled = (
      step.jit_update(update, state, teachers, mesh)
      .lower(state, teachers, batch)
      .compile()
    )
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
  return (
    f'compiled {span.phase.name} for {mesh.size} x '
    f'{jax.devices()[0].device_kind}: temporary '
    f'{memory.temp_size_in_bytes / GIB:.2f} GiB, arguments '
    f'{memory.argument_size_in_bytes / GIB:.2f} GiB per device, '
    f'{cost.get("flops", 0):.3g} FLOPs by the compiler '
    '(of this machine, not of another)'
  )
