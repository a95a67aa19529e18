"""Samples masks: indices of visible tokens and of masked tokens.

A mask is two arrays of token indices with static lengths, drawn inside the
loss on the device. The index of the token at time step ti, row yi, column xi
of a grid (t, h, w) is `(ti * h + yi) * w + xi`. Every draw takes one key per
example (`rngs.Rng.per_example`), so the mask of an example depends on the
seed, the step and the example, and not on the layout of the batch.

`mask_ratio` is the fraction hidden. Keys must be of a counter-based kind such
as JAX's default, whose values under `vmap` equal those of single calls.
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Key, Shaped

from vssl_jax.masks import tubelets

Rule = Literal['masked_floor', 'visible_floor']
Select = Literal['random_k', 'raster_truncate']
SizePer = Literal['step', 'example']
Metrics = Mapping[str, Float[Array, '']]


class Mask(NamedTuple):
  """Indices of visible and of masked tokens, ascending and disjoint.

  Attributes:
    visible: tokens that the encoder receives.
    masked: tokens to predict. With multi-block masks, some tokens are in
      neither array.
  """

  visible: Int32[Array, 'B V']
  masked: Int32[Array, 'B M']


def counts(n: int, ratio: float, rule: Rule) -> tuple[int, int]:
  """Returns the numbers of visible and masked positions, of `n`.

  There are two published rounding rules. VideoMAE and MVD round the masked
  count down; MAE, Hiera and V-JEPA round the visible count down. At .9 of 196,
  these leave 20 and 19 visible.

  Args:
    n: number of positions.
    ratio: fraction hidden.
    rule: count that is rounded down: `masked_floor` or `visible_floor`.

  Raises:
    ValueError: `rule` is unknown, or no position is visible or masked.

  Example:
    >>> counts(196, 0.9, 'masked_floor'), counts(196, 0.9, 'visible_floor')
    ((20, 176), (19, 177))
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
  """Returns the tokens of each example at its indices.

  Example:
    >>> gather(jnp.array([[5, 6, 7]]), jnp.array([[2, 0]])).tolist()
    [[7, 5]]
  """
  index = index.reshape(index.shape + (1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, index, axis=1)


def partition(order: Int32[Array, 'B V'], n: int) -> Mask:
  """Returns the mask with `order` visible and the rest of n tokens masked.

  Example:
    >>> mask = partition(jnp.array([[3, 1]]), 4)
    >>> mask.visible.tolist(), mask.masked.tolist()
    ([[1, 3]], [[0, 2]])
  """

  def masked_tokens(row: Array) -> Array:
    hidden = jnp.ones(n, bool).at[row].set(False)
    tokens = jnp.where(hidden, jnp.arange(n, dtype=jnp.int32), n)
    return jnp.sort(tokens)[: n - row.shape[0]]

  return Mask(jnp.sort(order, axis=1), jax.vmap(masked_tokens)(order))


def random(
  keys: Key[Array, 'B'],
  grid: tubelets.Grid,
  mask_ratio: float,
  rule: Rule = 'visible_floor',
) -> Mask:
  """Returns a uniform random mask of all tokens (MAE; LayerLock at .95).

  Example:
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> mask = random(keys, (8, 14, 14), 0.95)
    >>> mask.visible.shape, mask.masked.shape
    ((2, 78), (2, 1490))
  """
  n = math.prod(grid)
  visible, _ = counts(n, mask_ratio, rule)
  return partition(_shuffle(keys, n, visible), n)


def frames(
  keys: Key[Array, 'B'],
  grid: tubelets.Grid,
  mask_ratio: float,
  rule: Rule = 'visible_floor',
) -> Mask:
  """Returns a uniform random mask, drawn independently for each time step.

  This is MAE's mask (arXiv 2111.06377) for every frame. All time steps have
  the same number of visible tokens, at different positions.

  Example:
    >>> mask = frames(jax.random.split(jax.random.key(0), 2), (8, 14, 14), 0.75)
    >>> mask.visible.shape
    (2, 392)
  """
  t, h, w = grid
  visible, _ = counts(h * w, mask_ratio, rule)
  step_keys = jax.vmap(lambda key: jax.random.split(key, t))(keys).reshape(-1)
  flat = partition(_shuffle(step_keys, h * w, visible), h * w)
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
  grid: tubelets.Grid,
  mask_ratio: float,
  rule: Rule = 'masked_floor',
) -> Mask:
  """Returns a uniform random mask, the same at every time step.

  Source: VideoMAE (arXiv 2203.12602), section 3.3.

  Example:
    >>> mask = tube(jax.random.split(jax.random.key(0), 2), (8, 14, 14), 0.9)
    >>> mask.visible.shape
    (2, 160)
    >>> steps = mask.visible.reshape(2, 8, 20) % 196
    >>> bool((steps == steps[:, :1]).all())
    True
  """
  return nested_tube(keys, grid, (mask_ratio,), rule)[0]


def nested_tube(
  keys: Key[Array, 'B'],
  grid: tubelets.Grid,
  ratios: tuple[float, ...],
  rule: Rule = 'masked_floor',
) -> tuple[Mask, ...]:
  """Returns one tube mask per ratio, from one permutation per example.

  Tokens visible at a higher ratio are visible at every lower ratio.

  Args:
    keys: per-example keys [B].
    grid: (t, h, w) in tokens.
    ratios: mask ratios, ascending.
    rule: rounding of the count per time step, see `counts`.

  Raises:
    ValueError: the ratios do not ascend.

  Example:
    >>> keys = jax.random.split(jax.random.key(0), 1)
    >>> low, high = nested_tube(keys, (2, 4, 4), (0.5, 0.75))
    >>> set(high.visible[0].tolist()) <= set(low.visible[0].tolist())
    True
  """
  if list(ratios) != sorted(ratios):
    raise ValueError(f'ratios: found {ratios}, wanted them ascending')
  t, h, w = grid
  visible = [counts(h * w, ratio, rule)[0] for ratio in ratios]
  order = _shuffle(keys, h * w, visible[0])
  flat = [partition(order[:, :v], h * w) for v in visible]
  return tuple(Mask(*(_repeat(i, t, h * w) for i in mask)) for mask in flat)


def causal(
  keys: Key[Array, 'B'], grid: tubelets.Grid, mask_ratio: float
) -> Mask:
  """Returns the mask whose visible tokens are the first in raster order.

  SALT's ablation names this mask without a definition; this one is our choice.
  Only the number of keys is used.

  Example:
    >>> mask = causal(jax.random.split(jax.random.key(0), 1), (2, 1, 2), 0.75)
    >>> mask.visible.tolist(), mask.masked.tolist()
    ([[0]], [[1, 2, 3]])
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
  """Draws `count` of each example's indices uniformly; returns them ascending.

  Raises:
    ValueError: there are fewer than `count` indices.

  Example:
    >>> keys = jax.random.split(jax.random.key(0), 1)
    >>> subset(keys, jnp.array([[2, 4, 6]]), 3).tolist()
    [[2, 4, 6]]
  """
  k = indices.shape[1]
  if not 0 < count <= k:
    raise ValueError(f'count: found {count}, wanted 1 to {k}')
  chosen = _shuffle(keys, k, count)
  return jnp.sort(jnp.take_along_axis(indices, chosen, axis=1), axis=1)


def multiblock(
  keys: Key[Array, 'B'],
  size_key: Key[Array, ''],
  grid: tubelets.Grid,
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

  Rectangles of equal size are placed at random on the frame and extend over
  all time steps. Visible tokens are chosen outside their union, masked tokens
  inside. If one side has too few tokens, the rest comes from the other side.

  Args:
    keys: per-example keys [B], for the positions of the blocks and the choice
      of tokens.
    size_key: key of the blocks' aspect if `size_per='step'`.
    grid: (t, h, w) in tokens.
    blocks: number of rectangles per example.
    scale: area of one rectangle, as a fraction of the frame.
    aspect: range of height / width.
    visible: number of visible tokens per example.
    masked: number of masked tokens per example; `visible + masked` is at most
      t * h * w.
    select: `random_k` chooses uniformly. `raster_truncate` takes the first
      tokens in raster order, as the published collator does when it truncates
      a batch to its shortest list; tokens at the end of a clip are then rarely
      predicted.
    size_per: one aspect per `step`, shared by the batch as published, or one
      per `example`.

  Returns:
    The mask, and metrics `repaired_visible`, `repaired_masked`: the fraction
    of examples with tokens taken from the other side.

  Raises:
    ValueError: `visible + masked` exceeds the number of tokens, one of them is
      below 1, or an option is unknown.

  Example:
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> mask, _ = multiblock(
    ...   keys, jax.random.key(1), (8, 14, 14), blocks=8, scale=0.15,
    ...   aspect=(0.75, 1.5), visible=320, masked=656,
    ... )
    >>> mask.visible.shape, mask.masked.shape
    ((2, 320), (2, 656))
  """
  t, h, w = grid
  n = t * h * w
  if visible < 1 or masked < 1 or visible + masked > n:
    raise ValueError(
      f'multiblock on grid {grid}: found {visible} visible and {masked} masked '
      f'tokens, wanted at least 1 of each and at most {n} together'
    )
  _check_option('select', select, ('random_k', 'raster_truncate'))
  _check_option('size_per', size_per, ('step', 'example'))

  def sample_example(key: Array) -> tuple[Mask, Array, Array]:
    aspect_key, place_key, visible_key, masked_key = jax.random.split(key, 4)
    ratio = jax.random.uniform(
      size_key if size_per == 'step' else aspect_key,
      (),
      jnp.float32,
      *aspect,
    )
    height, width = rectangle_size(ratio, (h, w), scale)
    frame = rectangle_union(place_key, (h, w), blocks, height, width)
    region = jnp.tile(frame.reshape(h * w), t)
    chosen = _priority_top_k(~region, visible, visible_key, select)
    is_visible = jnp.zeros(n, jnp.int32).at[chosen].set(1)
    # Visible tokens get the lowest priority, so the two sets are disjoint.
    hidden = _priority_top_k(
      region - 2 * is_visible, masked, masked_key, select
    )
    inside = jnp.sum(region)
    return Mask(chosen, hidden), n - inside < visible, inside < masked

  mask, few_visible, few_masked = jax.vmap(sample_example)(keys)
  return mask, {
    'repaired_visible': jnp.mean(few_visible.astype(jnp.float32)),
    'repaired_masked': jnp.mean(few_masked.astype(jnp.float32)),
  }


def _check_option(name: str, value: str, wanted: tuple[str, ...]) -> None:
  if value not in wanted:
    raise ValueError(f'{name}: found {value!r}, wanted one of {wanted}')


def _shuffle(
  keys: Key[Array, 'B'], n: int, first: int
) -> Int32[Array, 'B first']:
  """Returns the first entries of a random permutation of n, unsorted."""
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
  """Returns the k indices of highest priority, ascending.

  Args:
    priority: integers or booleans. Scores are added to it that span less than
      1, so they only order entries of equal priority.
    k: number of indices.
    key: orders entries of equal priority if `select` is `random_k`.
    select: see `multiblock`.
  """
  n = priority.shape[0]
  if select == 'random_k':
    score = jax.random.uniform(key, (n,))
  else:
    score = -jnp.arange(n, dtype=jnp.float32) / n
  return jnp.sort(lax.top_k(score + priority, k)[1])


def rectangle_size(
  aspect: Float[Array, ''], frame: tuple[int, int], scale: float
) -> tuple[Int32[Array, ''], Int32[Array, '']]:
  """Returns a rectangle's height and width in tokens.

  Args:
    aspect: height / width.
    frame: (h, w) of the grid; height and width are clipped to it.
    scale: area of the rectangle, as a fraction of the frame.

  Example:
    >>> height, width = rectangle_size(jnp.float32(1.0), (14, 14), 0.25)
    >>> int(height), int(width)
    (7, 7)
  """
  h, w = frame
  area = int(h * w * scale)
  height = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
  width = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
  return jnp.clip(height, 1, h), jnp.clip(width, 1, w)


def rectangle_union(
  key: Key[Array, ''],
  frame: tuple[int, int],
  count: int,
  height: Int32[Array, ''],
  width: Int32[Array, ''],
) -> Bool[Array, 'h w']:
  """Returns the union of `count` random rectangles inside the frame.

  Example:
    >>> size = jnp.int32(2), jnp.int32(3)
    >>> int(rectangle_union(jax.random.key(0), (4, 4), 1, *size).sum())
    6
  """
  h, w = frame
  top_key, left_key = jax.random.split(key)
  top = jax.random.randint(top_key, (count, 1), 0, h - height + 1)
  left = jax.random.randint(left_key, (count, 1), 0, w - width + 1)
  y, x = jnp.arange(h)[None], jnp.arange(w)[None]
  rows = (y >= top) & (y < top + height)
  columns = (x >= left) & (x < left + width)
  return jnp.any(rows[:, :, None] & columns[:, None, :], axis=0)
