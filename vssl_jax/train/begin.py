"""How a phase starts: its state restored, carried over or fresh; teachers."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections

from vssl_jax import config as config_lib
from vssl_jax import encoders, sharding, trees
from vssl_jax.methods import base
from vssl_jax.models import compare
from vssl_jax.train import ahead, checkpoint, manifests, metrics, step
from vssl_jax.train.run import Run, Span, TrainingError


def state(
  run: Run,
  shapes: ahead.Outline,
  saved: manifests.Saved | None,
  inside: bool,
  fresh: Callable[[], step.TrainState] | None = None,
) -> step.TrainState:
  """Returns the state to start from: restored, or begun.

  Args:
    run: the run.
    shapes: of the phase.
    saved: checkpoint to start from, if any.
    inside: whether it lies inside the phase, and is restored whole.
    fresh: `shapes.fresh` compiled, if it is.
  """
  target = ahead.placed(run.config, shapes.state, run.mesh)
  if inside:
    with run.clock('checkpoint'):
      state = _restore(run, saved, target)
    last = metrics.last_step(run.workdir, shapes.span.total)
    lost = last - int(state.step)
    run.logger.say(f'resumed {saved.path.name} ({max(lost, 0)} steps lost)')
    run.logger.write(
      int(state.step), {'lost_steps': max(lost, 0)}, event='resumed'
    )
    return state
  if fresh is None:
    with run.clock('compile'):
      at = jax.tree.map(lambda x: x.sharding, target)
      fresh = jax.jit(shapes.fresh, out_shardings=at).lower().compile()
  return _begin(run, shapes.span, fresh(), target, saved)


def _restore(run: Run, saved: manifests.Saved, target: Any) -> Any:
  """Restores; one whose values are rotten gives way to the one before."""
  try:
    return checkpoint.restore(saved, target)
  except checkpoint.RottenError as error:
    run.checkpoints.set_aside(saved, str(error))
    older = run.checkpoints.newest()
    if older is None or older.phase != saved.phase:
      raise TrainingError(
        f'{error}; no older state of phase {saved.phase!r} is kept. Start the '
        'command again: the phase begins anew from the one before it'
      ) from error
    return _restore(run, older, target)


def _begin(
  run: Run,
  span: Span,
  state: step.TrainState,
  target: step.TrainState,
  saved: manifests.Saved | None,
) -> step.TrainState:
  """Carries over by name what the phase asks for, and loads `init_from`.

  The order matters: averages are derived last, from the parameters that the
  phase starts with.
  """
  phase = span.phase
  carried = _carried(run, phase, target, saved)
  if carried:
    state = trees.map_named(carried.get, state)
    run.logger.say(
      f'phase {phase.name}: carried {len(carried)} of '
      f'{len(trees.named_leaves(target))} leaves from {saved.phase}'
    )
  if phase.init_from:
    params = _started(run, phase, state.params)
    state = dataclasses.replace(state, params=params)
  if not carried and not phase.init_from:
    return state
  return dataclasses.replace(state, ema=_averages(phase, state, carried))


def _carried(
  run: Run,
  phase: base.Phase,
  target: step.TrainState,
  saved: manifests.Saved | None,
) -> dict[str, Any]:
  """Reads the leaves of the phase before that this one takes over, by name."""
  parts = {
    'params': phase.init == 'carry',
    'ema': phase.init == 'carry',
    'opt': phase.opt == 'carry',
    'rows': phase.rows == 'carry',
  }
  if saved is None or not any(parts.values()):
    return {}
  there = dict(trees.named_leaves(saved.shapes()))
  wanted = {
    name: x
    for name, x in trees.named_leaves(target)
    if parts.get(name.split('/')[0])
    and name in there
    and there[name].shape == x.shape
  }
  return _carry(saved, wanted, there) if wanted else {}


def check_sources(
  config: ml_collections.ConfigDict, phases: Sequence[base.Phase]
) -> None:
  """Refuses `init_from` of other networks, before any weights are read.

  Args:
    config: a resolved config.
    phases: all of the run.

  Raises:
    ValueError: a source that computes another function than its phase.
  """
  for i, phase in enumerate(phases):
    for role, source in phase.init_from.items():
      if source.startswith('@'):
        before = {p.name: p for p in phases[:i]}
        if source[1:] not in before:
          raise ValueError(
            f'phase {phase.name!r}: {role} starts from {source!r}, wanted a '
            f'phase before it ({", ".join("@" + n for n in before) or "none"}),'
            ' a run folder or published weights'
          )
        network = getattr(before[source[1:]], role, None)
        _check_source(config, phase, role, source, network)
      elif role == 'encoder':
        _check_source(config, phase, role, source, encoders.module_of(source))


def _check_source(
  config: ml_collections.ConfigDict,
  phase: base.Phase,
  role: str,
  source: str,
  found: Any,
) -> None:
  """Refuses weights of a network that computes another function.

  Args:
    config: a resolved config.
    phase: that starts from the weights.
    role: whose weights they are.
    source: where they come from.
    found: their network; None where a role is no field of its phase.
  """
  network = getattr(phase, role, None)
  if found is None or network is None:
    return
  differing = compare.differing_fields(found, network)
  if not differing:
    return
  fields = []
  for field, (theirs, ours) in differing.items():
    key = _config_key(config, phase.name, role, field)
    remedy = f'--config.{key}={theirs!r}' if key else 'no config key sets it'
    fields.append(f'{field} is {theirs!r} there and {ours!r} here ({remedy})')
  raise ValueError(
    f'phase {phase.name!r}: {role} cannot start from {source}, a network of '
    f'another function: {"; ".join(fields)}'
  )


def _config_key(
  config: ml_collections.ConfigDict, phase: str, role: str, field: str
) -> str:
  """Returns the config key that sets a network's field; '' where none does."""
  shared = [
    f'method.{name}'
    for name, section in config.method.items()
    if isinstance(section, ml_collections.ConfigDict) and 'steps' not in section
  ]
  sections = [f'method.{phase}.{role}', f'method.{phase}', f'method.{role}']
  name = field.rpartition('.')[2]
  keys = dict(config_lib.flatten(config))
  for section in (*sections, *shared, 'data'):
    for last in (name, name.removeprefix('num_')):
      if f'{section}.{last}' in keys:
        return f'{section}.{last}'
  return ''


def _started(run: Run, phase: base.Phase, params: Any) -> dict[str, Any]:
  """Returns the parameters with those of `init_from` in place of the fresh."""
  params = dict(params)
  for role, source in phase.init_from.items():
    module, values = _load_source(run, source, role)
    _check_source(run.config, phase, role, source, module)
    if role == 'encoder':  # learned positions fit the clips of the run
      loaded = encoders.Encoder(module, values, source, run.video)
      values = loaded.at(run.video).params
    stored = dict(trees.named_leaves(params[role]))
    values = trees.map_named(
      lambda name, x, stored=stored: (
        jax.device_get(x).astype(stored[name].dtype) if name in stored else x
      ),
      values,
    )
    differing = trees.difference(values, trees.shapes(params[role]))
    if differing:
      raise ValueError(
        f'phase {phase.name!r}: {role} cannot start from {source}:\n{differing}'
      )
    at = jax.tree.map(lambda x: x.sharding, params[role])
    params[role] = jax.device_put(values, at)
  return params


def _load_source(run: Run, source: str, role: str) -> tuple[Any, Any]:
  """Loads a role from outside, or from an earlier phase (`@name`).

  Returns:
    Its network, None where the role is no field of a phase, and parameters.
  """
  if not source.startswith('@'):
    return encoders.load_role(source, role)
  before = next(p for p in run.method.phases() if p.name == source[1:])
  params = _kept_role(run, _kept(run, source), role)
  return getattr(before, role, None), params


def _averages(
  phase: base.Phase, state: step.TrainState, carried: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the averages: leaves that were not carried equal the parameters.

  Those of a role in `init_from` are never carried: the average would be of
  other weights than those that the phase trains.
  """
  averages = dict(state.ema)
  for name, average in phase.ema.items():
    old = averages[name]
    shardings = jax.tree.map(lambda x: x.sharding, old)
    copied = jax.jit(step.copy_params, out_shardings=shardings)(
      state.params[average.of]
    )
    if average.of not in phase.init_from:
      prefix = f'ema/{name}/'
      copied = trees.map_named(
        lambda leaf, x, prefix=prefix: carried.get(prefix + leaf, x), copied
      )
    averages[name] = copied
  return averages


def _carry(
  saved: manifests.Saved,
  wanted: Mapping[str, jax.ShapeDtypeStruct],
  there: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, Any]:
  """Reads leaves by name, in the types that this phase stores them in."""
  as_saved = {
    name: jax.ShapeDtypeStruct(x.shape, there[name].dtype, sharding=x.sharding)
    for name, x in wanted.items()
  }
  read = checkpoint.read_leaves(saved, as_saved)
  return {name: x.astype(wanted[name].dtype) for name, x in read.items()}


def teachers(run: Run, phase: base.Phase) -> dict[str, Any]:
  """Returns name -> parameters, but for averages: those are in the state."""
  return {
    name: _teacher_params(run, teacher)
    for name, teacher in phase.teachers.items()
    if not teacher.source.startswith('@ema/')
  }


def _teacher_params(run: Run, teacher: base.Teacher) -> Any:
  """Returns a teacher's parameters, sharded like any others, in its dtype."""
  with run.clock('start'):
    if teacher.source.startswith('@'):
      params = _kept_params(run, teacher)
    else:
      loaded = encoders.load_as(teacher.source, teacher.module)
      params = jax.device_get(loaded.at(run.video).params)
    at = sharding.shardings(params, run.mesh, dict(run.config.mesh.overrides))
    params = jax.device_put(params, at)
    return jax.jit(lambda p: trees.cast(p, teacher.stored), out_shardings=at)(
      params
    )


def _kept(run: Run, source: str) -> manifests.Saved:
  """Returns the saved end of an earlier phase, such as `@pixel_teacher`."""
  saved = run.checkpoints.params_of(source[1:])
  wrong = manifests.damage(saved) if saved else 'they were never saved'
  if wrong:
    raise TrainingError(
      f'{source}: no usable parameters under '
      f'{run.checkpoints.params_folder}: {wrong}'
    )
  return saved


def _kept_params(run: Run, teacher: base.Teacher) -> Any:
  """Reads what an earlier phase of this run ended with."""
  saved = _kept(run, teacher.source)
  if teacher.subtree:
    return _kept_role(run, saved, teacher.subtree)
  # The phase may have trained more than the teacher needs.
  roles = ahead.teacher_shapes(teacher, run.video)
  return {role: _kept_role(run, saved, role) for role in roles}


def _kept_role(run: Run, saved: manifests.Saved, role: str) -> Any:
  subtree = f'params/{role}'
  target = ahead.placed(run.config, saved.shapes(subtree), run.mesh)
  return checkpoint.restore(saved, target, subtree)
