"""The interface between a method and the trainer: `Phase`.

A run is a tuple of phases. A phase is a stretch of steps that share one
compiled step, and it carries its loss. Values that differ between phases are
static fields of the phase; values that change within a phase are arrays. The
trainer uses only this interface, and a phase handles no files, optimizers or
meshes.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Num

from vssl_jax import rngs, trees
from vssl_jax.data import batch as batch_lib
from vssl_jax.masks import sampling, tubelets
from vssl_jax.methods import cost as cost_lib
from vssl_jax.models import Module, compatibility, layers

Params = Mapping[str, Any]  # role -> tree: {'encoder': ..., 'predictor': ...}
MEMORY_DTYPES = ('float32', 'float16')
# `float8` needs a device with 8-bit matrix units; `float8_emulated` runs on any
# device.
FLOAT8 = ('float8', 'float8_emulated')
TEACHER_DTYPES = ('float32', 'bfloat16', *FLOAT8)
# Parts of the train state that a phase may carry over from the one before.
CARRY = ('params', 'opt', 'example_memory')
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


class DrawnMask(NamedTuple):
  """A mask of a step, for visualisation.

  Attributes:
    mask: mask of the encoder's tokens.
    scores: float32 [B, N], teacher scores per token, where the mask was drawn
      from them; else None.
    predicted: whether the masked tokens are predicted; else they are only
      hidden from the encoder.
  """

  mask: sampling.Mask
  scores: Array | None = None
  predicted: bool = True


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
    momentum: (first, last): `ema <- m * ema + (1 - m) * params[of]` after each
      optimizer step, with m = first + (last - first) * s / S after s of the S
      steps of the phase. The step from s to s + 1 uses s.
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
class FromPhase:
  """Source of parameters: the last ones of an earlier phase; text `@name`."""

  name: str

  def __str__(self) -> str:
    return f'@{self.name}'


@dataclasses.dataclass(frozen=True)
class FromEma:
  """Source of parameters: an EMA of the phase itself; text `@ema/name`."""

  name: str

  def __str__(self) -> str:
    return f'@ema/{self.name}'


@dataclasses.dataclass(frozen=True)
class FromWeights:
  """Source of parameters: a run folder, or published weights."""

  path: str

  def __str__(self) -> str:
    return self.path


Source = FromPhase | FromEma | FromWeights


def parse_source(text: str) -> Source:
  """Parses a source of parameters, as written in a config.

  Raises:
    ValueError: the text is empty.

  Example:
    >>> parse_source('@ema/encoder')
    FromEma(name='encoder')
  """
  if text.startswith('@ema/'):
    return FromEma(text.removeprefix('@ema/'))
  if text.startswith('@'):
    return FromPhase(text[1:])
  if not text:
    raise ValueError(
      'a source is missing; wanted @<phase>, @ema/<name>, a run folder or '
      'published weights (folder, file or hub id). Without one the parameters '
      'would be random'
    )
  return FromWeights(text)


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A model whose outputs are targets; it gets no gradient.

  Its parameters are an argument of the step: they are not donated and not saved
  again. Those of an average (`FromEma`) are part of the train state.

  Attributes:
    module: the network; a checkpoint is checked against it.
    source: where its parameters come from.
    subtree: role of the source's parameters to use; '' for all parameters of
      the module.
    dtype: type that the parameters are cast to. `float32`: the teacher also
      computes in float32. `bfloat16`: it computes in the dtype of its module.
      `float8`: parameters are bfloat16, and the matrix products of its blocks
      run in 8 bits, on devices that support it; `float8_emulated`: the same on
      any device, but slower.
  """

  module: Module
  source: Source
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

  A loss reads `batch.example_memory[name]`, float32 [B, *shape], and returns
  the new value in `Aux.memory[name]`. The memory of examples outside the batch
  does not change.

  Attributes:
    shape: shape per example.
    dtype: floating-point type of the stored memory; arithmetic is float32.
    fill: value before the first visit of an example, and for a substitute clip.
    window: length of a window in steps; 0 for no windows. With windows,
      `batch.example_memory['<name>@window']` is the memory at the end of the
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
class Phase(abc.ABC):
  """A stretch of steps that share one compiled step, and their loss.

  Subclasses are frozen dataclasses of options and modules. They implement
  `init` and `loss`, and `targets` if they have frozen teachers.

  Attributes:
    name: unique in the run; checkpoints and `FromPhase` refer to it.
    steps: length in optimizer steps.
    encoder: the module used by `encode`.
    masks: specifications of the masks; all are drawn in every step.
    mask_teacher: teacher that the masks depend on; '' for none.
    frozen: regular expressions for the beginning of the names of parameters,
      such as `encoder/block_00`, that get no gradient and no update.
    teachers: name -> teacher.
    carry: parts of the train state (`CARRY`) that are carried over, by name of
      the leaf, from the previous phase; the others start fresh. `params`
      includes the averages.
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
  encoder: Module
  masks: tuple[Any, ...] = ()
  mask_teacher: str = ''
  frozen: tuple[str, ...] = ()
  teachers: Mapping[str, Teacher] = dataclasses.field(default_factory=dict)
  carry: tuple[str, ...] = CARRY
  memory_specs: Mapping[str, MemorySpec] = dataclasses.field(
    default_factory=dict
  )
  init_from: Mapping[str, Source] = dataclasses.field(default_factory=dict)
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
    if not {*self.carry} <= {*CARRY}:
      raise ValueError(
        f'phase {self.name!r}: found carry={self.carry}, wanted some of {CARRY}'
      )
    for name, teacher in self.teachers.items():
      source = teacher.source
      if isinstance(source, FromEma) and source.name not in self.ema:
        raise ValueError(
          f'phase {self.name!r}: teacher {name!r} reads {source}, and the '
          f'averages of the phase are {sorted(self.ema)}'
        )

  @abc.abstractmethod
  def init(self, key: Array, video: Video) -> Params:
    """Returns random initial parameters, role -> tree.

    Args:
      key: key of the phase.
      video: clips [B, T, H, W, C], for their shape.
    """

  def targets(
    self, teachers: Mapping[str, Any], video: Video
  ) -> Mapping[str, Float[Array, 'B ...']]:
    """Returns the outputs of the teachers; none by default.

    They do not depend on masks and are computed once per clip for all of them.
    The loss finds them in `batch.targets`. If no teacher is an average, they
    can be cached on disk. Outputs that depend on masks are computed in `loss`.

    Args:
      teachers: name -> parameters of `self.teachers[name].module`.
      video: clips [B, T, H, W, C].
    """
    del teachers, video
    return {}

  @abc.abstractmethod
  def loss(
    self,
    params: Params,
    teachers: Mapping[str, Any],
    batch: batch_lib.Batch,
    rng: rngs.Rng,
  ) -> tuple[Float[Array, ''], Aux]:
    """Returns the loss to minimise and its metrics. A pure function.

    Args:
      params: role -> tree.
      teachers: name -> parameters of `self.teachers[name].module`.
      batch: clips, and the targets of these clips.
      rng: named random streams of this step; the loss draws masks from them.
    """

  def cost(self, video: tuple[int, ...]) -> cost_lib.Cost:
    """Returns the cost of a train step per clip of shape (T, H, W, C).

    It is counted in the traced program, which takes seconds. A phase can give
    a closed form instead, which agrees with `cost.traced`.
    """
    return cost_lib.traced(self, video)

  def encode(
    self, params: Params, video: Video, depth: float | None = None
  ) -> Float[Array, 'B N D']:
    """Returns the encoder's tokens of whole clips, for evaluation and users.

    Args:
      params: role -> tree; only `encoder` is read.
      video: clips [B, T, H, W, C].
      depth: tap as a fraction of the depth, counted as in 4DS, see `vit.tap`;
        None for all blocks and the final norm.
    """
    return self.encoder.apply({'params': params['encoder']}, video, depth=depth)

  def draw_masks(
    self, teachers: Mapping[str, Any], batch: batch_lib.Batch, rng: rngs.Rng
  ) -> Mapping[str, DrawnMask]:
    """Returns the masks of a step by name, for visualisation.

    Empty for a phase without masks. Arguments as in `loss`; of `teachers` only
    `mask_teacher` is needed.
    """
    del teachers
    grid = tubelets.grid_of(batch.video.shape, self.encoder.patch)
    return {
      spec.name: DrawnMask(spec.draw(rng, batch, grid)[0])
      for spec in self.masks
    }

  def reconstruct(
    self, params: Params, batch: batch_lib.Batch, rng: rngs.Rng
  ) -> Mapping[str, Reconstruction]:
    """Returns predicted pixels by mask, for visualisation.

    Empty for a phase that predicts no pixels. Arguments as in `loss`.
    """
    del params, batch, rng
    return {}


def check(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
  """Checks the phases of a run and returns them.

  Raises:
    ValueError: there is no phase, a name is used twice, a teacher is of no
      earlier phase, or parameters would be loaded into a network that
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
      if isinstance(source, FromEma):
        role = phase.ema[source.name].of
        _check_teacher(phase, name, getattr(phase, role, None))
      elif isinstance(source, FromPhase):
        if source.name not in seen:
          raise ValueError(
            f'phase {phase.name!r}: teacher {name!r} has source {source}, and '
            f'the phases before it are {[*seen]}; run that phase first, or '
            'give the folder of a run that has'
          )
        _check_teacher(phase, name, _network(seen[source.name], teacher))
    if i and 'params' in phase.carry:
      _check_carry(phases[i - 1], phase)
    seen[phase.name] = phase
  return phases


def _network(phase: Phase, teacher: Teacher) -> Module | None:
  """Returns the network of a phase whose parameters a teacher uses."""
  if teacher.subtree:
    return getattr(phase, teacher.subtree, None)
  fields = [getattr(phase, f.name) for f in dataclasses.fields(phase)]
  return next((x for x in fields if type(x) is type(teacher.module)), None)


def _check_teacher(phase: Phase, name: str, trained: Module | None) -> None:
  """Raises if a teacher computes another function than the trained network."""
  teacher = phase.teachers[name]
  if trained is None:
    return
  differing = compatibility.differing_fields(trained, teacher.module)
  if differing:
    raise ValueError(
      f'phase {phase.name!r}: teacher {name!r} has the parameters of '
      f'{teacher.source}, an incompatible network: '
      f'{compatibility.describe(differing)}'
    )


# Leaves of another shape are not carried over; this is logged.
_SHAPES = ('width', 'depth', 'mlp_width', 'out_width', 'num_mask_tokens')
_SHAPES += ('channels', 'depths')


def _check_carry(before: Phase, phase: Phase) -> None:
  """Raises if carried parameters would enter a network of another function."""
  for field in dataclasses.fields(phase):
    modules = getattr(before, field.name, None), getattr(phase, field.name)
    if not all(isinstance(x, Module) for x in modules):
      continue
    differing = {
      name: values
      for name, values in compatibility.differing_fields(*modules).items()
      if name.rpartition('.')[2] not in _SHAPES
    }
    if differing:
      raise ValueError(
        f'phase {phase.name!r} carries the parameters of {before.name!r} into '
        f'an incompatible network: its {field.name} differs, '
        f'{compatibility.describe(differing)}. Make both equal, or leave '
        "'params' out of its carry"
      )
