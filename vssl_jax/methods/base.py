"""The contract between a method and the trainer.

A run is a tuple of phases; a phase is the stretch of steps that shares one
compiled step. What differs between phases is a static field of the phase;
what changes inside one is an array. The trainer knows only what stands here,
and a method knows no files, optimizers or meshes.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float, Num

from vssl_jax import masking, rngs, trees
from vssl_jax.models import compare, layers

Params = Mapping[str, Any]  # role -> tree: {'encoder': ..., 'predictor': ...}
TARGETS = 'targets/'  # of the entries of a batch
ROW_DTYPES = ('float32', 'float16')
# What teachers compute in 8 bits is said to be emulated where devices have no
# units for it.
FLOAT8 = ('float8', 'float8_emulated')
TEACHER_DTYPES = ('float32', 'bfloat16', *FLOAT8)
# uint8, or float in [0, 1].
Video = Num[Array | np.ndarray, 'B T H W C']


class Aux(NamedTuple):
  """What a loss returns beside its value.

  Attributes:
    metrics: scalars by name; loss terms under `loss/...`.
    rows: new values [B, ...] of the batch's rows, one for each of the phase's
      `row_specs`.
  """

  metrics: Mapping[str, Array]
  rows: Mapping[str, Array] = {}


class Cost(NamedTuple):
  """Matrix FLOPs (2 per multiply-add) and memory of one clip's train step.

  Attributes:
    trained: forward and backward (2x forward) of what is trained.
    frozen: forward of the teachers.
    activations: an estimate of the bytes that the backward pass keeps.
    tokens: role or teacher -> tokens of a clip that its network sees in a
      step, for the rule 6ND + 2ND; empty where the rule says nothing, as of
      networks whose tokens differ by stage.
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
  """A mask of a step, for pictures.

  Attributes:
    mask: of the encoder's tokens.
    scores: float32 [B, N], how much a teacher makes of each token, where the
      mask was drawn by that.
  """

  mask: masking.Mask
  scores: Array | None = None


class Reconstruction(NamedTuple):
  """What a pixel phase predicts, for pictures.

  Attributes:
    mask: what the encoder saw, and which patches were predicted.
    predicted: float32 [B, M, PC], in the units of the target.
    kind: how the target is normalised, of `losses.pixel_targets`.
    every: an image model predicts every so-many-th frame.
  """

  mask: masking.Mask
  predicted: Array
  kind: str
  every: int = 1


@dataclasses.dataclass(frozen=True)
class Ema:
  """An exponential moving average of a part of the parameters.

  Attributes:
    of: role whose tree is averaged, such as `encoder`.
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

  Its parameters are a tree of their own beside the train state: not
  optimised, not donated, not saved again.

  Attributes:
    module: the network; also what a checkpoint is checked against.
    source: `@phase` (an earlier phase of this run), `@ema/<name>` (an average
      kept by this phase), or a run folder or published model.
    subtree: which part of the source's parameters it takes; '' for all that
      the module has.
    dtype: its parameters are cast to this. `float32`: it computes in it, too.
      `bfloat16`: it computes in the type of its module. `float8`: parameters
      are bfloat16, and its blocks multiply by them in 8 bits, on devices that
      can; `float8_emulated` on any, at a loss.
  """

  module: nn.Module
  source: str
  subtree: str = 'encoder'
  dtype: str = 'bfloat16'

  @property
  def stored(self) -> str:
    """Type that its parameters are kept in."""
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
    """Returns what the module gives, without a gradient."""
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
class RowSpec:
  """Memory of one array per training example, kept in the train state.

  A loss finds it as `batch['rows/<name>']`, float32 [B, *shape], and returns
  what it is to become in `Aux.rows[name]`. Examples that a batch does not hold
  keep every bit.

  Attributes:
    shape: shape per example.
    dtype: floating-point type that it is stored in; arithmetic is float32.
    fill: value before an example is first seen, and of a substituted clip.
    window: with windows of so many steps, `batch['rows/<name>@window']` is the
      memory as it stood at the end of the last one, counted from the phase's
      start; 0 for none.
  """

  shape: tuple[int, ...]
  dtype: str = 'float32'
  fill: float = 0.0
  window: int = 0

  def __post_init__(self) -> None:
    if self.dtype not in ROW_DTYPES:
      raise ValueError(
        f'rows: found dtype={self.dtype!r}, wanted one of {ROW_DTYPES}'
      )
    if self.window < 0:
      raise ValueError(
        f'rows: found window={self.window}, wanted steps, or 0 for no windows'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
  """A stretch of steps that shares one compiled step.

  Attributes:
    name: unique in the run; checkpoints and `@name` teachers refer to it.
    steps: its length in optimizer steps.
    encoder: the module behind `Method.encode`.
    frozen: regular expressions over parameter names that get no gradient and
      no update.
    teachers: name -> teacher.
    init: `carry` takes parameters by name from the phase before, `fresh`
      starts from `Method.init`.
    opt: the same for the optimizer's moments.
    rows: the same for the memory of the training examples, by name.
    row_specs: name -> memory of every training example that the phase keeps.
    init_from: role -> source, for parameters that start from a run folder or
      a published model.
    horizon: what the schedules of learning rate and weight decay cover: each
      `phase` anew, or, as one `run`, all neighbours that say so.
    warmup: warm-up steps of that horizon; None for the optimizer's own
      setting.
    rewarm: (steps, factor): over its first steps the phase multiplies the
      learning rate by a factor that rises to 1.
    frozen_dtype: frozen matrices are stored in this type.
    ema: name -> average to keep.
    alarms: metric -> (lowest sound value, what a lower one means and what to
      do); said once a start.
  """

  name: str
  steps: int
  encoder: nn.Module
  frozen: tuple[str, ...] = ()
  teachers: Mapping[str, Teacher] = dataclasses.field(default_factory=dict)
  init: Literal['carry', 'fresh'] = 'carry'
  opt: Literal['carry', 'fresh'] = 'carry'
  rows: Literal['carry', 'fresh'] = 'carry'
  row_specs: Mapping[str, RowSpec] = dataclasses.field(default_factory=dict)
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
  """A way to pretrain: phases, initial parameters and one pure loss.

  Implementations are frozen dataclasses of hyper-parameters and modules.
  """

  @abc.abstractmethod
  def phases(self) -> tuple[Phase, ...]:
    """Returns the plan of the run, a pure function of the fields."""

  @abc.abstractmethod
  def init(self, rng: Array, video: Video, phase: Phase) -> Params:
    """Returns fresh parameters of a phase, role -> tree."""

  @abc.abstractmethod
  def loss(
    self,
    params: Params,
    teachers: Mapping[str, Any],
    batch: Mapping[str, Any],
    rng: rngs.Rng,
    phase: Phase,
  ) -> tuple[Float[Array, ''], Aux]:
    """Returns the loss to minimise and what to log.

    Args:
      params: role -> tree, of the phase.
      teachers: name -> parameters of `phase.teachers[name].module`.
      batch: `video` uint8 [B, T, H, W, C], `index` int32 [B], `progress`
        float32 [] (fraction of the run), rows and more.
      rng: named randomness of this step; masks are drawn from it here.
      phase: one of `phases()`.
    """

  def targets(
    self, teachers: Mapping[str, Any], video: Video, phase: Phase
  ) -> Mapping[str, Float[Array, 'B ...']]:
    """Returns what frozen teachers say of clips, whatever the step.

    Neither masks nor trained parameters enter, so it is computed once a clip
    for all masks and losses, and may be kept: a batch that carries
    `targets/<name>` needs no teacher for them. (An average moves, so that
    what it says is not worth keeping.) Arguments as in `loss`.
    """
    del teachers, video, phase
    return {}

  def targets_of(
    self,
    teachers: Mapping[str, Any],
    batch: Mapping[str, Any],
    phase: Phase,
  ) -> Mapping[str, Float[Array, 'B ...']]:
    """Returns the targets that a batch carries, else asks the teachers."""
    given = {
      k.removeprefix(TARGETS): x
      for k, x in batch.items()
      if k.startswith(TARGETS)
    }
    return given or self.targets(teachers, batch['video'], phase)

  @abc.abstractmethod
  def cost(self, phase: Phase, video: tuple[int, ...]) -> Cost:
    """Returns what one clip costs in a train step.

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
    """Returns the tokens that evaluation and users consume.

    Args:
      params: role -> tree, of the phase; only `encoder` is read.
      video: uint8, or float in [0, 1]: [B, T, H, W, C].
      depth: fraction of the blocks to run; None for all of them and the final
        norm.
      phase: whose encoder; the last one's when None.
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
    """Returns the masks of a step by name, for pictures.

    Empty where a phase has none. Arguments as in `loss`; teachers may be
    missing where no mask goes by what they say.
    """
    del teachers
    grid = layers.grid_of(batch['video'].shape, phase.encoder.patch)
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
    """Returns predicted pixels by mask, for pictures.

    Empty where a phase predicts none. Arguments as in `loss`.
    """
    del params, batch, rng, phase
    return {}


def check(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
  """Returns the phases of a run after checking that they can follow.

  Raises:
    ValueError: no phase, a name used twice, a teacher `@phase` that is not
      earlier in the run, or weights that would go into a network of another
      function.
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
  """Returns the network of a phase whose parameters a teacher takes."""
  if teacher.subtree:
    return getattr(phase, teacher.subtree, None)
  own = [getattr(phase, f.name) for f in dataclasses.fields(phase)]
  return next((x for x in own if type(x) is type(teacher.module)), None)


def _check_teacher(phase: Phase, name: str, trained: nn.Module | None) -> None:
  """Refuses a teacher that computes another function than what was trained."""
  teacher = phase.teachers[name]
  if trained is None:
    return
  differing = compare.differing_fields(trained, teacher.module)
  if differing:
    raise ValueError(
      f'phase {phase.name!r}: teacher {name!r} has the parameters of '
      f'{teacher.source}, a network of another function: '
      f'{compare.describe(differing)}'
    )


# A leaf of another shape is not carried, and that is logged.
_SHAPES = ('width', 'depth', 'mlp_width', 'out_width', 'num_mask_tokens')
_SHAPES += ('channels', 'depths')


def _check_carry(before: Phase, phase: Phase) -> None:
  """Refuses to carry parameters into a network of another function."""
  for field in dataclasses.fields(phase):
    pair = getattr(before, field.name, None), getattr(phase, field.name)
    if not all(isinstance(x, nn.Module) for x in pair):
      continue
    differing = {
      name: values
      for name, values in compare.differing_fields(*pair).items()
      if name.rpartition('.')[2] not in _SHAPES
    }
    if differing:
      raise ValueError(
        f'phase {phase.name!r} carries the parameters of {before.name!r} into '
        f'another function: its {field.name} differs, '
        f'{compare.describe(differing)}. Make both alike, or start with '
        "init='fresh'"
      )
