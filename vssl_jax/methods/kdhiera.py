"""KDHiera, interpretation of the abstract: Hiera follows two ViT, by layers.

A Hiera sees a tenth of a clip's mask units, chosen by what an image teacher
attends to. What each of its stages makes of a unit is led through a head of
its own to what a layer of the image teacher and one of the video teacher make
of the same pixels, both unmasked. Masked prediction, of features as in MVD or
of pixels as in Hiera-MAE, is a knob.

Of the paper (Cluster Computing 2025, 10.1007/s10586-025-05262-8) only the
abstract was available to us, and no code: the design is ours, after Hiera, UMT
and InternVideo2. `README.md` lists what the abstract says and what we chose.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vssl_jax import losses, masking, rngs, unit_masks
from vssl_jax.methods import base, kdhiera_cost
from vssl_jax.methods import teachers as teachers_lib
from vssl_jax.models import attended, hiera, hiera_mae

PIXELS = 'pixels'


class Pair(NamedTuple):
  """What is compared.

  Attributes:
    name: of the head's output: the stage, or the layer that is predicted.
    layer: blocks of the teacher that made the target; 0 for pixels.
    weight: of the term in the loss.
  """

  name: str
  layer: int
  weight: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distil(base.Phase):
  """Steps of distillation, or of masked prediction.

  Attributes:
    encoder: a Hiera that leaves 2 x 2 tokens of a unit.
    heads: teacher -> (ends of the stages, mask, unit grid) -> its features:
      `StageHeads` or a decoder; `pixels` where these are predicted.
    pairs: of each of `heads`.
    compared: `visible` or `masked`: of which units.
    masks: all drawn every step, under one pass of the teachers.
    mask_teacher: whose scores the masks are drawn by; '' for none.
  """

  encoder: hiera.Hiera
  heads: Mapping[str, nn.Module]
  pairs: Mapping[str, tuple[Pair, ...]]
  compared: str
  masks: tuple[unit_masks.Units, ...]
  mask_teacher: str = ''


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kdhiera(base.Method):
  """The loss, and the phases that use it.

  Attributes:
    plan: the distillation.
    scores: of the mask's teacher: `cls`, `column_mean` (see
      `attended.scores`), or `feature_norm`, the length of its last features.
    feature_loss: `cosine`, `mse` or `smooth_l1`.
    target_norm: of teachers' features, `losses.TARGET_NORMS`.
    pixel_norm: of pixels, `hiera_mae.targets`.
  """

  plan: tuple[Distil, ...]
  scores: str = 'cls'
  feature_loss: str = 'cosine'
  target_norm: str = 'ln'
  pixel_norm: str = 'patch'

  def phases(self) -> tuple[base.Phase, ...]:
    """Returns the plan."""
    return self.plan

  def init(
    self, rng: Array, video: base.Video, phase: base.Phase
  ) -> base.Params:
    """Returns random parameters of encoder and heads."""
    key = rngs.stream(rng, 'init/encoder')
    params = {'encoder': phase.encoder.init(key, video)['params']}
    grid = phase.encoder.unit_grid(video.shape)
    mask = masking.Mask(
      *(
        jnp.zeros((len(video), n), jnp.int32)
        for n in phase.masks[0].counts(grid)
      )
    )
    ends = jax.eval_shape(
      lambda p: _ends(phase, p, video, mask), params['encoder']
    )
    ends = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), ends)
    for name, head in phase.heads.items():
      key = rngs.stream(rng, f'init/heads_{name}')
      params[f'heads_{name}'] = head.init(key, ends, mask, grid)['params']
    return params

  def targets(
    self, teachers: Mapping[str, Any], video: base.Video, phase: base.Phase
  ) -> Mapping[str, Float[Array, 'B ...']]:
    """Returns layers of the teachers, and the scores that masks go by."""
    found: dict[str, Array] = {}
    for name in phase.teachers:
      options = {}
      if name == phase.mask_teacher and self.scores in attended.KINDS:
        options = {'attention_to': self.scores}
      told = teachers_lib.stream(phase, name, teachers[name], video, **options)
      made, scores = told if options else (told, None)
      for pair in phase.pairs.get(name, ()):
        found[f'{name}/{pair.layer}'] = made[pair.layer]
      if name == phase.mask_teacher:
        if scores is None:  # feature_norm
          scores = jnp.linalg.norm(made[-1].astype(jnp.float32), axis=-1)
        grid = phase.encoder.unit_grid(video.shape)
        found['scores'] = unit_masks.pool(scores, grid)
    return found

  def loss(
    self,
    params: base.Params,
    teachers: Mapping[str, Any],
    batch: Mapping[str, Any],
    rng: rngs.Rng,
    phase: base.Phase,
  ) -> tuple[Float[Array, ''], base.Aux]:
    """Returns the weighed sum over teachers and layers, the mean over masks."""
    targets = self._targets(teachers, batch, phase)
    parts: dict[str, list[Array]] = {}
    for spec in phase.masks:
      for name, value in self._under(
        params, batch, rng, phase, spec, targets
      ).items():
        parts.setdefault(name, []).append(value)
    metrics = {name: jnp.mean(jnp.stack(x)) for name, x in parts.items()}
    total = sum(
      pair.weight * metrics[f'loss/{name}/{pair.name}']
      for name, pairs in phase.pairs.items()
      for pair in pairs
    )
    return total, base.Aux(metrics)

  def _targets(
    self,
    teachers: Mapping[str, Any],
    batch: Mapping[str, Any],
    phase: Distil,
  ) -> Mapping[str, Array]:
    """Returns what all masks share: of teachers, or pixels of every token."""
    found = dict(self.targets_of(teachers, batch, phase))
    if PIXELS in phase.pairs:
      found[f'{PIXELS}/0'] = hiera_mae.targets(
        batch['video'], phase.encoder, self.pixel_norm
      )
    return found

  def _under(
    self,
    params: base.Params,
    batch: Mapping[str, Any],
    rng: rngs.Rng,
    phase: Distil,
    spec: unit_masks.Units,
    targets: Mapping[str, Array],
  ) -> dict[str, Array]:
    """Returns the terms under one mask, and what is logged of it."""
    mask, told, predicted = _predicted(
      params, batch, rng, phase, spec, targets.get('scores')
    )
    grid = phase.encoder.unit_grid(batch['video'].shape)
    found = {f'mask/{name}': x for name, x in told.items()}
    compared = mask.visible if phase.compared == 'visible' else mask.masked
    at = unit_masks.expand_units(compared, grid)
    for name, pairs in phase.pairs.items():
      for pair in pairs:
        wanted = masking.gather(targets[f'{name}/{pair.layer}'], at)
        end, output = f'{name}/{pair.name}', predicted[name][pair.name]
        if name == PIXELS:
          found[f'loss/{end}'] = losses.mse(output, wanted)
          continue
        wanted = losses.TARGET_NORMS[self.target_norm](wanted)
        angle = losses.cosine(output, wanted)
        found[f'cosine/{end}'] = jnp.mean(angle)
        if self.feature_loss == 'cosine':
          found[f'loss/{end}'] = jnp.mean(2 - 2 * angle)
        else:
          found[f'loss/{end}'] = jnp.mean(
            losses.per_token(output, wanted, self.feature_loss)
          )
    return found

  def masks(
    self,
    teachers: Mapping[str, Any],
    batch: Mapping[str, Any],
    rng: rngs.Rng,
    phase: base.Phase,
  ) -> Mapping[str, base.Seen]:
    """Returns masks of tokens, and the scores that they were drawn by."""
    found = {}
    grid = phase.encoder.unit_grid(batch['video'].shape)
    scores = None
    if phase.mask_teacher:  # no other has to be there
      own = {phase.mask_teacher: phase.teachers[phase.mask_teacher]}
      alone = dataclasses.replace(phase, teachers=own, pairs={})
      scores = self.targets(teachers, batch['video'], alone)['scores']
    for spec in phase.masks:
      mask, _ = spec.draw(rng, batch, grid, scores)
      tokens = unit_masks.token_mask(mask, grid)
      shown = None if scores is None else unit_masks.spread(scores, grid)
      found[spec.name] = base.Seen(tokens, shown)
    return found

  def reconstruct(
    self,
    params: base.Params,
    batch: Mapping[str, Any],
    rng: rngs.Rng,
    phase: base.Phase,
  ) -> Mapping[str, base.Reconstruction]:
    """Returns predicted pixels by mask, where masks go by no teacher."""
    if PIXELS not in phase.pairs or phase.mask_teacher:
      return {}
    found = {}
    grid = phase.encoder.unit_grid(batch['video'].shape)
    for spec in phase.masks:
      mask, _, predicted = _predicted(
        params, batch, rng, phase, spec, None, deterministic=True
      )
      (output,) = predicted[PIXELS].values()
      index = unit_masks.expand_units(mask.masked, grid)
      output = hiera_mae.as_raw(
        output, index, batch['video'], phase.encoder, self.pixel_norm
      )
      # From unit after unit to the order of tokens.
      order = jnp.argsort(index, axis=1).astype(jnp.int32)
      found[spec.name] = base.Reconstruction(
        unit_masks.token_mask(mask, grid),
        masking.gather(output, order),
        self.pixel_norm,
        phase.encoder.patch[0],
      )
    return found

  def cost(self, phase: base.Phase, video: tuple[int, ...]) -> base.Cost:
    """Returns FLOPs per clip from true token counts."""
    return kdhiera_cost.cost(phase, video)


def _ends(
  phase: Distil, params: Any, video: base.Video, mask: masking.Mask, **how: Any
) -> tuple[Array, ...]:
  """Returns the ends of the encoder's stages, of the visible units."""
  return phase.encoder.apply(
    {'params': params}, video, mask.visible, features=True, **how
  )


def _predicted(
  params: base.Params,
  batch: Mapping[str, Any],
  rng: rngs.Rng,
  phase: Distil,
  spec: unit_masks.Units,
  scores: Array | None,
  deterministic: bool = False,
) -> tuple[masking.Mask, masking.Metrics, dict[str, dict[str, Array]]]:
  """Returns a mask, what drawing it told, and the outputs of every head.

  Those of units after one another, four tokens each.
  """
  video = batch['video']
  grid = phase.encoder.unit_grid(video.shape)
  mask, told = spec.draw(rng, batch, grid, scores)
  dropout = {'dropout': rng.per_batch(f'dropout/{spec.name}')}
  ends = _ends(
    phase,
    params['encoder'],
    video,
    mask,
    deterministic=deterministic,
    rngs=dropout,
  )
  found = {}
  for name, head in phase.heads.items():
    output = head.apply({'params': params[f'heads_{name}']}, ends, mask, grid)
    if not isinstance(output, Mapping):  # one Dense, a part for each layer
      parts = jnp.split(output, len(phase.pairs[name]), axis=-1)
      names = [pair.name for pair in phase.pairs[name]]
      output = dict(zip(names, parts, strict=True))
    found[name] = output
  return mask, told, found
