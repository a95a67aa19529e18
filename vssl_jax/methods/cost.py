"""Cost of a train step per clip: FLOPs of matrix products, and activations.

`traced` counts any phase from its traced program, and is the default of
`Phase.cost`. It takes seconds per phase (a ViT-L of 24 unrolled blocks: 18 s on
a busy core), and a plan or a long run counts dozens of phases. So the phases of
this package override it with the closed forms below, which take microseconds;
`tests/methods/test_cost.py` holds them against the traced count.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vssl_jax import flops, rngs, trees
from vssl_jax.data import batch as batch_lib
from vssl_jax.masks import hiera_units, tubelets
from vssl_jax.methods import pmd_terms
from vssl_jax.models import Module, classifier
from vssl_jax.models.hiera import stage_heads


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


def traced(phase: Any, video: tuple[int, ...]) -> Cost:
  """Counts the train step of a phase in its traced program.

  The program is traced without rematerialisation and with plain attention, and
  nothing is compiled or computed. `frozen` is the cost of `Phase.targets`; a
  teacher that runs inside the loss counts as trained. `activations` are the
  values that the backward pass needs, at the dtypes of the program; those that
  do not depend on the clip, such as weights, are left out.

  Args:
    phase: a `phase.Phase`.
    video: (T, H, W, C) of a clip.
  """
  known = vars(phase).setdefault('_traced', {})  # a plan asks many times
  if video not in known:
    trained, frozen = traced_flops(phase, video)
    one, two = (_residual_bytes(phase, video, clips) for clips in (1, 2))
    known[video] = Cost(trained, frozen, float(two - one))
  return known[video]


def traced_flops(phase: Any, video: tuple[int, ...]) -> tuple[float, float]:
  """Returns the FLOPs of loss and gradient, and of `Phase.targets`, per clip.

  Arguments as in `traced`.
  """
  phase = _plain_phase(phase)
  params, teachers, batch = _inputs(phase, video, 1)
  targets = jax.make_jaxpr(lambda t, v: phase.targets(t, v))(
    teachers, batch.video
  )
  program = jax.make_jaxpr(jax.value_and_grad(_loss(phase, params)))(
    params, teachers, batch
  )
  return flops.count(program), flops.count(targets)


def _residual_bytes(phase: Any, video: tuple[int, ...], clips: int) -> int:
  """Returns the bytes that the backward pass needs, weights included."""
  phase = _plain_phase(phase)
  params, teachers, batch = _inputs(phase, video, clips)
  loss = _loss(phase, params)
  residuals = jax.eval_shape(
    lambda p, t, b: jax.vjp(lambda p: loss(p, t, b), p)[1],
    params,
    teachers,
    batch,
  )
  return trees.nbytes(residuals)


def _inputs(phase: Any, video: tuple[int, ...], clips: int) -> tuple[Any, ...]:
  """Returns the shapes of parameters, of the teachers', and of a batch."""
  key = jax.random.key(0)
  clip = jax.ShapeDtypeStruct((1, *video), jnp.uint8)
  params = jax.eval_shape(lambda k, v: phase.init(k, v), key, clip)
  teachers = {
    name: jax.eval_shape(teacher.module.init, key, clip)['params']
    for name, teacher in phase.teachers.items()
  }
  batch = batch_lib.shapes(clips, video, None, None)
  targets = jax.eval_shape(
    lambda t, v: phase.targets(t, v), teachers, batch.video
  )
  memory = {
    name + suffix: jax.ShapeDtypeStruct((clips, *spec.shape), jnp.float32)
    for name, spec in phase.memory_specs.items()
    for suffix in ('', '@window')
  }
  batch = dataclasses.replace(batch, targets=targets, example_memory=memory)
  return params, teachers, batch


def _loss(phase: Any, params: Any) -> Callable[[Any, Any, Any], Any]:
  """Returns the loss of a phase without gradients of its frozen parameters."""
  names = [name for name, _ in trees.named_leaves(params)]
  is_frozen = trees.matcher(phase.frozen, names, 'phase.frozen')

  def loss(params: Any, teachers: Any, batch: batch_lib.Batch) -> Any:
    params = trees.map_named(
      lambda n, x: jax.lax.stop_gradient(x) if is_frozen(n) else x, params
    )
    rng = rngs.Rng(jax.random.key(0), jnp.int32(0))
    return phase.loss(params, teachers, batch, rng)[0]

  return loss


def _plain_phase(phase: Any) -> Any:
  """Returns a phase whose modules are without optimisations."""
  fields = {f.name: getattr(phase, f.name) for f in dataclasses.fields(phase)}
  return dataclasses.replace(
    phase, **{name: _plain(x) for name, x in fields.items()}
  )


def _plain(value: Any) -> Any:
  """Returns a value of a phase whose modules are without optimisations."""
  if isinstance(value, Module):
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    changes = {
      name: _plain(x)
      for name, x in fields.items()
      if name != 'parent' and isinstance(x, Module | Mapping)
    }
    plain = {'remat': 'none', 'attention': 'xla'}
    changes |= {name: x for name, x in plain.items() if name in fields}
    return value.clone(**changes)
  if isinstance(value, Mapping):
    return {name: _plain(x) for name, x in value.items()}
  if dataclasses.is_dataclass(value) and hasattr(value, 'module'):  # a teacher
    return dataclasses.replace(
      value, module=_plain(value.module), dtype=value.stored
    )
  return value


def pixels(phase: Any, video: tuple[int, ...]) -> Cost:
  """Returns the cost of a `masked_pixels.PixelPhase`."""
  grid = tubelets.grid_of((1, *video), phase.encoder.patch)
  cost = _masked(phase.encoder, phase.decoder, phase.masks, grid)
  return cost._replace(tokens=_tokens(phase.masks, grid, 'decoder'))


def latents(phase: Any, video: tuple[int, ...]) -> Cost:
  """Returns the cost of a `salt.LatentPhase`."""
  grid = tubelets.grid_of((1, *video), phase.encoder.patch)
  trained = _masked(
    phase.encoder, phase.predictor, phase.masks, grid, phase.frozen_depth
  )
  tokens = _tokens(phase.masks, grid, 'predictor')
  tokens |= dict.fromkeys(phase.teachers, float(math.prod(grid)))
  # The rule 6ND + 2ND needs fully trained students and full teachers.
  full_networks = not phase.frozen_depth and phase.target_layer is None
  return trained._replace(
    frozen=_teachers(phase.teachers, video, phase.target_layer),
    tokens=tokens if full_networks else {},
  )


def layerlock(phase: Any, video: tuple[int, ...]) -> Cost:
  """Returns the cost of a `layerlock.LockPhase`; targets count as frozen."""
  encoder, k = phase.encoder, phase.lock_depth
  grid = tubelets.grid_of((1, *video), encoder.patch)
  visible, _ = phase.masks[0].counts(grid)
  tokens = math.prod(grid)
  num_positions = phase.num_positions(grid)
  block_flops = flops.block(encoder, visible)
  decoder_flops = encoder.decoder_blocks * flops.block(
    encoder, visible + tokens
  )
  head_flops = 0.0
  if 'pixel' in phase.terms:
    head_flops += 2.0 * tokens * encoder.width * phase.pixel_head.features
  if 'latent' in phase.terms:
    count = 1 if phase.target_layers == 'newest' else k
    head_flops += 2.0 * count * num_positions * encoder.width**2
  embed_flops = flops.embedding(encoder, visible)
  trained_blocks = encoder.encoder_depth - phase.frozen_depth
  forward = (
    embed_flops
    + encoder.encoder_depth * block_flops
    + decoder_flops
    + head_flops
  )
  backward = 2 * (trained_blocks * block_flops + decoder_flops + head_flops)
  if not phase.frozen_depth:
    backward += embed_flops  # gradient of weights; pixels need none
  target = 0.0
  if 'latent' in phase.terms:
    target_tokens = num_positions if phase.subset_only else tokens
    target = flops.embedding(encoder, target_tokens) + k * flops.block(
      encoder, target_tokens
    )
  activations = flops.activations(encoder, visible, trained_blocks)
  activations += flops.activations(
    encoder, visible + tokens, encoder.decoder_blocks
  )
  return Cost(forward + backward, target, activations)


def pmd(phase: Any, video: tuple[int, ...]) -> Cost:
  """Returns the cost of a `pmd.DistilPhase`."""
  student = phase.student
  encoder, width = student.encoder, student.encoder.width
  grid = tubelets.grid_of((1, *video), encoder.patch)
  trained = activations = frozen = 0.0
  for spec in phase.masks:
    visible, masked = spec.counts(grid)
    trained += flops.train(encoder, grid, visible)
    activations += flops.activations(encoder, visible)
    for head in student.decoder.values():
      trained += flops.train(head, grid, (visible, masked), in_width=width)
      activations += flops.activations(head, visible + masked)
    for align in phase.align.values():
      maps = len(pmd_terms.aligned(encoder.depth))
      trained += 3 * 2.0 * visible * width * align.out_width * maps
  for spec, current in zip(phase.previous_masks, phase.masks, strict=False):
    before, now = spec.counts(grid), current.counts(grid)
    frozen += flops.forward(encoder, grid, before[0])
    for head in student.decoder.values():
      frozen += flops.forward(head, grid, before, in_width=width)
      # Its heads predict the patches masked for the current student.
      frozen += 2.0 * (now[1] - before[1]) * head.out_width * head.width
  teachers = {n: t for n, t in phase.teachers.items() if n != 'previous'}
  return Cost(trained, frozen + _teachers(teachers, video), activations)


def kdhiera(phase: Any, video: tuple[int, ...]) -> Cost:
  """Returns the cost of a `kdhiera.DistilPhase`, without token scores."""
  encoder, side = phase.encoder, hiera_units.SIDE
  units = encoder.unit_grid((1, *video))
  grid = tubelets.grid_of((1, *video), encoder.patch)
  trained = activations = 0.0
  for spec in phase.masks:
    counts = spec.counts(units)
    visible, masked = (side**2 * n for n in counts)
    trained += flops.train(encoder, grid, visible)
    activations += flops.activations(encoder, visible)
    for head in phase.heads.values():
      if isinstance(head, stage_heads.StageHeads):
        trained += 3 * head.flops(encoder, counts[0])
        activations += head.kept(encoder, counts[0])
      else:
        tokens = (visible, masked)
        trained += flops.train(head, grid, tokens, in_width=encoder.width)
        activations += flops.activations(head, visible + masked)
  return Cost(trained, _teachers(phase.teachers, video), activations)


def supervised(phase: Any, video: tuple[int, ...]) -> Cost:
  """Returns the cost of a `supervised.SupervisedPhase`."""
  grid = tubelets.grid_of((1, *video), phase.encoder.patch)
  tokens = grid[0] * grid[1] * grid[2]
  head = 3 * classifier.flops(phase.encoder.width, phase.head.classes)
  return Cost(
    flops.train(phase.encoder, grid) + head,
    activations=flops.activations(phase.encoder, tokens),
  )


def _teachers(
  teachers: Mapping[str, Any], video: tuple[int, ...], depth: int | None = None
) -> float:
  """Returns the forward FLOPs of teachers for one whole clip."""
  return float(
    sum(
      flops.forward(
        teacher.module,
        tubelets.grid_of((1, *video), teacher.module.patch),
        depth=depth,
      )
      for teacher in teachers.values()
    )
  )


def _masked(
  encoder: Module,
  head: Module,
  masks: tuple[Any, ...],
  grid: tubelets.Grid,
  locked: int = 0,
) -> Cost:
  """Returns the training cost per clip of an encoder and its head with masks.

  Args:
    encoder: encoder of the visible tokens.
    head: its decoder or predictor.
    masks: masks of a step; all of them are used in every step.
    grid: tokens along (time, height, width).
    locked: number of first blocks of the encoder that are frozen.
  """
  trained = activations = 0.0
  for spec in masks:
    visible, masked = spec.counts(grid)
    trained += flops.train(encoder, grid, visible, frozen=locked)
    trained += flops.train(
      head, grid, (visible, masked), in_width=encoder.width
    )
    activations += flops.activations(encoder, visible, encoder.depth - locked)
    activations += flops.activations(head, visible + masked)
  return Cost(trained, 0.0, activations)


def _tokens(
  masks: tuple[Any, ...], grid: tubelets.Grid, *heads: str
) -> dict[str, float]:
  """Returns the tokens per clip and step that an encoder and its heads process.

  Args:
    masks: masks of a step; all of them are used in every step.
    grid: tokens along (time, height, width).
    *heads: roles of decoders or predictors, which process visible tokens and
      mask tokens.

  Returns:
    Role -> number of tokens, summed over masks.
  """
  counts = [spec.counts(grid) for spec in masks]
  total = float(sum(visible + masked for visible, masked in counts))
  visible = float(sum(visible for visible, _ in counts))
  return {'encoder': visible} | dict.fromkeys(heads, total)
