"""Masks of Hiera's units: counts, what is drawn, and where units lie."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from vssl_jax import rngs
from vssl_jax.data import batch as batch_lib
from vssl_jax.masks import hiera_units, sampling

GRID = (8, 7, 7)  # of 16 frames of 224x224
SMALL = (4, 2, 2)
STEP = rngs.Rng(jax.random.key(3), jnp.int32(5))
BATCH = batch_lib.Batch(
  video=None, index=jnp.arange(4), repeat=jnp.zeros(4, jnp.int32)
)


def keys_of(batch, seed=0):
  return jax.random.split(jax.random.key(seed), batch)


def scores_of(batch=4, grid=GRID, seed=1):
  rng = np.random.default_rng(seed)
  shape = (batch, grid[0], grid[1] * grid[2])
  return jnp.asarray(rng.exponential(size=shape) ** 2, jnp.float32)


DRAWN = jax.jit(
  hiera_units.from_attention,
  static_argnames=('visible_per_step', 'mode', 'tube'),
)


@functools.cache
def mask_of(mode, tube=False):
  return DRAWN(
    keys_of(4), scores_of(), visible_per_step=5, mode=mode, tube=tube
  )


@pytest.mark.parametrize(
  ('mode', 'ratio', 'visible', 'masked'),
  [
    ('random', 0.9, 39, 353),
    ('random', 0.8, 78, 314),
    ('random', 0.75, 98, 294),
    ('sample', 0.9, 40, 352),
    ('sample', 0.8, 80, 312),
    ('sample', 0.75, 104, 288),
  ],
)
def test_counts(mode, ratio, visible, masked):
  """Hiera rounds all units; by attention each time step is rounded."""
  spec = hiera_units.Units('', ratio, mode)
  assert spec.counts(GRID) == (visible, masked)
  mask, _ = jax.eval_shape(lambda: spec.draw(STEP, BATCH, GRID, scores_of()))
  assert mask.visible.shape == (4, visible) and mask.masked.shape == (4, masked)


@pytest.mark.parametrize(
  ('mode', 'tube'), [*itertools.product(hiera_units.MODES, (False, True))]
)
def test_a_partition_with_equal_counts_at_every_step(mode, tube):
  mask = jax.tree.map(np.asarray, mask_of(mode, tube))
  for visible, masked in zip(*mask, strict=True):
    assert np.all(np.diff(visible) > 0) and np.all(np.diff(masked) > 0)
    assert set(visible) | set(masked) == set(range(392))
    assert len(visible) + len(masked) == 392
    np.testing.assert_array_equal(np.bincount(visible // 49), [5] * 8)
    steps = {tuple(row) for row in (visible % 49).reshape(8, 5)}
    assert (len(steps) == 1) == tube


def test_a_mask_depends_on_the_example_and_not_on_its_batch():
  whole, scores = mask_of('sample'), scores_of()
  # Not compiled, and of one example alone.
  alone = hiera_units.from_attention(keys_of(4)[2:3], scores[2:3], 5)
  np.testing.assert_array_equal(alone.visible, whole.visible[2:3])
  spec = hiera_units.Units('', 0.9)
  draw = jax.jit(lambda rng, batch: spec.draw(rng, batch, GRID, scores)[0][0])
  draws = [
    np.asarray(draw(rng, dataclasses.replace(BATCH, repeat=repeat)))
    for rng, repeat in (
      (STEP, jnp.zeros(4, jnp.int32)),
      (STEP, jnp.ones(4, jnp.int32)),
      (rngs.Rng(STEP.key, jnp.int32(6)), jnp.zeros(4, jnp.int32)),
    )
  ]
  for one, other in itertools.combinations(draws, 2):
    assert np.any(one != other, axis=1).all()


def test_the_highest_and_the_lowest_cells():
  scores = jnp.float32([[[0.1, 0.4, 0.2, 0.3]]])
  key = keys_of(1)
  top = DRAWN(key, scores, visible_per_step=2, mode='top')
  low = DRAWN(key, scores, visible_per_step=2, mode='low')
  np.testing.assert_array_equal(top.visible, [[1, 3]])
  np.testing.assert_array_equal(low.visible, [[0, 2]])
  tubes = jnp.float32([[[3, 0, 2], [0, 2, 2]]])  # sums 3, 2, 4
  top = DRAWN(key, tubes, visible_per_step=1, mode='top', tube=True)
  np.testing.assert_array_equal(top.visible, [[2, 5]])


def _frequencies(p, k, draws, mode='sample'):
  scores = jnp.broadcast_to(jnp.float32(p), (draws, 1, len(p)))
  found = DRAWN(keys_of(draws, 4), scores, visible_per_step=k, mode=mode)
  return np.asarray(found.visible)


def test_frequencies_are_those_of_drawing_without_replacement():
  p = (0.5, 0.3, 0.2)
  one = np.bincount(_frequencies(p, 1, 200_000)[:, 0]) / 200_000
  np.testing.assert_allclose(one, p, rtol=0.01)
  two = _frequencies(p, 2, 200_000)
  # P({0, 1}) = .5 * .3 / .5 + .3 * .5 / .7
  assert np.mean((two == [0, 1]).all(1)) == pytest.approx(0.5143, abs=0.005)


def test_the_scale_of_the_scores_does_not_matter():
  """Invariant 9."""
  for factor in (1e-9, 3.0, 1e9):
    scaled = DRAWN(keys_of(4), factor * scores_of(), visible_per_step=5)
    np.testing.assert_array_equal(scaled.visible, mask_of('sample').visible)


def test_a_cell_without_score_is_drawn_only_if_it_must():
  p = np.full((500, 2, 6), 1e-7, np.float32)
  p[:, :, :2] = 0
  p[:, :, 2] = 1
  few = DRAWN(keys_of(500), jnp.asarray(p), visible_per_step=4).visible
  assert np.all(np.asarray(few) % 6 >= 2)
  more = DRAWN(keys_of(500), jnp.asarray(p), visible_per_step=5).visible
  counts = np.bincount(np.asarray(more).ravel() % 6)
  assert np.all(counts[2:] == 1000) and counts[:2].sum() == 1000
  # Which of the two is by chance.
  assert scipy.stats.binomtest(int(counts[0]), 1000).pvalue > 1e-4


def test_even_scores_are_as_drawing_at_random():
  """Invariant 9: each unit is visible as often, `uniform` looks at nothing."""
  draws, k = 6000, 1
  even = jnp.ones((draws, 4, 4))
  odd = scores_of(draws, SMALL)
  found = {
    'sample': DRAWN(keys_of(draws), even, visible_per_step=k),
    'uniform': DRAWN(keys_of(draws), odd, visible_per_step=k, mode='uniform'),
    'random': jax.jit(lambda keys: hiera_units.random_units(keys, SMALL, 0.75))(
      keys_of(draws, 9)
    ),
  }
  for mask in found.values():
    counts = np.bincount(np.asarray(mask.visible).ravel(), minlength=16)
    assert counts.sum() == 4 * draws
    assert scipy.stats.chisquare(counts).pvalue > 1e-4
  np.testing.assert_array_equal(found['sample'][0], found['uniform'][0])


def test_what_changes_at_one_step_stays_there():
  """Invariant 8: the noise of a time step is its own."""
  scores = scores_of()
  other = scores.at[:, 3].set(scores[:, 3, ::-1])
  now = DRAWN(keys_of(4), other, visible_per_step=5).visible.reshape(4, 8, 5)
  then = mask_of('sample').visible.reshape(4, 8, 5)
  changed = np.any(now != then, axis=(0, 2))
  np.testing.assert_array_equal(changed, np.arange(8) == 3)
  tube = DRAWN(keys_of(4), other, visible_per_step=5, tube=True).visible
  assert np.any(tube != mask_of('sample', True).visible)


def test_no_gradient_goes_through_the_scores():
  def kept(scores):
    mask = hiera_units.from_attention(keys_of(4), scores, 5)
    told = hiera_units.describe(scores, mask)
    return told['attention_kept'] + told['entropy']

  assert not np.any(jax.jit(jax.grad(kept))(scores_of()))


def test_tokens_of_a_unit():
  """Invariant 4: the published layout by hand."""
  units = jnp.int32([[0, 8, 49]])
  tokens = hiera_units.expand_units(units, GRID)
  assert tokens.tolist() == [[0, 1, 14, 15, 30, 31, 44, 45, 196, 197, 210, 211]]
  every = hiera_units.expand_units(jnp.arange(392)[None], GRID)
  t, y, x = np.unravel_index(np.asarray(every)[0], (8, 14, 14))
  units = (t * 7 + y // 2) * 7 + x // 2
  np.testing.assert_array_equal(units, np.arange(392).repeat(4))
  np.testing.assert_array_equal(y % 2, [0, 0, 1, 1] * 392)
  np.testing.assert_array_equal(x % 2, [0, 1, 0, 1] * 392)
  # Height and width differ.
  odd = hiera_units.expand_units(jnp.arange(12)[None], (2, 2, 3))
  assert odd[0, 8:12].tolist() == [4, 5, 10, 11]
  assert odd[0, 24:28].tolist() == [24, 25, 30, 31]
  assert sorted(odd[0].tolist()) == list(range(48))


def test_a_mask_of_units_as_one_of_tokens():
  tokens = jax.jit(lambda mask: hiera_units.token_mask(mask, GRID))
  mask = tokens(mask_of('sample'))
  for visible, masked in zip(*map(np.asarray, mask), strict=True):
    assert np.all(np.diff(visible) > 0) and np.all(np.diff(masked) > 0)
    assert len(visible) == 160 and len(masked) == 1408
    hidden = np.ones(1568, bool)
    hidden[visible] = False
    cells = hidden.reshape(8, 7, 2, 7, 2)
    assert np.all(cells == cells[:, :, :1, :, :1])
    np.testing.assert_array_equal(np.flatnonzero(hidden), masked)


def test_scores_of_units_are_means_of_their_tokens():
  rng = np.random.default_rng(0)
  scores = rng.normal(size=(3, 48)).astype(np.float32)
  found = np.asarray(hiera_units.pool(jnp.asarray(scores), (2, 2, 3)))
  tokens = np.asarray(hiera_units.expand_units(jnp.arange(12)[None], (2, 2, 3)))
  wanted = scores[:, tokens[0]].reshape(3, 2, 6, 4).mean(-1)
  np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_what_is_told_of_a_mask():
  scores = jnp.float32([[[1, 1, 1, 1], [4, 0, 0, 0]]])
  mask = sampling.Mask(jnp.int32([[0, 4]]), jnp.int32([[1, 2, 3, 5, 6, 7]]))
  told = hiera_units.describe(scores, mask)
  assert told['attention_kept'] == pytest.approx(5 / 8)
  assert told['entropy'] == pytest.approx(0.5)


def test_chosen_units_follow_planted_attention():
  """One bright unit of tokens at each step is what remains visible."""
  spec, place = hiera_units.Units('', 0.9), (2, 3)
  planted = np.full((1, 8, 14, 14), 1e-4, np.float32)
  planted[:, :, 4:6, 6:8] = 1
  scores = hiera_units.pool(jnp.asarray(planted.reshape(1, -1)), GRID)
  batch = batch_lib.Batch(video=None, index=jnp.int32([7]))
  mask, told = jax.jit(lambda: spec.draw(STEP, batch, GRID, scores))()
  bright = [(t * 7 + place[0]) * 7 + place[1] for t in range(8)]
  assert set(bright) < set(mask.visible[0].tolist())
  assert told['attention_kept'] > 0.99
  assert (told['visible_units'], told['masked_units']) == (40, 352)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(mode='best'), "selection: found 'best', wanted one of"),
    (dict(visible_per_step=49), 'found 49, wanted 1 to 48 of the 49 cells'),
    (dict(visible_per_step=0), 'found 0, wanted 1 to 48'),
  ],
)
def test_bad_masks_are_refused(change, message):
  settings = dict(visible_per_step=5) | change
  with pytest.raises(ValueError, match=message):
    hiera_units.from_attention(keys_of(4), scores_of(), **settings)


def test_a_mask_by_scores_needs_scores():
  with pytest.raises(ValueError, match=r"selection 'top' needs scores"):
    hiera_units.Units('', 0.9, 'top').draw(STEP, BATCH, GRID)
