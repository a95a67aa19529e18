"""Initial state of a phase (restored, carried or fresh) and its teachers."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections

from vssl_jax import encoder, sharding, trees
from vssl_jax.checkpoint import integrity, manager
from vssl_jax.methods import phase as phase_lib
from vssl_jax.models import compatibility
from vssl_jax.train import phase_setup, train_step
from vssl_jax.train.run import Run, Span, TrainingError
from vssl_jax.utils import config_io, metrics


def state(
  run: Run,
  setup: phase_setup.PhaseSetup,
  saved: integrity.Saved | None,
  inside: bool,
  fresh: Callable[[], train_step.TrainState] | None = None,
) -> train_step.TrainState:
  """Returns the train state that a phase starts or resumes from.

  Args:
    run: the run.
    setup: setup of the phase.
    saved: checkpoint to start from, if any.
    inside: whether `saved` is of this phase; then its whole state is restored.
    fresh: `setup.fresh` compiled, if available.
  """
  target = phase_setup.placed(run.config, setup.state, run.mesh)
  if inside:
    with run.clock('checkpoint'):
      state = _restore(run, saved, target)
    last_step = metrics.last_step(run.workdir, setup.span.total)
    lost = last_step - int(state.step)
    run.logger.log(f'resumed {saved.path.name} ({max(lost, 0)} steps lost)')
    run.logger.write(
      int(state.step), {'lost_steps': max(lost, 0)}, event='resumed'
    )
    return state
  if fresh is None:
    with run.clock('compile'):
      shardings = jax.tree.map(lambda x: x.sharding, target)
      fresh = jax.jit(setup.fresh, out_shardings=shardings).lower().compile()
  return _begin(run, setup.span, fresh(), target, saved)


def _restore(run: Run, saved: integrity.Saved, target: Any) -> Any:
  """Restores a checkpoint; if its values are corrupt, the one before it."""
  try:
    return manager.restore(saved, target)
  except manager.CorruptCheckpointError as error:
    run.checkpoints.set_aside(saved, str(error))
    previous = run.checkpoints.newest()
    if previous is None or previous.phase != saved.phase:
      raise TrainingError(
        f'{error}; no older state of phase {saved.phase!r} is stored. Start '
        'the command again: the phase starts again from the previous phase'
      ) from error
    return _restore(run, previous, target)


def _begin(
  run: Run,
  span: Span,
  state: train_step.TrainState,
  target: train_step.TrainState,
  saved: integrity.Saved | None,
) -> train_step.TrainState:
  """Carries over state by name as the phase declares; loads `init_from`.

  The order matters: EMAs are computed last, from the parameters that the phase
  starts with.
  """
  phase = span.phase
  carried = _carried(run, phase, target, saved)
  if carried:
    state = trees.map_named(carried.get, state)
    run.logger.log(
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
  phase: phase_lib.Phase,
  target: train_step.TrainState,
  saved: integrity.Saved | None,
) -> dict[str, Any]:
  """Reads the leaves carried over from the previous phase, by name."""
  is_carried = {
    'params': 'params' in phase.carry,
    'ema': 'params' in phase.carry,
    'opt': 'opt' in phase.carry,
    'example_memory': 'example_memory' in phase.carry,
  }
  if saved is None or not any(is_carried.values()):
    return {}
  saved_shapes = dict(trees.named_leaves(saved.shapes()))
  shapes = {
    name: x
    for name, x in trees.named_leaves(target)
    if is_carried.get(name.split('/')[0])
    and name in saved_shapes
    and saved_shapes[name].shape == x.shape
  }
  return _carry(saved, shapes, saved_shapes) if shapes else {}


def check_sources(
  config: ml_collections.ConfigDict, phases: Sequence[phase_lib.Phase]
) -> None:
  """Checks the sources in `init_from` of all phases; reads no weights.

  Args:
    config: a resolved config.
    phases: all phases of the run.

  Raises:
    ValueError: a source is no earlier phase, or its network computes another
      function than that of the phase.
  """
  for i, phase in enumerate(phases):
    for role, source in phase.init_from.items():
      if not isinstance(source, phase_lib.FromWeights):
        prior = {str(phase_lib.FromPhase(p.name)): p for p in phases[:i]}
        if str(source) not in prior:
          raise ValueError(
            f"phase {phase.name!r}: {role} starts from '{source}', wanted a "
            f'phase before it ({", ".join(prior) or "none"}), a run folder or '
            'published weights'
          )
        network = getattr(prior[str(source)], role, None)
        _check_source(config, phase, role, source, network)
      elif role == 'encoder':
        network = encoder.module_of(source.path)
        _check_source(config, phase, role, source, network)


def _check_source(
  config: ml_collections.ConfigDict,
  phase: phase_lib.Phase,
  role: str,
  source: phase_lib.Source,
  found: Any,
) -> None:
  """Raises if weights are of a network that computes another function.

  Args:
    config: a resolved config.
    phase: phase that starts from the weights.
    role: role of the weights.
    source: source of the weights.
    found: network of the weights; None where a role is no field of its phase.
  """
  network = getattr(phase, role, None)
  if found is None or network is None:
    return
  differing = compatibility.differing_fields(found, network)
  if not differing:
    return
  fields = []
  for field, (theirs, ours) in differing.items():
    key = _config_key(config, phase.name, role, field)
    remedy = f'--config.{key}={theirs!r}' if key else 'no config key sets it'
    fields.append(f'{field} is {theirs!r} there and {ours!r} here ({remedy})')
  raise ValueError(
    f'phase {phase.name!r}: {role} cannot start from {source}, an incompatible '
    f'network: {"; ".join(fields)}'
  )


def _config_key(
  config: ml_collections.ConfigDict, phase: str, role: str, field: str
) -> str:
  """Returns the config key that sets a network's field; '' if none does."""
  shared = [
    f'method.{name}'
    for name, section in config.method.items()
    if isinstance(section, ml_collections.ConfigDict) and 'steps' not in section
  ]
  sections = [f'method.{phase}.{role}', f'method.{phase}', f'method.{role}']
  name = field.rpartition('.')[2]
  keys = dict(config_io.flatten(config))
  for section in (*sections, *shared, 'data'):
    for last in (name, name.removeprefix('num_')):
      if f'{section}.{last}' in keys:
        return f'{section}.{last}'
  return ''


def _started(run: Run, phase: phase_lib.Phase, params: Any) -> dict[str, Any]:
  """Returns the parameters with the roles in `init_from` loaded."""
  params = dict(params)
  for role, source in phase.init_from.items():
    module, values = _load_source(run, source, role)
    _check_source(run.config, phase, role, source, module)
    if role == 'encoder':  # resize learned positions to the clips of the run
      loaded = encoder.Encoder(module, values, str(source), run.video)
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
    shardings = jax.tree.map(lambda x: x.sharding, params[role])
    params[role] = jax.device_put(values, shardings)
  return params


def _load_source(
  run: Run, source: phase_lib.Source, role: str
) -> tuple[Any, Any]:
  """Loads a role from an external source or an earlier phase.

  Returns:
    The network, None where the role is no field of a phase, and parameters.
  """
  if isinstance(source, phase_lib.FromWeights):
    return encoder.load_role(source.path, role)
  earlier = next(p for p in run.phases if p.name == source.name)
  params = _kept_role(run, _kept(run, source), role)
  return getattr(earlier, role, None), params


def _averages(
  phase: phase_lib.Phase,
  state: train_step.TrainState,
  carried: Mapping[str, Any],
) -> dict[str, Any]:
  """Returns the EMAs: carried leaves, and copies of the parameters.

  The EMA of a role in `init_from` is never carried: it would average other
  weights than those that the phase trains.
  """
  averages = dict(state.ema)
  for name, average in phase.ema.items():
    old = averages[name]
    shardings = jax.tree.map(lambda x: x.sharding, old)
    values = jax.jit(train_step.copy_params, out_shardings=shardings)(
      state.params[average.of]
    )
    if average.of not in phase.init_from:
      prefix = f'ema/{name}/'
      values = trees.map_named(
        lambda leaf, x, prefix=prefix: carried.get(prefix + leaf, x), values
      )
    averages[name] = values
  return averages


def _carry(
  saved: integrity.Saved,
  wanted: Mapping[str, jax.ShapeDtypeStruct],
  there: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, Any]:
  """Reads leaves by name and casts them to the dtypes of this phase."""
  saved_shapes = {
    name: jax.ShapeDtypeStruct(x.shape, there[name].dtype, sharding=x.sharding)
    for name, x in wanted.items()
  }
  leaves = manager.read_leaves(saved, saved_shapes)
  return {name: x.astype(wanted[name].dtype) for name, x in leaves.items()}


def teachers(run: Run, phase: phase_lib.Phase) -> dict[str, Any]:
  """Returns teacher name -> parameters, except EMAs, which are in the state."""
  return {
    name: _teacher_params(run, teacher)
    for name, teacher in phase.teachers.items()
    if not isinstance(teacher.source, phase_lib.FromEma)
  }


def _teacher_params(run: Run, teacher: phase_lib.Teacher) -> Any:
  """Loads a teacher's parameters, shards them and casts to the stored dtype."""
  with run.clock('start'):
    if isinstance(teacher.source, phase_lib.FromPhase):
      params = _kept_params(run, teacher)
    else:
      loaded = encoder.load_as(str(teacher.source), teacher.module)
      params = jax.device_get(loaded.at(run.video).params)
    shardings = sharding.shardings(
      params, run.mesh, dict(run.config.mesh.overrides)
    )
    params = jax.device_put(params, shardings)
    return jax.jit(
      lambda p: trees.cast(p, teacher.stored), out_shardings=shardings
    )(params)


def _kept(run: Run, source: phase_lib.FromPhase) -> integrity.Saved:
  """Returns the saved parameters of a phase."""
  saved = run.checkpoints.params_of(source.name)
  problem = integrity.damage(saved) if saved else 'they were never saved'
  if problem:
    raise TrainingError(
      f'{source}: no usable parameters under '
      f'{run.checkpoints.params_folder}: {problem}'
    )
  return saved


def _kept_params(run: Run, teacher: phase_lib.Teacher) -> Any:
  """Loads teacher parameters from the end of an earlier phase."""
  saved = _kept(run, teacher.source)
  if teacher.subtree:
    return _kept_role(run, saved, teacher.subtree)
  # The phase may have trained more than the teacher needs.
  roles = phase_setup.teacher_shapes(teacher, run.video)
  return {role: _kept_role(run, saved, role) for role in roles}


def _kept_role(run: Run, saved: integrity.Saved, role: str) -> Any:
  subtree = f'params/{role}'
  target = phase_setup.placed(run.config, saved.shapes(subtree), run.mesh)
  return manager.restore(saved, target, subtree)
