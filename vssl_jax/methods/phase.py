"""The interface between a method and the trainer.

A run is a tuple of phases. A phase is a stretch of steps that share one
compiled step. Values that differ between phases are static fields of the
phase; values that change within a phase are arrays. The trainer uses only this
interface, and a method handles no files, optimizers or meshes.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float, Num

from vssl_jax import rngs, trees
from vssl_jax.masks import sampling, tubelets
from vssl_jax.models import compatibility, layers

Params = Mapping[str, Any]  # role -> tree: {'encoder': ..., 'predictor': ...}
TARGETS = 'targets/'  # prefix of target keys in a batch
MEMORY_DTYPES = ('float32', 'float16')
# `float8` needs a device with 8-bit matrix units; `float8_emulated` runs on any
# device.
FLOAT8 = ('float8', 'float8_emulated')
TEACHER_DTYPES = ('float32', 'bfloat16', *FLOAT8)
# uint8, or float in [0, 1].
Video = Num[Array | np.ndarray, 'B T H W C']


class Aux(NamedTuple):
  """Auxiliary outputs of a loss.

  Attributes:
    metrics: scalars by name; loss terms under `loss/...`.
    memory: name -> new values [B, ...] for the examples of the batch, one entry
      for each of the phase's `memory_specs`.
  """

  metrics: Mapping[str, Array]
  memory: Mapping[str, Array] = {}


class Cost(NamedTuple):
  """Matrix FLOPs (2 per multiply-add) and memory of one clip's train step.

  Attributes:
    trained: FLOPs of the forward and backward pass (2x forward) of the trained
      networks.
    frozen: FLOPs of the forward pass of the teachers.
    activations: estimated bytes stored for the backward pass.
    tokens: role or teacher -> tokens per clip that its network processes in a
      step, for the rule 6ND + 2ND; empty where the rule does not apply, such
      as for networks with a different number of tokens in each stage.
  """

  trained: float
  frozen: float = 0.0
  activations: float = 0.0
  tokens: Mapping[str, float] = {}

  @property
  def total(self) -> float:
    """FLOPs of the step per clip."""
    return self.trained + self.frozen


class Seen(NamedTuple):
  """A mask of a step, for visualisation.

  Attributes:
    mask: mask of the encoder's tokens.
    scores: float32 [B, N], teacher scores per token, where the mask was drawn
      from them; else None.
  """

  mask: sampling.Mask
  scores: Array | None = None


class Reconstruction(NamedTuple):
  """Predicted pixels of a pixel phase, for visualisation.

  Attributes:
    mask: visible and predicted (masked) patches.
    predicted: float32 [B, M, PC], in the units of the target.
    kind: normalisation of the target, `kind` of `losses.pixel_targets`.
    every: frame interval of the predictions; an image model predicts one frame
      in `every`.
  """

  mask: sampling.Mask
  predicted: Array
  kind: str
  every: int = 1


@dataclasses.dataclass(frozen=True)
class Ema:
  """Exponential moving average of the parameters of one role.

  Attributes:
    of: role whose parameters are averaged, such as `encoder`.
    momentum: (first, last), linear in the step over the phase:
      `ema <- m * ema + (1 - m) * params[of]` after each optimizer step.
  """

  of: str
  momentum: tuple[float, float]

  def __post_init__(self) -> None:
    if not all(0 <= m <= 1 for m in self.momentum):
      raise ValueError(
        f'EMA momentum of {self.of!r}: found {self.momentum}, wanted two '
        'numbers between 0 and 1'
      )


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A frozen model whose outputs are targets.

  Its parameters are stored outside the train state: they are not optimised,
  not donated and not saved again.

  Attributes:
    module: the network; a checkpoint is checked against it.
    source: `@phase` (an earlier phase of this run), `@ema/<name>` (an average
      computed by this phase), or a run folder or published model.
    subtree: role of the source's parameters to use; '' for all parameters of
      the module.
    dtype: type that the parameters are cast to. `float32`: the teacher also
      computes in float32. `bfloat16`: it computes in the dtype of its module.
      `float8`: parameters are bfloat16, and the matrix products of its blocks
      run in 8 bits, on devices that support it; `float8_emulated`: the same on
      any device, but slower.
  """

  module: nn.Module
  source: str
  subtree: str = 'encoder'
  dtype: str = 'bfloat16'

  @property
  def stored(self) -> str:
    """Type that the parameters are stored in."""
    return 'bfloat16' if self.dtype in FLOAT8 else self.dtype

  def __post_init__(self) -> None:
    if self.dtype not in TEACHER_DTYPES:
      raise ValueError(
        f'teacher {self.source}: found dtype={self.dtype!r}, wanted one of '
        f'{TEACHER_DTYPES}'
      )
    if self.dtype in FLOAT8 and not hasattr(self.module, 'products'):
      raise ValueError(
        f'teacher {self.source}: found dtype={self.dtype!r} for a '
        f'{type(self.module).__name__}, which is no ViT; wanted one of '
        f'{TEACHER_DTYPES[:2]}'
      )
    if not self.source:
      raise ValueError(
        'a teacher needs a source: @<phase>, @ema/<name>, a run folder or a '
        'published model; an empty one would train against random weights'
      )

  def __call__(
    self, params: Any, video: Video, *args: Any, **kwargs: Any
  ) -> Any:
    """Returns the outputs of the module, without gradients."""
    params = jax.lax.stop_gradient(trees.cast(params, self.stored))
    module = self.module
    if self.dtype in FLOAT8:
      module = module.clone(products='float8')
    elif self.dtype == 'float32':
      module = layers.with_dtype(module, 'float32')
    return jax.lax.stop_gradient(
      module.apply({'params': params}, video, *args, **kwargs)
    )


@dataclasses.dataclass(frozen=True)
class MemorySpec:
  """Specification of an array per training example, kept in the train state.

  A loss reads `batch['example_memory/<name>']`, float32 [B, *shape], and
  returns the new value in `Aux.memory[name]`. The memory of examples outside
  the batch does not change.

  Attributes:
    shape: shape per example.
    dtype: floating-point type of the stored memory; arithmetic is float32.
    fill: value before the first visit of an example, and for a substitute clip.
    window: length of a window in steps; 0 for no windows. With windows,
      `batch['example_memory/<name>@window']` is the memory at the end of the
      last window. Windows are counted from the start of the phase.
  """

  shape: tuple[int, ...]
  dtype: str = 'float32'
  fill: float = 0.0
  window: int = 0

  def __post_init__(self) -> None:
    if self.dtype not in MEMORY_DTYPES:
      raise ValueError(
        f'memory_dtype: found {self.dtype!r}, wanted one of {MEMORY_DTYPES}'
      )
    if self.window < 0:
      raise ValueError(
        f'window: found {self.window}, wanted steps, or 0 for no windows'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
  """A stretch of steps that share one compiled step.

  Attributes:
    name: unique in the run; checkpoints and `@name` teachers refer to it.
    steps: length in optimizer steps.
    encoder: the module used by `Method.encode`.
    frozen: regular expressions over the names of parameters that get no
      gradient and no update.
    teachers: name -> teacher.
    init: `carry` takes parameters by name from the previous phase, `fresh`
      uses `Method.init`.
    opt: the same for the optimizer's moments.
    example_memory: the same for the example memory, by name.
    memory_specs: name -> specification of the example memory of this phase.
    init_from: role -> source, for parameters that are initialised from a run
      folder or a published model.
    horizon: range of the learning-rate and weight-decay schedules: `phase` for
      one schedule per phase, `run` for one schedule over all consecutive phases
      with this value.
    warmup: warm-up steps of that horizon; None for the optimizer's setting.
    rewarm: (steps, factor): over the first `steps` of the phase the learning
      rate is multiplied by a value that rises from `factor` to 1.
    frozen_dtype: type that frozen matrices are stored in.
    ema: name -> average to compute.
    alarms: metric -> (lowest healthy value, message with cause and remedy);
      logged at most once per start of the program.
  """

  name: str
  steps: int
  encoder: nn.Module
  frozen: tuple[str, ...] = ()
  teachers: Mapping[str, Teacher] = dataclasses.field(default_factory=dict)
  init: Literal['carry', 'fresh'] = 'carry'
  opt: Literal['carry', 'fresh'] = 'carry'
  example_memory: Literal['carry', 'fresh'] = 'carry'
  memory_specs: Mapping[str, MemorySpec] = dataclasses.field(
    default_factory=dict
  )
  init_from: Mapping[str, str] = dataclasses.field(default_factory=dict)
  horizon: Literal['phase', 'run'] = 'phase'
  warmup: int | None = None
  rewarm: tuple[int, float] = (0, 1.0)
  frozen_dtype: str = 'float32'
  ema: Mapping[str, Ema] = dataclasses.field(default_factory=dict)
  alarms: Mapping[str, tuple[float, str]] = dataclasses.field(
    default_factory=dict
  )

  def __post_init__(self) -> None:
    if self.steps < 1:
      raise ValueError(
        f'phase {self.name!r}: found steps={self.steps}, wanted at least 1'
      )
    if not 0 <= self.rewarm[0] <= self.steps or not 0 < self.rewarm[1] <= 1:
      raise ValueError(
        f'phase {self.name!r}: found rewarm={self.rewarm}, wanted at most '
        f'{self.steps} steps and a factor in (0, 1]'
      )
    for name, teacher in self.teachers.items():
      ema = teacher.source.removeprefix('@ema/')
      if ema != teacher.source and ema not in self.ema:
        raise ValueError(
          f'phase {self.name!r}: teacher {name!r} reads @ema/{ema}, and the '
          f'averages kept are {sorted(self.ema)}'
        )


class Method(abc.ABC):
  """A training method: phases, initial parameters and one pure loss.

  Subclasses are frozen dataclasses of hyper-parameters and modules.
  """

  @abc.abstractmethod
  def phases(self) -> tuple[Phase, ...]:
    """Returns the phases of the run, a pure function of the fields."""

  @abc.abstractmethod
  def init(self, rng: Array, video: Video, phase: Phase) -> Params:
    """Returns random initial parameters of a phase, role -> tree."""

  @abc.abstractmethod
  def loss(
    self,
    params: Params,
    teachers: Mapping[str, Any],
    batch: Mapping[str, Any],
    rng: rngs.Rng,
    phase: Phase,
  ) -> tuple[Float[Array, ''], Aux]:
    """Returns the loss to minimise and its metrics.

    Args:
      params: role -> tree, of the phase.
      teachers: name -> parameters of `phase.teachers[name].module`.
      batch: `video` uint8 [B, T, H, W, C], `index` int32 [B], `progress`
        float32 [] (fraction of the run), example memory and other entries.
      rng: named random streams of this step; the loss draws masks from them.
      phase: one of `phases()`.
    """

  def targets(
    self, teachers: Mapping[str, Any], video: Video, phase: Phase
  ) -> Mapping[str, Float[Array, 'B ...']]:
    """Returns the outputs of frozen teachers.

    They depend neither on masks nor on trained parameters. They are computed
    once per clip for all masks and losses, and can be cached: for a batch with
    `targets/<name>` the teachers are not run. (Outputs of an average change
    with every step and are not worth caching.) Arguments as in `loss`.
    """
    del teachers, video, phase
    return {}

  def targets_of(
    self,
    teachers: Mapping[str, Any],
    batch: Mapping[str, Any],
    phase: Phase,
  ) -> Mapping[str, Float[Array, 'B ...']]:
    """Returns the targets in the batch, or computes them with the teachers."""
    targets = {
      k.removeprefix(TARGETS): x
      for k, x in batch.items()
      if k.startswith(TARGETS)
    }
    return targets or self.targets(teachers, batch['video'], phase)

  @abc.abstractmethod
  def cost(self, phase: Phase, video: tuple[int, ...]) -> Cost:
    """Returns the cost of a train step per clip.

    Args:
      phase: one of `phases()`.
      video: (T, H, W, C) of a clip.
    """

  def encode(
    self,
    params: Params,
    video: Video,
    depth: float | None = None,
    phase: Phase | None = None,
  ) -> Float[Array, 'B N D']:
    """Returns the encoder's tokens of whole clips, for evaluation and users.

    Args:
      params: role -> tree, of the phase; only `encoder` is read.
      video: uint8, or float in [0, 1]: [B, T, H, W, C].
      depth: fraction of the blocks to run; None for all of them and the final
        norm.
      phase: phase whose encoder is used; None for the last phase.
    """
    phase = phase or self.phases()[-1]
    return phase.encoder.apply(
      {'params': params['encoder']}, video, depth=depth
    )

  def masks(
    self,
    teachers: Mapping[str, Any],
    batch: Mapping[str, Any],
    rng: rngs.Rng,
    phase: Phase,
  ) -> Mapping[str, Seen]:
    """Returns the masks of a step by name, for visualisation.

    Empty for a phase without masks. Arguments as in `loss`; `teachers` may omit
    teachers whose outputs no mask depends on.
    """
    del teachers
    grid = tubelets.grid_of(batch['video'].shape, phase.encoder.patch)
    return {
      spec.name: Seen(spec.draw(rng, batch, grid)[0])
      for spec in getattr(phase, 'masks', ())
    }

  def reconstruct(
    self,
    params: Params,
    batch: Mapping[str, Any],
    rng: rngs.Rng,
    phase: Phase,
  ) -> Mapping[str, Reconstruction]:
    """Returns predicted pixels by mask, for visualisation.

    Empty for a phase that predicts no pixels. Arguments as in `loss`.
    """
    del params, batch, rng, phase
    return {}


def check(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
  """Checks the phases of a run and returns them.

  Raises:
    ValueError: there is no phase, a name is used twice, a teacher `@phase` is
      not an earlier phase, or parameters would be loaded into a network that
      computes another function.
  """
  if not phases:
    raise ValueError('the run has no phases: method.phases is empty')
  seen: dict[str, Phase] = {}
  for i, phase in enumerate(phases):
    if phase.name in seen:
      raise ValueError(f'two phases are named {phase.name!r}')
    for name, teacher in phase.teachers.items():
      source = teacher.source
      if source.startswith('@ema/'):
        average = phase.ema[source.removeprefix('@ema/')]
        _check_teacher(phase, name, getattr(phase, average.of, None))
      elif source.startswith('@'):
        if source[1:] not in seen:
          raise ValueError(
            f'phase {phase.name!r}: teacher {name!r} has source {source!r}, '
            f'and the phases before it are {[*seen]}; run that phase first, or '
            'give the folder of a run that has'
          )
        _check_teacher(phase, name, _network(seen[source[1:]], teacher))
    if i and phase.init == 'carry':
      _check_carry(phases[i - 1], phase)
    seen[phase.name] = phase
  return phases


def _network(phase: Phase, teacher: Teacher) -> nn.Module | None:
  """Returns the network of a phase whose parameters a teacher uses."""
  if teacher.subtree:
    return getattr(phase, teacher.subtree, None)
  fields = [getattr(phase, f.name) for f in dataclasses.fields(phase)]
  return next((x for x in fields if type(x) is type(teacher.module)), None)


def _check_teacher(phase: Phase, name: str, trained: nn.Module | None) -> None:
  """Raises if a teacher computes another function than the trained network."""
  teacher = phase.teachers[name]
  if trained is None:
    return
  differing = compatibility.differing_fields(trained, teacher.module)
  if differing:
    raise ValueError(
      f'phase {phase.name!r}: teacher {name!r} has the parameters of '
      f'{teacher.source}, a network of another function: '
      f'{compatibility.describe(differing)}'
    )


# Leaves of another shape are not carried over; this is logged.
_SHAPES = ('width', 'depth', 'mlp_width', 'out_width', 'num_mask_tokens')
_SHAPES += ('channels', 'depths')


def _check_carry(before: Phase, phase: Phase) -> None:
  """Raises if carried parameters would enter a network of another function."""
  for field in dataclasses.fields(phase):
    modules = getattr(before, field.name, None), getattr(phase, field.name)
    if not all(isinstance(x, nn.Module) for x in modules):
      continue
    differing = {
      name: values
      for name, values in compatibility.differing_fields(*modules).items()
      if name.rpartition('.')[2] not in _SHAPES
    }
    if differing:
      raise ValueError(
        f'phase {phase.name!r} carries the parameters of {before.name!r} into '
        f'another function: its {field.name} differs, '
        f'{compatibility.describe(differing)}. Make both alike, or start with '
        "init='fresh'"
      )
