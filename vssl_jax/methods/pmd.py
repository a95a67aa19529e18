"""PMD: distillation from two frozen teachers, in phases of rising mask ratio.

A masked video student predicts the features of an image teacher (of every
tubelet's first frame) and of a video teacher, as in MVD (arXiv 2212.04500).
PMD (CVPR 2026) adds three terms:
  PSD: each phase has a higher mask ratio than the previous phase and is also
    distilled from the student of the previous phase.
  DARE: the loss of each patch is smoothed over visits, and hard patches get
    larger weights.
  CLFA: shallow and middle layers are aligned with deeper teacher layers.
With one phase and the weights of the three terms at 0, PMD is MVD. No code of
PMD is public, and its text was not available to us: `README.md` lists open and
ambiguous details, and our choices.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from vssl_jax import losses, rngs
from vssl_jax.data import batch as batch_lib
from vssl_jax.masks import sampling, specs, tubelets
from vssl_jax.methods import cost as cost_lib
from vssl_jax.methods import distillation_teachers as distillation_teachers_lib
from vssl_jax.methods import masked_pixels, pmd_terms
from vssl_jax.methods import phase as phase_lib
from vssl_jax.models import mvd_student as mvd_student_lib


class _Outputs(NamedTuple):
  """Outputs under one mask: the mask, the loss per teacher, and features."""

  mask: sampling.Mask
  loss: dict[str, Float[Array, 'B M']]
  features: tuple[Array, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistilPhase(phase_lib.Phase):
  """A phase of distillation at one mask ratio.

  Attributes:
    student: encoder, and a decoder per teacher. `teachers` has the same names,
      and `previous` in addition if the previous student is used.
    align: teacher -> projections of the student's layers to the teacher's
      width; empty without alignment.
    previous_masks: masks of the previous student, one for each of `masks`.
    lambda_base: weight of the distance to the teachers.
    lambda_pg: weight of the distance to the previous student (PSD).
    lambda_df: weight of the smoothed and weighted distance (DARE).
    lambda_al: weight of the alignment of layers (CLFA).
    feature_loss: `mse` (the note's "L2") or `smooth_l1` (MVD's scripts), one of
      `losses.TOKEN_DISTANCES`.
    target_norm: normalisation of the teachers' features, one of
      `losses.TARGET_NORMS`; MVD has none.
    alpha: weight of the new loss in the smoothed loss, as written in the paper.
    tau: temperature of the weights, for losses that are means over channels.
    dare: `both`, or for ablations `smooth` or `weights`.
    df_extra_mean: True, as written in the paper: DARE is divided once more by
      the number of masked patches. False, our choice: the weights already sum
      to 1, and the division would make the term a thousandth of the base loss.
    pg_positions: `masked`, as written in the paper, or `both_masked`: patches
      masked for both students, because the previous student was not trained to
      predict its visible patches.
    align_norm: `none` for raw layers, because the paper states no norm, or `ln`
      on layers of student and teachers.
    memory_shape: `patch`, as written in the paper, or `tube`: one value for all
      time steps of a position.
    memory_frame: memory cells belong to the crop (`grid`, as written in the
      paper) or to the full frame that it was cut from (`crop`).

  See the table in `README.md` for other open or ambiguous details.
  """

  student: mvd_student_lib.Student
  align: Mapping[str, mvd_student_lib.Alignment]
  previous_masks: tuple[specs.Spec, ...] = ()
  lambda_base: float = 1.0
  lambda_pg: float = 0.05
  lambda_df: float = 1.0
  lambda_al: float = 1.0
  feature_loss: str = 'mse'
  target_norm: str = 'none'
  alpha: float = 0.95
  tau: float = 0.5
  dare: str = 'both'
  df_extra_mean: bool = False
  pg_positions: str = 'masked'
  align_norm: str = 'none'
  memory_shape: str = 'patch'
  memory_frame: str = 'grid'

  def init(self, key: Array, video: phase_lib.Video) -> phase_lib.Params:
    """Returns random parameters of the encoder, decoders and alignment."""
    encoder = self.student.encoder
    part_key = rngs.stream(key, 'init/encoder')
    params = {'encoder': encoder.init(part_key, video)['params']}
    for name, head in self.student.decoder.items():
      role = f'decoder_{name}'
      params[role] = masked_pixels.init_head(key, video, self, role, head)
    for name, align in self.align.items():
      part_key = rngs.stream(key, f'init/align_{name}')
      tokens = jnp.zeros((1, 1, encoder.width))
      aligned = dict.fromkeys(pmd_terms.aligned(encoder.depth), tokens)
      params[f'align_{name}'] = align.init(part_key, aligned)['params']
    return params

  def targets(
    self,
    teachers: Mapping[str, Any],
    video: phase_lib.Video,
  ) -> Mapping[str, Float[Array, 'B ...']]:
    """Returns each teacher's last features, and means of its deeper layers."""
    targets, norm = {}, losses.TARGET_NORMS[self.align_norm]
    for name in self.student.decoder:
      features = distillation_teachers_lib.stream(
        self, name, teachers[name], video
      )
      targets[name] = features[-1].astype(jnp.float32)
      if name not in self.align:
        continue
      _, *groups = pmd_terms.thirds(len(features) - 1)
      spread = jnp.zeros(targets[name].shape[:2])
      for group, indices in zip(('middle', 'deep'), groups, strict=True):
        targets[f'{name}/{group}'], group_spread = pmd_terms.condense(
          [norm(features[i]) for i in indices]
        )
        spread += group_spread
      targets[f'{name}/spread'] = spread
    return targets

  def loss(
    self,
    params: phase_lib.Params,
    teachers: Mapping[str, Any],
    batch: batch_lib.Batch,
    rng: rngs.Rng,
  ) -> tuple[Float[Array, ''], phase_lib.Aux]:
    """Returns the weighted sum of the base, PSD, DARE and CLFA terms."""
    targets = batch.targets
    metrics, parts, per_mask = {}, {}, []
    for i, spec in enumerate(self.masks):
      outputs, terms, new_metrics = self._under_mask(
        params, teachers, batch, rng, i
      )
      per_mask.append(outputs)
      metrics |= {f'mask/{spec.name}/{n}': x for n, x in new_metrics.items()}
      for name, value in terms.items():
        parts.setdefault(name, []).append(value)
    means = {name: jnp.mean(jnp.stack(x)) for name, x in parts.items()}
    memory = {}
    for name in self.memory_specs:
      means[f'loss/difficulty/{name}'], memory[name], new_metrics = (
        self._difficulty(name, per_mask, batch)
      )
      metrics |= new_metrics
    weights = {
      'base': self.lambda_base,
      'progressive': self.lambda_pg,
      'difficulty': self.lambda_df,
      'alignment': self.lambda_al,
    }
    total = sum(
      weights[name.split('/')[1]] * value
      for name, value in means.items()
      if name.startswith('loss/')
    )
    for name in self.align:  # logged loss: over all layer pairs
      means[f'loss/alignment/{name}'] += means.pop(f'spread/{name}')
    for name in self.student.decoder:
      metrics[f'target/std/{name}'] = jnp.std(targets[name])
    return total, phase_lib.Aux(metrics | means, memory)

  def _under_mask(
    self,
    params: phase_lib.Params,
    teachers: Mapping[str, Any],
    batch: batch_lib.Batch,
    rng: rngs.Rng,
    index: int,
  ) -> tuple[_Outputs, dict[str, Array], Mapping[str, Array]]:
    """Returns the student's outputs, loss terms and metrics for one mask."""
    video, spec = batch.video, self.masks[index]
    grid = tubelets.grid_of(video.shape, self.encoder.patch)
    mask, mask_metrics = spec.draw(rng, batch, grid)
    out = self.student.apply(
      {'params': params},
      video,
      mask,
      deterministic=False,
      rngs={'dropout': rng.per_batch(f'dropout/{spec.name}')},
    )
    terms, per_patch = {}, {}
    for name, predicted in out.predicted.items():
      target = sampling.gather(batch.targets[name], mask.masked)
      target = losses.TARGET_NORMS[self.target_norm](target)
      per_patch[name] = losses.per_token(predicted, target, self.feature_loss)
      terms[f'loss/base/{name}'] = jnp.mean(per_patch[name])
    if self.previous_masks:
      previous_mask, _ = self.previous_masks[index].draw(rng, batch, grid)
      previous_student = self.teachers['previous'](
        teachers['previous'], video, previous_mask, at=mask.masked
      )
      terms |= self._progressive(
        out.predicted, previous_student.predicted, mask, previous_mask
      )
    terms |= self._alignment(params, out.features, batch.targets, mask)
    return _Outputs(mask, per_patch, out.features), terms, mask_metrics

  def _progressive(
    self,
    predicted: Mapping[str, Array],
    previous_student: Mapping[str, Array],
    mask: sampling.Mask,
    before: sampling.Mask,
  ) -> dict[str, Array]:
    """Returns PSD's distance to the predictions of the previous student.

    The decoders of the previous student were trained at its masked patches
    only. The distance is therefore also logged separately for patches that it
    masks and for patches that it sees.
    """
    n = mask.visible.shape[1] + mask.masked.shape[1]
    both_masked = sampling.gather(
      pmd_terms.hidden(before.masked, n), mask.masked
    )
    total, where_masked, where_visible = (jnp.zeros(()) for _ in range(3))
    for name, target in previous_student.items():
      distance = losses.per_token(predicted[name], target, 'mse')
      where_masked += _mean_where(distance, both_masked)
      where_visible += _mean_where(distance, ~both_masked)
      total += jnp.mean(distance)
    return {
      'loss/progressive': where_masked
      if self.pg_positions != 'masked'
      else total,
      'pg/both_masked': where_masked,
      'pg/visible_to_previous': where_visible,
    }

  def _alignment(
    self,
    params: phase_lib.Params,
    features: tuple[Array, ...],
    targets: Mapping[str, Array],
    mask: sampling.Mask,
  ) -> dict[str, Array]:
    """Returns CLFA's distances on the visible tokens."""
    norm = losses.TARGET_NORMS[self.align_norm]
    shallow, middle, _ = pmd_terms.thirds(len(features) - 1)
    terms = {}
    for name, module in self.align.items():
      mapped = module.apply(
        {'params': params[f'align_{name}']},
        {n: norm(features[n]) for n in (*shallow, *middle)},
      )
      means = [
        sampling.gather(targets[f'{name}/{group}'], mask.visible)
        for group in ('middle', 'deep')
      ]
      terms[f'loss/alignment/{name}'] = pmd_terms.align(
        mapped, ((shallow, means[0]), (middle, means[1]))
      )
      spread = sampling.gather(targets[f'{name}/spread'], mask.visible)
      terms[f'spread/{name}'] = jnp.mean(spread)
    return terms

  def _difficulty(
    self,
    name: str,
    seen: list[_Outputs],
    batch: batch_lib.Batch,
  ) -> tuple[Array, Array, dict[str, Array]]:
    """Returns DARE's loss, the new example memory of the batch, and metrics."""
    grid = tubelets.grid_of(batch.video.shape, self.encoder.patch)
    n = grid[0] * grid[1] * grid[2]
    totals = [
      pmd_terms.spread(outputs.loss[name], outputs.mask.masked, n)
      for outputs in seen
    ]
    counts = sum(
      pmd_terms.hidden(outputs.mask.masked, n).astype(jnp.float32)
      for outputs in seen
    )
    hidden = counts > 0
    # Mean over the masks that hide the patch.
    loss = sum(totals) / jnp.maximum(counts, 1.0)
    stored = [
      batch.example_memory[f'{name}{suffix}'] for suffix in ('', '@window')
    ]
    value, window = (
      pmd_terms.read(x, batch, grid, self.memory_frame) for x in stored
    )
    difficulty = pmd_terms.weigh(
      loss,
      hidden,
      value,
      window,
      alpha=self.alpha,
      tau=self.tau,
      parts=self.dare,
    )
    # A substitute clip has the pixels of another example: it has no memory.
    term = jnp.where(batch.substituted, 0.0, difficulty.loss)
    if self.df_extra_mean:
      term = term / jnp.sum(hidden, axis=1)
    memory = pmd_terms.write(
      stored[0],
      difficulty.smoothed,
      hidden,
      batch,
      grid,
      shape=self.memory_shape,
      frame=self.memory_frame,
    )
    return (
      jnp.mean(term),
      memory,
      {
        f'dare/entropy/{name}': pmd_terms.evenness(difficulty.weights, hidden),
        f'dare/max_weight/{name}': jnp.max(difficulty.weights),
        f'example_memory/filled/{name}': jnp.mean(
          jnp.any(stored[0] != 0, axis=1).astype(jnp.float32)
        ),
      },
    )

  def cost(self, video: tuple[int, ...]) -> cost_lib.Cost:
    """Returns FLOPs per clip from the actual token counts."""
    return cost_lib.pmd(self, video)


def _mean_where(x: Array, where: Array) -> Float[Array, '']:
  """Returns the mean of x over the selected entries; 0 if none is selected."""
  count = jnp.sum(where)
  return jnp.sum(jnp.where(where, x, 0.0)) / jnp.maximum(count, 1)
