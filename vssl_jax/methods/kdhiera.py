"""KDHiera, interpretation of the abstract: layer-wise distillation to a Hiera.

A Hiera student encodes a tenth of a clip's mask units. The units are drawn by
the attention of an image teacher. A head on each stage of the student regresses
the features of a layer of the image teacher and of a layer of the video
teacher, for the same pixels. Both teachers are ViTs and process the unmasked
clip. Masked prediction of features as in MVD, or of pixels as in Hiera-MAE, is
an option.

Only the abstract of the paper (Cluster Computing 2025,
10.1007/s10586-025-05262-8) was available to us, and no code. The design is our
choice, after Hiera, UMT and InternVideo2. `README.md` lists the statements of
the abstract and our choices.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vssl_jax import losses, rngs
from vssl_jax.data import batch as batch_lib
from vssl_jax.masks import hiera_units, sampling
from vssl_jax.methods import cost as cost_lib
from vssl_jax.methods import distillation_teachers as distillation_teachers_lib
from vssl_jax.methods import phase as phase_lib
from vssl_jax.models import Module, vit
from vssl_jax.models.hiera import decoder
from vssl_jax.models.hiera import encoder as encoder_lib

PIXELS = 'pixels'


class Pair(NamedTuple):
  """A head output and the teacher layer that it is compared with.

  Attributes:
    name: name of the head's output: the stage, or the predicted layer.
    layer: teacher block (from 1) whose output is the target; 0 for pixels.
    weight: weight of the term in the loss.
  """

  name: str
  layer: int
  weight: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistilPhase(phase_lib.Phase):
  """A phase of distillation, or of masked prediction.

  Attributes:
    encoder: a Hiera whose last stage has 2 x 2 tokens per unit.
    heads: teacher -> module that maps (outputs of the stages, mask, unit grid)
      to the teacher's features: `StageHeads` or a decoder. The key is `pixels`
      where pixels are predicted.
    pairs: key of `heads` -> its comparisons.
    compared: units that are compared, `visible` or `masked`.
    scores: token scores of the mask teacher: `cls`, `column_mean` (see
      `vit.token_scores`), or `feature_norm`, the L2 norm of its last features.
    feature_loss: `cosine`, `mse` or `smooth_l1`.
    target_norm: normalisation of the teachers' features, one of
      `losses.TARGET_NORMS`.
    pixel_norm: normalisation of pixel targets, see `decoder.targets`.
  """

  encoder: encoder_lib.Hiera
  heads: Mapping[str, Module]
  pairs: Mapping[str, tuple[Pair, ...]]
  compared: str
  scores: str = 'cls'
  feature_loss: str = 'cosine'
  target_norm: str = 'ln'
  pixel_norm: str = 'patch'

  def init(self, key: Array, video: phase_lib.Video) -> phase_lib.Params:
    """Returns random parameters of the encoder and the heads."""
    part_key = rngs.stream(key, 'init/encoder')
    params = {'encoder': self.encoder.init(part_key, video)['params']}
    grid = self.encoder.unit_grid(video.shape)
    mask = sampling.Mask(
      *(
        jnp.zeros((len(video), n), jnp.int32)
        for n in self.masks[0].counts(grid)
      )
    )
    ends = jax.eval_shape(
      lambda p: self._ends(p, video, mask), params['encoder']
    )
    ends = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), ends)
    for name, head in self.heads.items():
      part_key = rngs.stream(key, f'init/heads_{name}')
      params[f'heads_{name}'] = head.init(part_key, ends, mask, grid)['params']
    return params

  def targets(
    self,
    teachers: Mapping[str, Any],
    video: phase_lib.Video,
  ) -> Mapping[str, Float[Array, 'B ...']]:
    """Returns features of teacher layers, and the scores for drawing masks."""
    targets: dict[str, Array] = {}
    for name in self.teachers:
      options = {}
      if name == self.mask_teacher and self.scores in vit.SCORES:
        options = {'attention_to': self.scores}
      outputs = distillation_teachers_lib.stream(
        self, name, teachers[name], video, **options
      )
      features, scores = outputs if options else (outputs, None)
      for pair in self.pairs.get(name, ()):
        targets[f'{name}/{pair.layer}'] = features[pair.layer]
      if name == self.mask_teacher:
        if scores is None:  # feature_norm
          scores = jnp.linalg.norm(features[-1].astype(jnp.float32), axis=-1)
        grid = self.encoder.unit_grid(video.shape)
        targets['scores'] = hiera_units.pool(scores, grid)
    return targets

  def loss(
    self,
    params: phase_lib.Params,
    teachers: Mapping[str, Any],
    batch: batch_lib.Batch,
    rng: rngs.Rng,
  ) -> tuple[Float[Array, ''], phase_lib.Aux]:
    """Returns the loss: weighted sum over layers, averaged over masks."""
    del teachers  # their outputs are in batch.targets
    targets = dict(batch.targets)
    if PIXELS in self.pairs:
      targets[f'{PIXELS}/0'] = decoder.targets(
        batch.video, self.encoder, self.pixel_norm
      )
    parts: dict[str, list[Array]] = {}
    for spec in self.masks:
      for name, value in self._under_mask(
        params, batch, rng, spec, targets
      ).items():
        parts.setdefault(name, []).append(value)
    metrics = {name: jnp.mean(jnp.stack(x)) for name, x in parts.items()}
    total = sum(
      pair.weight * metrics[f'loss/{name}/{pair.name}']
      for name, pairs in self.pairs.items()
      for pair in pairs
    )
    return total, phase_lib.Aux(metrics)

  def _under_mask(
    self,
    params: phase_lib.Params,
    batch: batch_lib.Batch,
    rng: rngs.Rng,
    spec: hiera_units.Units,
    targets: Mapping[str, Array],
  ) -> dict[str, Array]:
    """Returns the loss terms and metrics of one mask."""
    mask, mask_metrics, predicted = self._predicted(
      params, batch, rng, spec, targets.get('scores')
    )
    grid = self.encoder.unit_grid(batch.video.shape)
    metrics = {f'mask/{name}': x for name, x in mask_metrics.items()}
    compared = mask.visible if self.compared == 'visible' else mask.masked
    indices = hiera_units.expand_units(compared, grid)
    for name, pairs in self.pairs.items():
      for pair in pairs:
        target = sampling.gather(targets[f'{name}/{pair.layer}'], indices)
        suffix, output = f'{name}/{pair.name}', predicted[name][pair.name]
        if name == PIXELS:
          metrics[f'loss/{suffix}'] = losses.mse(output, target)
          continue
        target = losses.TARGET_NORMS[self.target_norm](target)
        cosine = losses.cosine(output, target)
        metrics[f'cosine/{suffix}'] = jnp.mean(cosine)
        if self.feature_loss == 'cosine':
          metrics[f'loss/{suffix}'] = jnp.mean(2 - 2 * cosine)
        else:
          metrics[f'loss/{suffix}'] = jnp.mean(
            losses.per_token(output, target, self.feature_loss)
          )
    return metrics

  def draw_masks(
    self,
    teachers: Mapping[str, Any],
    batch: batch_lib.Batch,
    rng: rngs.Rng,
  ) -> Mapping[str, phase_lib.DrawnMask]:
    """Returns token masks, and the scores that they were drawn from."""
    masks = {}
    grid = self.encoder.unit_grid(batch.video.shape)
    scores = None
    if self.mask_teacher:  # the other teachers may be missing
      teacher = {self.mask_teacher: self.teachers[self.mask_teacher]}
      mask_phase = dataclasses.replace(self, teachers=teacher, pairs={})
      scores = mask_phase.targets(teachers, batch.video)['scores']
    for spec in self.masks:
      mask, _ = spec.draw(rng, batch, grid, scores)
      tokens = hiera_units.token_mask(mask, grid)
      token_scores = (
        None if scores is None else hiera_units.spread(scores, grid)
      )
      masks[spec.name] = phase_lib.DrawnMask(
        tokens, token_scores, predicted=self.compared == 'masked'
      )
    return masks

  def reconstruct(
    self,
    params: phase_lib.Params,
    batch: batch_lib.Batch,
    rng: rngs.Rng,
  ) -> Mapping[str, phase_lib.Reconstruction]:
    """Returns predicted pixels by mask, if masks do not depend on a teacher."""
    if PIXELS not in self.pairs or self.mask_teacher:
      return {}
    reconstructions = {}
    grid = self.encoder.unit_grid(batch.video.shape)
    for spec in self.masks:
      mask, _, predicted = self._predicted(
        params, batch, rng, spec, None, deterministic=True
      )
      (output,) = predicted[PIXELS].values()
      indices = hiera_units.expand_units(mask.masked, grid)
      output = decoder.as_raw(
        output, indices, batch.video, self.encoder, self.pixel_norm
      )
      # From unit order to token order.
      order = jnp.argsort(indices, axis=1).astype(jnp.int32)
      reconstructions[spec.name] = phase_lib.Reconstruction(
        hiera_units.token_mask(mask, grid),
        sampling.gather(output, order),
        self.pixel_norm,
        self.encoder.patch[0],
      )
    return reconstructions

  def cost(self, video: tuple[int, ...]) -> cost_lib.Cost:
    """Returns FLOPs per clip from the actual token counts."""
    return cost_lib.kdhiera(self, video)

  def _ends(
    self,
    params: Any,
    video: phase_lib.Video,
    mask: sampling.Mask,
    **how: Any,
  ) -> tuple[Array, ...]:
    """Returns the outputs of the encoder's stages for the visible units."""
    return self.encoder.apply(
      {'params': params}, video, mask.visible, features=True, **how
    )

  def _predicted(
    self,
    params: phase_lib.Params,
    batch: batch_lib.Batch,
    rng: rngs.Rng,
    spec: hiera_units.Units,
    scores: Array | None,
    deterministic: bool = False,
  ) -> tuple[sampling.Mask, sampling.Metrics, dict[str, dict[str, Array]]]:
    """Returns a mask, its metrics, and the outputs of every head.

    Outputs are ordered by unit, with four tokens per unit.
    """
    video = batch.video
    grid = self.encoder.unit_grid(video.shape)
    mask, metrics = spec.draw(rng, batch, grid, scores)
    dropout = {'dropout': rng.per_batch(f'dropout/{spec.name}')}
    ends = self._ends(
      params['encoder'],
      video,
      mask,
      deterministic=deterministic,
      rngs=dropout,
    )
    outputs = {}
    for name, head in self.heads.items():
      output = head.apply({'params': params[f'heads_{name}']}, ends, mask, grid)
      if not isinstance(output, Mapping):  # one Dense, channels split by layer
        parts = jnp.split(output, len(self.pairs[name]), axis=-1)
        names = [pair.name for pair in self.pairs[name]]
        output = dict(zip(names, parts, strict=True))
      outputs[name] = output
    return mask, metrics, outputs
