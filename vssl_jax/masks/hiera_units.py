"""Masks over Hiera's mask units, and conversion to the tokens of a ViT.

A unit is one time step of 2x2 tokens: 2 frames of 32x32 pixels for tokens of
2 frames of 16x16 pixels. Unit grids count units along (time, height, width).
Masks hold indices of units in raster order. Hiera's released code uses boolean
masks of visible units; here they are index arrays like all other masks.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Key

from vssl_jax import rngs
from vssl_jax.masks import sampling, tubelets

MODES = ('sample', 'top', 'low', 'uniform')
SIDE = 2  # tokens of a unit along height and width


def random_units(
  keys: Key[Array, 'B'], unit_grid: tubelets.Grid, mask_ratio: float
) -> sampling.Mask:
  """Returns a uniform random mask of units (Hiera-MAE, arXiv 2306.00989).

  Example:
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> random_units(keys, (8, 7, 7), 0.9).visible.shape
    (2, 39)
  """
  return sampling.random(keys, unit_grid, mask_ratio, 'visible_floor')


def from_attention(
  keys: Key[Array, 'B'],
  scores: Float[Array, 'B t S'],
  visible_per_step: int,
  mode: str = 'sample',
  tube: bool = False,
) -> sampling.Mask:
  """Returns a mask by attention scores, with equal counts per time step.

  Args:
    keys: per-example keys [B].
    scores: scores of the cells of each time step, not negative, of any scale.
      Gradients are stopped.
    visible_per_step: number of visible cells per time step.
    mode: `sample` draws without replacement with probabilities proportional
      to the scores (as UMT, arXiv 2303.16058), by Gumbel noise on their
      logarithms; `top` and `low` take the highest and the lowest; `uniform`
      ignores the scores.
    tube: the same cells at every time step, by the scores summed over time.

  Raises:
    ValueError: `mode` is unknown, or no cell is visible or masked.

  Example:
    >>> scores = jnp.array([[[0.1, 0.6, 0.3]]])
    >>> keys = jax.random.split(jax.random.key(0), 1)
    >>> from_attention(keys, scores, 1, 'top').visible.tolist()
    [[1]]
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
      # The floor is below all other values by more than the range of the noise.
      rank = rank + jnp.log(jnp.maximum(_share(scores), 1e-30))
  chosen = lax.top_k(rank, visible_per_step)[1]
  start = cells * jnp.arange(t, dtype=jnp.int32).reshape(1, t, 1)
  visible = (chosen + start).reshape(batch, t * visible_per_step)
  return sampling.partition(visible, t * cells)


def _share(scores: Float[Array, 'B t S']) -> Float[Array, 'B t S']:
  """Returns scores normalised to sum to 1 at every time step."""
  return scores / jnp.maximum(jnp.sum(scores, axis=2, keepdims=True), 1e-30)


def expand_units(
  units: Int32[Array, 'B K'], unit_grid: tubelets.Grid
) -> Int32[Array, 'B 4*K']:
  """Returns token indices of units: the four of each unit, row-major.

  Unit (ti, y, x) has the tokens (ti, 2y + {0, 1}, 2x + {0, 1}) of a grid of
  (t, 2h, 2w).

  Example:
    >>> expand_units(jnp.array([[3]]), (1, 2, 2)).tolist()
    [[10, 11, 14, 15]]
  """
  _, h, w = unit_grid
  step, y, x = units // (h * w), units // w % h, units % w
  corner = (step * SIDE * h + SIDE * y) * SIDE * w + SIDE * x
  inside = [SIDE * w * row + column for row in (0, 1) for column in (0, 1)]
  offset = jnp.asarray(inside, jnp.int32).reshape(1, 1, -1)
  return (corner[:, :, None] + offset).reshape(units.shape[0], -1)


def token_mask(mask: sampling.Mask, unit_grid: tubelets.Grid) -> sampling.Mask:
  """Converts a mask of units to a mask of tokens, ascending.

  Example:
    >>> mask = sampling.Mask(jnp.array([[0]]), jnp.array([[1]]))
    >>> token_mask(mask, (1, 1, 2)).visible.tolist()
    [[0, 1, 4, 5]]
  """
  return sampling.Mask(
    *(jnp.sort(expand_units(index, unit_grid), axis=1) for index in mask)
  )


def pool(
  scores: Float[Array, 'B N'], unit_grid: tubelets.Grid
) -> Float[Array, 'B t S']:
  """Averages scores of tokens over the tokens of each unit.

  Example:
    >>> pool(jnp.array([[1.0, 2.0, 3.0, 6.0]]), (1, 1, 1)).tolist()
    [[[3.0]]]
  """
  t, h, w = unit_grid
  cells = scores.reshape(-1, t, h, SIDE, w, SIDE)
  return jnp.mean(cells, axis=(3, 5)).reshape(-1, t, h * w)


def spread(
  scores: Float[Array, 'B t S'], unit_grid: tubelets.Grid
) -> Float[Array, 'B N']:
  """Repeats the score of each unit for its tokens, for pictures.

  Example:
    >>> spread(jnp.array([[[3.0]]]), (1, 1, 1)).tolist()
    [[3.0, 3.0, 3.0, 3.0]]
  """
  cells = scores.reshape(-1, *unit_grid)
  cells = jnp.repeat(jnp.repeat(cells, SIDE, axis=2), SIDE, axis=3)
  return cells.reshape(scores.shape[0], -1)


@dataclasses.dataclass(frozen=True)
class Units:
  """A mask of units as a static field of a phase.

  Attributes:
    name: names the random stream (`mask/<name>`); '' for stream `mask`.
    mask_ratio: fraction of the units hidden.
    mode: mode of `from_attention`, or `random`: uniform over all units.
    tube: option of `from_attention`.
  """

  name: str
  mask_ratio: float
  mode: str = 'sample'
  tube: bool = False

  def counts(self, unit_grid: tubelets.Grid) -> tuple[int, int]:
    """Returns the numbers of visible and masked units.

    `random` rounds the visible count of all units down, as Hiera does. Other
    modes round the masked count of each time step down, as UMT does.
    """
    t, cells = unit_grid[0], math.prod(unit_grid[1:])
    if self.mode == 'random':
      return sampling.counts(t * cells, self.mask_ratio, 'visible_floor')
    visible, masked = sampling.counts(cells, self.mask_ratio, 'masked_floor')
    return t * visible, t * masked

  def draw(
    self,
    rng: rngs.Rng,
    batch: Any,
    unit_grid: tubelets.Grid,
    scores: Float[Array, 'B t S'] | None = None,
  ) -> tuple[sampling.Mask, sampling.Metrics]:
    """Draws this step's mask of a batch; returns it with its metrics.

    Args:
      rng: random streams of the step.
      batch: has `index` and `repeat`, see `Rng.per_example`.
      unit_grid: units along (time, height, width).
      scores: scores of the units of each time step; not needed by `random`
        and `uniform`.

    Raises:
      ValueError: the mode needs scores and `scores` is None.
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
      unit_scores = jnp.ones(shape) if scores is None else scores
      mask = from_attention(keys, unit_scores, visible, self.mode, self.tube)
    metrics = {
      f'{kind}_units': jnp.float32(index.shape[1])
      for kind, index in zip(mask._fields, mask, strict=True)
    }
    return mask, metrics | ({} if scores is None else describe(scores, mask))


def describe(
  scores: Float[Array, 'B t S'], mask: sampling.Mask
) -> sampling.Metrics:
  """Returns metrics of a mask and the scores of its cells.

  Returns:
    `attention_kept`: fraction of the total score that is visible. `entropy`:
    entropy of the scores of a time step, 1 for equal scores.

  Example:
    >>> mask = sampling.Mask(jnp.array([[0]]), jnp.array([[1]]))
    >>> metrics = describe(jnp.array([[[0.75, 0.25]]]), mask)
    >>> float(metrics['attention_kept'])
    0.75
  """
  scores = lax.stop_gradient(scores.astype(jnp.float32))
  flat = scores.reshape(scores.shape[0], -1)
  visible_score = jnp.sum(sampling.gather(flat, mask.visible), axis=1)
  share = _share(scores)
  entropy = -jnp.sum(jax.scipy.special.xlogy(share, share), axis=2)
  return {
    'attention_kept': jnp.mean(
      visible_score / jnp.maximum(jnp.sum(flat, 1), 1e-30)
    ),
    'entropy': jnp.mean(entropy) / math.log(scores.shape[2]),
  }
