"""Masks over Hiera's mask units, and units to the tokens of a ViT.

A unit is one time step of 2x2 tokens: 2 frames of 32x32 pixels where a token
is 2 frames of 16x16. Unit grids count units along (time, height, width), and
masks hold indices of units in raster order. Hiera's own masks are boolean and
say what is kept; here they are index arrays as any others.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Key

from vssl_jax import masking, rngs

MODES = ('sample', 'top', 'low', 'uniform')
SIDE = 2  # tokens of a unit along height and width


def random_units(
  keys: Key[Array, 'B'], unit_grid: masking.Grid, mask_ratio: float
) -> masking.Mask:
  """Returns a uniform split of all units (Hiera-MAE, arXiv 2306.00989)."""
  return masking.random(keys, unit_grid, mask_ratio, 'visible_floor')


def from_attention(
  keys: Key[Array, 'B'],
  scores: Float[Array, 'B t S'],
  visible_per_step: int,
  mode: str = 'sample',
  tube: bool = False,
) -> masking.Mask:
  """Returns a split with equally many visible cells at every time step.

  Args:
    keys: per-example keys [B].
    scores: of the cells of each time step, not negative; their scale does not
      matter. No gradient goes through them.
    visible_per_step: how many cells are visible.
    mode: `sample` draws without replacement with probabilities by the scores
      (what UMT does, arXiv 2303.16058), by Gumbel noise on their logarithms;
      `top` and `low` take the highest and the lowest; `uniform` draws without
      looking.
    tube: the same cells at every time step, by the scores summed over time.

  Raises:
    ValueError: an unknown mode, or nothing is left visible or masked.
  """
  batch, t, cells = scores.shape
  if mode not in MODES:
    raise ValueError(f'selection: found {mode!r}, wanted one of {MODES}')
  if not 0 < visible_per_step < cells:
    raise ValueError(
      f'visible_per_step: found {visible_per_step}, wanted 1 to {cells - 1} of '
      f'the {cells} cells of a time step'
    )
  scores = lax.stop_gradient(scores.astype(jnp.float32))
  if tube:
    scores = jnp.sum(scores, axis=1, keepdims=True)
  if mode in ('top', 'low'):
    rank = scores if mode == 'top' else -scores
  else:
    shape = scores.shape[1:]
    rank = jax.vmap(lambda key: jax.random.gumbel(key, shape))(keys)
    if mode == 'sample':
      # The floor lies under every other cell by more than the noise can reach.
      rank = rank + jnp.log(jnp.maximum(_share(scores), 1e-30))
  chosen = lax.top_k(rank, visible_per_step)[1]
  start = cells * jnp.arange(t, dtype=jnp.int32).reshape(1, t, 1)
  visible = (chosen + start).reshape(batch, t * visible_per_step)
  return masking.partition(visible, t * cells)


def _share(scores: Float[Array, 'B t S']) -> Float[Array, 'B t S']:
  """Returns scores that sum to 1 at every time step."""
  return scores / jnp.maximum(jnp.sum(scores, axis=2, keepdims=True), 1e-30)


def expand_units(
  units: Int32[Array, 'B K'], unit_grid: masking.Grid
) -> Int32[Array, 'B 4*K']:
  """Returns the tokens of units, four after four in row-major order.

  Unit (ti, y, x) has the tokens (ti, 2y + {0, 1}, 2x + {0, 1}) of a grid of
  (t, 2h, 2w).
  """
  _, h, w = unit_grid
  step, y, x = units // (h * w), units // w % h, units % w
  corner = (step * SIDE * h + SIDE * y) * SIDE * w + SIDE * x
  inside = [SIDE * w * row + column for row in (0, 1) for column in (0, 1)]
  offset = jnp.asarray(inside, jnp.int32).reshape(1, 1, -1)
  return (corner[:, :, None] + offset).reshape(units.shape[0], -1)


def token_mask(mask: masking.Mask, unit_grid: masking.Grid) -> masking.Mask:
  """Returns a mask of units as one of tokens, ascending."""
  return masking.Mask(
    *(jnp.sort(expand_units(index, unit_grid), axis=1) for index in mask)
  )


def pool(
  scores: Float[Array, 'B N'], unit_grid: masking.Grid
) -> Float[Array, 'B t S']:
  """Returns the mean of the scores of each unit's tokens."""
  t, h, w = unit_grid
  cells = scores.reshape(-1, t, h, SIDE, w, SIDE)
  return jnp.mean(cells, axis=(3, 5)).reshape(-1, t, h * w)


def spread(
  scores: Float[Array, 'B t S'], unit_grid: masking.Grid
) -> Float[Array, 'B N']:
  """Returns the score of each token's unit, for pictures."""
  cells = scores.reshape(-1, *unit_grid)
  cells = jnp.repeat(jnp.repeat(cells, SIDE, axis=2), SIDE, axis=3)
  return cells.reshape(scores.shape[0], -1)


@dataclasses.dataclass(frozen=True)
class Units:
  """A mask of units as a static field of a phase.

  Attributes:
    name: names the random stream (`mask/<name>`); '' for a mask alone.
    mask_ratio: fraction of the units hidden.
    mode: of `from_attention`, or `random`: all units split at random.
    tube: of `from_attention`.
  """

  name: str
  mask_ratio: float
  mode: str = 'sample'
  tube: bool = False

  def counts(self, unit_grid: masking.Grid) -> tuple[int, int]:
    """Returns how many units are visible and masked.

    Hiera rounds the visible count of all units down; by attention the masked
    count of each time step is rounded down, as UMT does.
    """
    t, cells = unit_grid[0], math.prod(unit_grid[1:])
    if self.mode == 'random':
      return masking.counts(t * cells, self.mask_ratio, 'visible_floor')
    visible, masked = masking.counts(cells, self.mask_ratio, 'masked_floor')
    return t * visible, t * masked

  def draw(
    self,
    rng: rngs.Rng,
    batch: Mapping[str, Any],
    unit_grid: masking.Grid,
    scores: Float[Array, 'B t S'] | None = None,
  ) -> tuple[masking.Mask, masking.Metrics]:
    """Returns this step's mask of a batch, and what to log of it.

    Args:
      rng: of the step.
      batch: `index` int32 [B] and perhaps `repeat`, see `Rng.per_example`.
      unit_grid: units along (time, height, width).
      scores: of all units by time step; `random` and `uniform` need none.

    Raises:
      ValueError: a mode that needs scores, and none are given.
    """
    keys = rng.per_example(f'mask/{self.name}' if self.name else 'mask', batch)
    if self.mode == 'random':
      mask = random_units(keys, unit_grid, self.mask_ratio)
    elif scores is None and self.mode != 'uniform':
      raise ValueError(
        f'mask of units: selection {self.mode!r} needs scores and there are '
        "none; wanted a teacher that gives them, or units='random'"
      )
    else:
      shape = (len(keys), unit_grid[0], math.prod(unit_grid[1:]))
      visible = self.counts(unit_grid)[0] // unit_grid[0]
      given = jnp.ones(shape) if scores is None else scores
      mask = from_attention(keys, given, visible, self.mode, self.tube)
    told = {
      f'{kind}_units': jnp.float32(index.shape[1])
      for kind, index in zip(mask._fields, mask, strict=True)
    }
    return mask, told | ({} if scores is None else describe(scores, mask))


def describe(
  scores: Float[Array, 'B t S'], mask: masking.Mask
) -> masking.Metrics:
  """Returns how a mask and the scores of its cells go together.

  Returns:
    `attention_kept`: share of the scores that is visible, and `entropy` of the
    scores of a time step, 1 where they are all the same.
  """
  scores = lax.stop_gradient(scores.astype(jnp.float32))
  flat = scores.reshape(scores.shape[0], -1)
  kept = jnp.sum(masking.gather(flat, mask.visible), axis=1)
  share = _share(scores)
  bits = -jnp.sum(jax.scipy.special.xlogy(share, share), axis=2)
  return {
    'attention_kept': jnp.mean(kept / jnp.maximum(jnp.sum(flat, 1), 1e-30)),
    'entropy': jnp.mean(bits) / math.log(scores.shape[2]),
  }
