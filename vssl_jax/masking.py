"""Masks: which tokens an encoder sees and which it has to predict.

A mask is two arrays of token indices with static lengths, drawn inside the
loss on the device. The index of the token at time step ti, row yi, column xi
of a grid (t, h, w) is `(ti * h + yi) * w + xi`. Every draw takes one key per
example (`rngs.Rng.per_example`), so that the mask of an example depends on the
seed, the step and the example, and never on how the batch is laid out.

`mask_ratio` is the fraction hidden. Keys must be of a counter-based kind such
as jax's default, whose values under `vmap` are those of single calls.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Key, Shaped

from vssl_jax import rectangles

Grid = tuple[int, int, int]
Rule = Literal['masked_floor', 'visible_floor']
Select = Literal['random_k', 'raster_truncate']
SizePer = Literal['step', 'example']
Metrics = Mapping[str, Float[Array, '']]


class Mask(NamedTuple):
  """Indices of visible and of masked tokens, ascending and disjoint.

  Attributes:
    visible: tokens that the encoder gets.
    masked: tokens to predict. Multi-block masks leave some tokens in neither.
  """

  visible: Int32[Array, 'B V']
  masked: Int32[Array, 'B M']


def counts(n: int, ratio: float, rule: Rule) -> tuple[int, int]:
  """Returns how many of `n` positions are visible and masked.

  Two published rounding rules differ: VideoMAE and MVD round the masked count
  down, MAE, Hiera and V-JEPA the visible one. Of 196 at .9 they leave 20 and
  19 visible.

  Raises:
    ValueError: unknown rule, or nothing is left visible or masked.
  """
  # Floats exactly as published: int(196 * (1 - .9)) is int(19.599...) = 19.
  if rule == 'masked_floor':
    visible = n - int(ratio * n)
  elif rule == 'visible_floor':
    visible = int(n * (1 - ratio))
  else:
    raise ValueError(
      f"rule: found {rule!r}, wanted 'masked_floor' or 'visible_floor'"
    )
  if not 0 < visible < n:
    raise ValueError(
      f'mask_ratio {ratio} ({rule}) leaves {visible} of {n} positions '
      'visible; wanted at least 1 visible and 1 masked: change the ratio, or '
      'use a larger clip or smaller patches'
    )
  return visible, n - visible


def gather(
  x: Shaped[Array, 'B N ...'], index: Int32[Array, 'B K']
) -> Shaped[Array, 'B K ...']:
  """Returns the tokens of each example at its indices."""
  index = index.reshape(index.shape + (1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, index, axis=1)


def partition(order: Int32[Array, 'B V'], n: int) -> Mask:
  """Returns the mask that shows `order` and hides the rest of n tokens."""

  def rest(row: Array) -> Array:
    hidden = jnp.ones(n, bool).at[row].set(False)
    tokens = jnp.where(hidden, jnp.arange(n, dtype=jnp.int32), n)
    return jnp.sort(tokens)[: n - row.shape[0]]

  return Mask(jnp.sort(order, axis=1), jax.vmap(rest)(order))


def random(
  keys: Key[Array, 'B'],
  grid: Grid,
  mask_ratio: float,
  rule: Rule = 'visible_floor',
) -> Mask:
  """Returns a uniform split of all tokens (MAE; LayerLock at .95)."""
  n = math.prod(grid)
  visible, _ = counts(n, mask_ratio, rule)
  return partition(_shuffle(keys, n, visible), n)


def frames(
  keys: Key[Array, 'B'],
  grid: Grid,
  mask_ratio: float,
  rule: Rule = 'visible_floor',
) -> Mask:
  """Returns a uniform split of each time step, drawn apart from the others.

  It is MAE's mask (arXiv 2111.06377) of every frame: all time steps have the
  same number of visible tokens and not the same positions.
  """
  t, h, w = grid
  visible, _ = counts(h * w, mask_ratio, rule)
  own = jax.vmap(lambda key: jax.random.split(key, t))(keys).reshape(-1)
  flat = partition(_shuffle(own, h * w, visible), h * w)
  start = h * w * jnp.arange(t, dtype=jnp.int32).reshape(1, t, 1)
  return Mask(
    *(
      (index.reshape(-1, t, index.shape[1]) + start).reshape(
        keys.shape[0], t * index.shape[1]
      )
      for index in flat
    )
  )


def tube(
  keys: Key[Array, 'B'],
  grid: Grid,
  mask_ratio: float,
  rule: Rule = 'masked_floor',
) -> Mask:
  """Returns a uniform split of positions, the same at every time step.

  Source: VideoMAE (arXiv 2203.12602), section 3.3.
  """
  return nested_tube(keys, grid, (mask_ratio,), rule)[0]


def nested_tube(
  keys: Key[Array, 'B'],
  grid: Grid,
  ratios: tuple[float, ...],
  rule: Rule = 'masked_floor',
) -> tuple[Mask, ...]:
  """Returns one tube per ratio, cut from one permutation per example.

  What is visible at a higher ratio is visible at every lower one.

  Args:
    keys: per-example keys [B].
    grid: (t, h, w) in tokens.
    ratios: ascending.
    rule: rounding of the count per time step.

  Raises:
    ValueError: the ratios do not ascend.
  """
  if list(ratios) != sorted(ratios):
    raise ValueError(f'ratios: found {ratios}, wanted them ascending')
  t, h, w = grid
  visible = [counts(h * w, ratio, rule)[0] for ratio in ratios]
  order = _shuffle(keys, h * w, visible[0])
  flat = [partition(order[:, :v], h * w) for v in visible]
  return tuple(Mask(*(_repeat(i, t, h * w) for i in mask)) for mask in flat)


def causal(keys: Key[Array, 'B'], grid: Grid, mask_ratio: float) -> Mask:
  """Returns the mask whose visible tokens are the first in raster order.

  SALT's ablation has a mask of this name and does not define it: this
  definition is ours. The keys only say how many examples there are.
  """
  n = math.prod(grid)
  visible, masked = counts(n, mask_ratio, 'visible_floor')
  order = jnp.arange(n, dtype=jnp.int32)[None]
  batch = keys.shape[0]
  return Mask(
    jnp.broadcast_to(order[:, :visible], (batch, visible)),
    jnp.broadcast_to(order[:, visible:], (batch, masked)),
  )


def subset(
  keys: Key[Array, 'B'], indices: Int32[Array, 'B K'], count: int
) -> Int32[Array, 'B count']:
  """Returns `count` of each example's indices, uniform and ascending.

  Raises:
    ValueError: there are fewer than `count` indices.
  """
  k = indices.shape[1]
  if not 0 < count <= k:
    raise ValueError(f'count: found {count}, wanted 1 to {k}')
  chosen = _shuffle(keys, k, count)
  return jnp.sort(jnp.take_along_axis(indices, chosen, axis=1), axis=1)


def multiblock(
  keys: Key[Array, 'B'],
  size_key: Key[Array, ''],
  grid: Grid,
  *,
  blocks: int,
  scale: float,
  aspect: tuple[float, float],
  visible: int,
  masked: int,
  select: Select = 'random_k',
  size_per: SizePer = 'step',
) -> tuple[Mask, Metrics]:
  """Returns V-JEPA's block masks, cut to static counts.

  Rectangles of one size are dropped on the frame and last all time steps.
  Visible tokens are chosen outside their union and masked ones inside; where
  too few qualify the gap is filled from the other side.

  Args:
    keys: per-example keys [B]: where the blocks lie, which tokens are chosen.
    size_key: draws the blocks' aspect when `size_per='step'`.
    grid: (t, h, w) in tokens.
    blocks: rectangles per example.
    scale: area of one rectangle, as a fraction of the frame.
    aspect: range of height / width.
    visible: count per example.
    masked: count per example; `visible + masked` is at most t * h * w.
    select: `random_k` chooses uniformly. `raster_truncate` takes the first in
      raster order, as the published collator does when it cuts a batch to its
      shortest list; it rarely predicts the end of a clip.
    size_per: one aspect per `step`, shared by the batch as published, or per
      `example`.

  Returns:
    The mask, and metrics `repaired_visible`, `repaired_masked`: the fraction
    of examples in which tokens had to come from the other side.

  Raises:
    ValueError: more tokens wanted than there are, or an unknown knob.
  """
  t, h, w = grid
  n = t * h * w
  if visible < 1 or masked < 1 or visible + masked > n:
    raise ValueError(
      f'multiblock on grid {grid}: found {visible} visible and {masked} masked '
      f'tokens, wanted at least 1 of each and at most {n} together'
    )
  _check_knob('select', select, ('random_k', 'raster_truncate'))
  _check_knob('size_per', size_per, ('step', 'example'))

  def one(key: Array) -> tuple[Mask, Array, Array]:
    size, place, of_visible, of_masked = jax.random.split(key, 4)
    ratio = jax.random.uniform(
      size_key if size_per == 'step' else size, (), jnp.float32, *aspect
    )
    height, width = rectangles.size(ratio, (h, w), scale)
    frame = rectangles.union(place, (h, w), blocks, height, width)
    region = jnp.tile(frame.reshape(h * w), t)
    chosen = _priority_top_k(~region, visible, of_visible, select)
    taken = jnp.zeros(n, jnp.int32).at[chosen].set(1)
    # Tokens already visible rank below all others, so both stay disjoint.
    hidden = _priority_top_k(region - 2 * taken, masked, of_masked, select)
    inside = jnp.sum(region)
    return Mask(chosen, hidden), n - inside < visible, inside < masked

  mask, few_visible, few_masked = jax.vmap(one)(keys)
  return mask, {
    'repaired_visible': jnp.mean(few_visible.astype(jnp.float32)),
    'repaired_masked': jnp.mean(few_masked.astype(jnp.float32)),
  }


def _check_knob(name: str, value: str, wanted: tuple[str, ...]) -> None:
  if value not in wanted:
    raise ValueError(f'{name}: found {value!r}, wanted one of {wanted}')


def _shuffle(
  keys: Key[Array, 'B'], n: int, first: int
) -> Int32[Array, 'B first']:
  """Returns the first places of a random order of n things, unsorted."""
  score = jax.vmap(lambda key: jax.random.uniform(key, (n,)))(keys)
  return lax.top_k(-score, first)[1]


def _repeat(
  index: Int32[Array, 'B K'], t: int, positions: int
) -> Int32[Array, 'B tK']:
  """Returns the same spatial positions at each of t time steps."""
  start = positions * jnp.arange(t, dtype=jnp.int32)[None, :, None]
  return (start + index[:, None, :]).reshape(index.shape[0], -1)


def _priority_top_k(
  priority: Shaped[Array, 'N'],
  k: int,
  key: Key[Array, ''],
  select: Select,
) -> Int32[Array, 'k']:
  """Returns k indices of the highest priority, ascending.

  Args:
    priority: integers or booleans; scores within one priority span less
      than 1, so they never cross to the next.
    k: how many.
    key: decides among equals when `select` is `random_k`.
    select: see `multiblock`.
  """
  n = priority.shape[0]
  if select == 'random_k':
    score = jax.random.uniform(key, (n,))
  else:
    score = -jnp.arange(n, dtype=jnp.float32) / n
  return jnp.sort(lax.top_k(score + priority, k)[1])
