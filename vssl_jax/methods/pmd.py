"""PMD: a student of two frozen teachers, in phases of rising mask ratio.

A masked video student predicts the features of an image teacher (of every
tubelet's first frame) and of a video teacher, as in MVD (arXiv 2212.04500).
PMD (CVPR 2026) adds three things: each phase hides more than the one before it
and is guided by that one's student (PSD); losses of patches are smoothed over
visits, and hard patches weigh more (DARE); shallow and middle layers follow
deeper layers of the teachers (CLFA). With one phase and the three weights at 0
it is MVD. No code of PMD is public, and its text was not available to us:
`README.md` lists what it leaves open or says in two ways, and what we chose.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from vssl_jax import losses, mask_specs, masking, rngs
from vssl_jax.methods import (
  base,
  difficulty,
  patch_memory,
  pixel_phase,
  pmd_cost,
)
from vssl_jax.methods import teachers as teachers_lib
from vssl_jax.models import layers
from vssl_jax.models import student as student_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distil(base.Phase):
  """Steps at one mask ratio.

  Attributes:
    student: encoder and a decoder per teacher; `teachers` has the same names,
      and `previous` besides where a student of an earlier phase guides.
    align: teacher -> maps of the student's layers to its width; empty without
      alignment.
    masks: all drawn every step, under one pass of the teachers.
    previous_masks: what the previous student sees, one for each of `masks`.
  """

  student: student_lib.Student
  align: Mapping[str, student_lib.Alignment]
  masks: tuple[mask_specs.Spec, ...]
  previous_masks: tuple[mask_specs.Spec, ...] = ()


class _Seen(NamedTuple):
  """What one mask gave, per teacher."""

  mask: masking.Mask
  loss: dict[str, Float[Array, 'B M']]
  features: tuple[Array, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pmd(base.Method):
  """The loss, and the phases that use it.

  Attributes:
    plan: in the order they run.
    lambda_base: weight of the distance to the teachers.
    lambda_pg: of the distance to the previous student (PSD).
    lambda_df: of the smoothed and weighed distance (DARE).
    lambda_al: of the alignment of layers (CLFA).
    feature_loss: `mse` (the note's "L2") or `smooth_l1` (MVD's scripts), of
      `losses.TOKEN_DISTANCES`.
    target_norm: of teachers' features, `losses.TARGET_NORMS`; MVD has none.
    alpha: weight of the new loss in the smoothed one, as written.
    tau: temperature of the weights, for losses that are means over channels.
    dare: `both`, or for ablations `smooth` or `weights`.
    df_extra_mean: the letter of the paper: DARE over the number of masked
      patches once more. Off: weights sum to 1 already, and the term would be
      a thousandth of the base loss.
    pg_positions: `masked`, the letter; `both_masked`: hidden from both
      students, as the previous one never learned to predict what it sees.
    align_norm: `none`, raw layers as nothing else is said, or `ln` on layers
      of student and teachers.
    rows_shape: `patch`, the letter, or `tube`: one for all time steps of a
      position.
    rows_frame: a row's cells are those of the crop (`grid`, the letter), or of
      the whole picture that it was cut from (`crop`).

  What else the note leaves open or says in two ways: the table of `README.md`.
  """

  plan: tuple[Distil, ...]
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
  rows_shape: str = 'patch'
  rows_frame: str = 'grid'

  def phases(self) -> tuple[base.Phase, ...]:
    """Returns the plan."""
    return self.plan

  def init(
    self, rng: Array, video: base.Video, phase: base.Phase
  ) -> base.Params:
    """Returns random parameters of encoder, decoders and alignment."""
    encoder = phase.student.encoder
    key = rngs.stream(rng, 'init/encoder')
    params = {'encoder': encoder.init(key, video)['params']}
    for name, head in phase.student.decoder.items():
      role = f'decoder_{name}'
      params[role] = pixel_phase.init_head(rng, video, phase, role, head)
    for name, align in phase.align.items():
      key = rngs.stream(rng, f'init/align_{name}')
      tokens = jnp.zeros((1, 1, encoder.width))
      aligned = dict.fromkeys(difficulty.aligned(encoder.depth), tokens)
      params[f'align_{name}'] = align.init(key, aligned)['params']
    return params

  def targets(
    self, teachers: Mapping[str, Any], video: base.Video, phase: base.Phase
  ) -> Mapping[str, Float[Array, 'B ...']]:
    """Returns each teacher's last block, and means of its deeper layers."""
    found, norm = {}, losses.TARGET_NORMS[self.align_norm]
    for name in phase.student.decoder:
      layers_of = teachers_lib.stream(phase, name, teachers[name], video)
      found[name] = layers_of[-1].astype(jnp.float32)
      if name not in phase.align:
        continue
      _, *groups = difficulty.thirds(len(layers_of) - 1)
      spread = jnp.zeros(found[name].shape[:2])
      for group, numbers in zip(('middle', 'deep'), groups, strict=True):
        found[f'{name}/{group}'], around = difficulty.condense(
          [norm(layers_of[i]) for i in numbers]
        )
        spread += around
      found[f'{name}/spread'] = spread
    return found

  def loss(
    self,
    params: base.Params,
    teachers: Mapping[str, Any],
    batch: Mapping[str, Any],
    rng: rngs.Rng,
    phase: base.Phase,
  ) -> tuple[Float[Array, ''], base.Aux]:
    """Returns lambda_base L_base + lambda_pg L_pg + lambda_df L_df + ..."""
    targets = self.targets_of(teachers, batch, phase)
    metrics, parts, seen = {}, {}, []
    for i, spec in enumerate(phase.masks):
      under, found, told = self._under(
        params, teachers, batch, rng, phase, i, targets
      )
      seen.append(under)
      metrics |= {f'mask/{spec.name}/{n}': x for n, x in told.items()}
      for name, value in found.items():
        parts.setdefault(name, []).append(value)
    means = {name: jnp.mean(jnp.stack(x)) for name, x in parts.items()}
    rows = {}
    for name in phase.row_specs:
      means[f'loss/difficulty/{name}'], rows[name], told = self._difficulty(
        name, seen, batch, phase
      )
      metrics |= told
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
    for name in phase.align:  # the printed loss is over all pairs of layers
      means[f'loss/alignment/{name}'] += means.pop(f'spread/{name}')
    for name in phase.student.decoder:
      metrics[f'target/std/{name}'] = jnp.std(targets[name])
    return total, base.Aux(metrics | means, rows)

  def _under(
    self,
    params: base.Params,
    teachers: Mapping[str, Any],
    batch: Mapping[str, Any],
    rng: rngs.Rng,
    phase: Distil,
    index: int,
    targets: Mapping[str, Array],
  ) -> tuple[_Seen, dict[str, Array], Mapping[str, Array]]:
    """Returns what the student does under one mask, and its loss terms."""
    video, spec = batch['video'], phase.masks[index]
    grid = layers.grid_of(video.shape, phase.encoder.patch)
    mask, told = spec.draw(rng, batch, grid)
    out = phase.student.apply(
      {'params': params},
      video,
      mask,
      deterministic=False,
      rngs={'dropout': rng.per_batch(f'dropout/{spec.name}')},
    )
    terms, per_patch = {}, {}
    for name, predicted in out.predicted.items():
      wanted = masking.gather(targets[name], mask.masked)
      wanted = losses.TARGET_NORMS[self.target_norm](wanted)
      per_patch[name] = losses.per_token(predicted, wanted, self.feature_loss)
      terms[f'loss/base/{name}'] = jnp.mean(per_patch[name])
    if phase.previous_masks:
      before, _ = phase.previous_masks[index].draw(rng, batch, grid)
      guide = phase.teachers['previous'](
        teachers['previous'], video, before, at=mask.masked
      )
      terms |= self._progressive(out.predicted, guide.predicted, mask, before)
    terms |= self._alignment(params, phase, out.features, targets, mask)
    return _Seen(mask, per_patch, out.features), terms, told

  def _progressive(
    self,
    predicted: Mapping[str, Array],
    guide: Mapping[str, Array],
    mask: masking.Mask,
    before: masking.Mask,
  ) -> dict[str, Array]:
    """Returns PSD's distance to what the previous student predicts.

    Its decoders were never trained where it saw the patch: the distance is
    also told apart by that.
    """
    n = mask.visible.shape[1] + mask.masked.shape[1]
    both = masking.gather(patch_memory.hidden(before.masked, n), mask.masked)
    total, inside, outside = (jnp.zeros(()) for _ in range(3))
    for name, target in guide.items():
      found = losses.per_token(predicted[name], target, 'mse')
      inside += _mean_where(found, both)
      outside += _mean_where(found, ~both)
      total += jnp.mean(found)
    return {
      'loss/progressive': inside if self.pg_positions != 'masked' else total,
      'pg/both_masked': inside,
      'pg/visible_to_previous': outside,
    }

  def _alignment(
    self,
    params: base.Params,
    phase: Distil,
    features: tuple[Array, ...],
    targets: Mapping[str, Array],
    mask: masking.Mask,
  ) -> dict[str, Array]:
    """Returns CLFA's distances, on the visible tokens."""
    norm = losses.TARGET_NORMS[self.align_norm]
    shallow, middle, _ = difficulty.thirds(len(features) - 1)
    terms = {}
    for name, module in phase.align.items():
      mapped = module.apply(
        {'params': params[f'align_{name}']},
        {n: norm(features[n]) for n in (*shallow, *middle)},
      )
      wanted = [
        masking.gather(targets[f'{name}/{group}'], mask.visible)
        for group in ('middle', 'deep')
      ]
      terms[f'loss/alignment/{name}'] = difficulty.align(
        mapped, ((shallow, wanted[0]), (middle, wanted[1]))
      )
      spread = masking.gather(targets[f'{name}/spread'], mask.visible)
      terms[f'spread/{name}'] = jnp.mean(spread)
    return terms

  def _difficulty(
    self,
    name: str,
    seen: list[_Seen],
    batch: Mapping[str, Any],
    phase: Distil,
  ) -> tuple[Array, Array, dict[str, Array]]:
    """Returns DARE's loss, the new rows of the batch, and what to log."""
    grid = layers.grid_of(batch['video'].shape, phase.encoder.patch)
    n = grid[0] * grid[1] * grid[2]
    totals = [
      patch_memory.spread(one.loss[name], one.mask.masked, n) for one in seen
    ]
    counts = sum(
      patch_memory.hidden(one.mask.masked, n).astype(jnp.float32)
      for one in seen
    )
    hidden = counts > 0
    loss = sum(totals) / jnp.maximum(counts, 1.0)  # over the masks that hide it
    stored = [batch[f'rows/{name}{end}'] for end in ('', '@window')]
    value, window = (
      patch_memory.read(x, batch, grid, self.rows_frame) for x in stored
    )
    found = difficulty.weigh(
      loss,
      hidden,
      value,
      window,
      alpha=self.alpha,
      tau=self.tau,
      parts=self.dare,
    )
    # The pixels of a substitute are another clip's: it has no memory.
    term = jnp.where(batch['substituted'], 0.0, found.loss)
    if self.df_extra_mean:
      term = term / jnp.sum(hidden, axis=1)
    rows = patch_memory.write(
      stored[0],
      found.smoothed,
      hidden,
      batch,
      grid,
      shape=self.rows_shape,
      frame=self.rows_frame,
    )
    return (
      jnp.mean(term),
      rows,
      {
        f'dare/entropy/{name}': difficulty.evenness(found.weights, hidden),
        f'dare/max_weight/{name}': jnp.max(found.weights),
        f'rows/filled/{name}': jnp.mean(
          jnp.any(stored[0] != 0, axis=1).astype(jnp.float32)
        ),
      },
    )

  def cost(self, phase: base.Phase, video: tuple[int, ...]) -> base.Cost:
    """Returns FLOPs per clip from true token counts."""
    return pmd_cost.cost(phase, video)


def _mean_where(x: Array, where: Array) -> Float[Array, '']:
  """Returns the mean over some entries; 0 where there are none."""
  count = jnp.sum(where)
  return jnp.sum(jnp.where(where, x, 0.0)) / jnp.maximum(count, 1)
