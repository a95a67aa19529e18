import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from vssl_jax.masks import sampling

SMALL = (4, 6, 6)


# One compilation is quicker than thirty small ones.
JITTED = jax.jit(
  sampling.multiblock,
  static_argnames=(
    *('grid', 'blocks', 'scale', 'aspect'),
    *('visible', 'masked', 'select', 'size_per'),
  ),
)


def keys_of(batch, seed=0):
  return jax.random.split(jax.random.key(seed), batch)


def blocks(keys, grid=SMALL, size_seed=7, **settings):
  settings = {
    'blocks': 3,
    'scale': 0.3,
    'aspect': (0.75, 1.5),
    'visible': 24,
    'masked': 40,
  } | settings
  return JITTED(keys, jax.random.key(size_seed), grid, **settings)


DRAWS = {
  'random': lambda keys: sampling.random(keys, SMALL, 0.9),
  'frames': lambda keys: sampling.frames(keys, SMALL, 0.75),
  'tube': lambda keys: sampling.tube(keys, SMALL, 0.75),
  'nested_tube': lambda keys: sampling.nested_tube(keys, SMALL, (0.5, 0.9))[1],
  'causal': lambda keys: sampling.causal(keys, SMALL, 0.9),
  'blocks': lambda keys: blocks(keys)[0],
  'blocks_raster': lambda keys: blocks(keys, select='raster_truncate')[0],
  'blocks_example': lambda keys: blocks(keys, size_per='example')[0],
}
PARTITIONS = ('random', 'frames', 'tube', 'nested_tube', 'causal')


@pytest.mark.parametrize(
  ('n', 'ratio', 'rule', 'visible', 'masked'),
  [
    (196, 0.75, 'masked_floor', 49, 147),
    (196, 0.80, 'masked_floor', 40, 156),
    (196, 0.85, 'masked_floor', 30, 166),
    (196, 0.90, 'masked_floor', 20, 176),
    (196, 0.90, 'visible_floor', 19, 177),
    (1568, 0.95, 'visible_floor', 78, 1490),
    (1568, 0.95, 'masked_floor', 79, 1489),
    (392, 0.90, 'visible_floor', 39, 353),
    (392, 0.80, 'visible_floor', 78, 314),
    (392, 0.75, 'visible_floor', 98, 294),
    (49, 0.90, 'masked_floor', 5, 44),
    (49, 0.80, 'masked_floor', 10, 39),
    (49, 0.75, 'masked_floor', 13, 36),
  ],
)
def test_counts_of_both_published_rules(n, ratio, rule, visible, masked):
  assert sampling.counts(n, ratio, rule) == (visible, masked)


@pytest.mark.parametrize(
  ('n', 'ratio'), [(4, 0.9), (10, 0.0), (10, 1.0), (4, 0.1)]
)
def test_counts_refuse_an_empty_side(n, ratio):
  rule = 'visible_floor' if ratio > 0.5 else 'masked_floor'
  with pytest.raises(ValueError, match=f'mask_ratio {ratio}'):
    sampling.counts(n, ratio, rule)


@pytest.mark.parametrize('name', DRAWS)
def test_indices_ascend_and_are_disjoint(name):
  mask = jax.jit(DRAWS[name])(keys_of(16))
  for visible, masked in zip(*map(np.asarray, mask), strict=True):
    assert (np.diff(visible) > 0).all()
    assert (np.diff(masked) > 0).all()
    both = np.concatenate([visible, masked])
    assert len(set(both)) == len(both)
    assert both.min() >= 0
    assert both.max() < math.prod(SMALL)
    if name in PARTITIONS:
      assert len(both) == math.prod(SMALL)
  assert mask.visible.dtype == mask.masked.dtype == jnp.int32


def test_jit_changes_nothing():
  keys, size_key = keys_of(2), jax.random.key(7)
  settings = {'blocks': 2, 'scale': 0.3, 'aspect': (0.75, 1.5)}
  settings |= {'visible': 24, 'masked': 40}
  eager = sampling.multiblock(keys, size_key, SMALL, **settings)
  jitted = blocks(keys, **settings)
  jax.tree.map(np.testing.assert_array_equal, eager, jitted)
  eager = sampling.tube(keys, SMALL, 0.9)
  jitted = jax.jit(lambda k: sampling.tube(k, SMALL, 0.9))(keys)
  jax.tree.map(np.testing.assert_array_equal, eager, jitted)


@pytest.mark.parametrize('name', DRAWS)
def test_single_rows_and_order_change_nothing(name):
  keys, jitted = keys_of(6), jax.jit(DRAWS[name])
  whole = jitted(keys)
  rows = [jitted(keys[i : i + 1]) for i in range(6)]
  for other in (
    jax.tree.map(lambda *x: jnp.concatenate(x), *rows),
    jax.tree.map(lambda x: x[::-1], jitted(keys[::-1])),
  ):
    jax.tree.map(np.testing.assert_array_equal, whole, other)


@pytest.mark.parametrize('name', [n for n in DRAWS if n != 'causal'])
def test_keys_decide(name):
  mask = jax.jit(DRAWS[name])(keys_of(8))
  # Two examples may draw the same blocks, and then the same raster heads.
  wanted = 4 if name == 'blocks_raster' else 8
  assert len({row.tobytes() for row in np.asarray(mask.masked)}) >= wanted


@pytest.mark.parametrize('name', ['random', 'frames', 'tube', 'blocks'])
def test_devices_change_nothing(name):
  keys = keys_of(8)
  wanted = jax.jit(DRAWS[name])(keys)
  mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:4]), ('data',))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  draw = jax.jit(DRAWS[name], in_shardings=rows, out_shardings=rows)
  found = draw(jax.device_put(keys, rows))
  assert len(found.visible.sharding.device_set) == 4
  jax.tree.map(np.testing.assert_array_equal, wanted, found)


def test_tube_repeats_its_positions():
  grid = (8, 14, 14)
  mask = sampling.tube(keys_of(3), grid, 0.9)
  assert mask.visible.shape == (3, 160)
  assert mask.masked.shape == (3, 1408)
  steps = np.asarray(mask.visible).reshape(3, 8, 20)
  np.testing.assert_array_equal(steps // 196, np.arange(8)[:, None] + 0 * steps)
  np.testing.assert_array_equal(steps % 196, steps[:, :1] + 0 * steps)


def test_tubes_nest():
  ratios = (0.5, 0.75, 0.9)
  masks = sampling.nested_tube(keys_of(4), SMALL, ratios)
  for easy, hard in itertools.pairwise(masks):
    for row in range(4):
      assert set(np.asarray(hard.visible[row])) < set(
        np.asarray(easy.visible[row])
      )
      assert set(np.asarray(easy.masked[row])) < set(
        np.asarray(hard.masked[row])
      )
  single = sampling.tube(keys_of(4), SMALL, 0.5)
  jax.tree.map(np.testing.assert_array_equal, masks[0], single)
  with pytest.raises(ValueError, match='ascending'):
    sampling.nested_tube(keys_of(1), SMALL, (0.9, 0.5))


def test_frames_are_split_evenly_and_apart():
  visible = np.asarray(sampling.frames(keys_of(40), (8, 14, 14), 0.75).visible)
  visible = visible.reshape(40, 8, 49)
  assert (visible // 196 == np.arange(8)[None, :, None]).all()
  seen = np.zeros((40, 8, 196), bool)
  np.put_along_axis(seen, visible % 196, True, 2)
  # Of 49 positions a quarter is expected to be seen in the next frame too.
  both = (seen[:, 1:] & seen[:, :-1]).sum(axis=2)
  assert 11.5 < both.mean() < 13
  assert both.max() < 30


def test_causal_shows_the_start():
  mask = sampling.causal(keys_of(2), (2, 3, 5), 0.75)
  np.testing.assert_array_equal(mask.visible, [np.arange(7)] * 2)
  np.testing.assert_array_equal(mask.masked, [np.arange(7, 30)] * 2)


def test_subset_stays_in_its_set():
  indices = sampling.random(keys_of(5), SMALL, 0.8).masked
  found = sampling.subset(keys_of(5, seed=3), indices, 20)
  for row, source in zip(np.asarray(found), np.asarray(indices), strict=True):
    assert (np.diff(row) > 0).all()
    assert set(row) < set(source)
  whole = sampling.subset(keys_of(5), indices, indices.shape[1])
  np.testing.assert_array_equal(whole, indices)
  with pytest.raises(ValueError, match='wanted 1 to'):
    sampling.subset(keys_of(5), indices, indices.shape[1] + 1)


@pytest.mark.parametrize('kind', ['random', 'frames', 'tube', 'subset'])
def test_every_position_is_as_likely(kind):
  draws = 50_000
  keys = keys_of(draws, seed=5)
  grid = (2, 3, 4)
  if kind == 'random':
    n, k = 24, 18
    chosen = sampling.random(keys, grid, 0.75).masked
  elif kind == 'frames':
    n, k = 12, 9
    chosen = sampling.frames(keys, grid, 0.75).masked[:, 9:] - 12
  elif kind == 'tube':
    n, k = 12, 9
    chosen = sampling.tube(keys, grid, 0.75).masked[:, :9]
  else:
    n, k = 24, 5
    whole = jnp.broadcast_to(jnp.arange(24)[None], (draws, 24))
    chosen = sampling.subset(keys, whole, 5)
  seen = np.bincount(np.asarray(chosen).ravel(), minlength=n)
  p = k / n
  # Exactly k per draw: the counts lie in a hyperplane, n - 1 are free.
  variance = draws * p * (1 - p) * n / (n - 1)
  statistic = ((seen - draws * p) ** 2).sum() / variance
  low, high = scipy.stats.chi2.ppf((1e-4, 1 - 1e-4), n - 1)
  assert low < statistic < high


def hand_frame(monkeypatch, rows):
  """Puts the blocks where `rows`, a picture in text, has a #."""
  JITTED.clear_cache()
  frame = jnp.asarray([[c == '#' for c in row] for row in rows])
  monkeypatch.setattr(sampling, 'rectangle_union', lambda *_: frame)
  return np.flatnonzero(np.tile(np.asarray(frame).ravel(), 2))


SQUARE = ('....', '.##.', '.##.', '....')


def test_raster_truncation_is_the_published_list(monkeypatch):
  inside = hand_frame(monkeypatch, SQUARE)
  np.testing.assert_array_equal(inside, [5, 6, 9, 10, 21, 22, 25, 26])
  outside = np.setdiff1d(np.arange(32), inside)
  common = {'grid': (2, 4, 4), 'select': 'raster_truncate'}
  mask, metrics = blocks(keys_of(2), visible=24, masked=8, **common)
  np.testing.assert_array_equal(mask.visible, [outside] * 2)
  np.testing.assert_array_equal(mask.masked, [inside] * 2)
  assert metrics['repaired_visible'] == metrics['repaired_masked'] == 0
  mask, _ = blocks(keys_of(2), visible=5, masked=3, **common)
  np.testing.assert_array_equal(mask.visible, [[0, 1, 2, 3, 4]] * 2)
  np.testing.assert_array_equal(mask.masked, [[5, 6, 9]] * 2)


@pytest.mark.parametrize('select', ['random_k', 'raster_truncate'])
def test_tokens_lie_on_their_side_of_the_blocks(monkeypatch, select):
  inside = hand_frame(monkeypatch, SQUARE)
  mask, metrics = blocks(
    keys_of(64), (2, 4, 4), visible=20, masked=6, select=select
  )
  assert np.isin(mask.masked, inside).all()
  assert not np.isin(mask.visible, inside).any()
  assert metrics['repaired_visible'] == metrics['repaired_masked'] == 0
  if select == 'random_k':
    np.testing.assert_array_equal(np.unique(mask.masked), inside)


@pytest.mark.parametrize('select', ['random_k', 'raster_truncate'])
def test_a_gap_is_filled_from_the_other_side(monkeypatch, select):
  inside = hand_frame(monkeypatch, SQUARE)
  outside = np.setdiff1d(np.arange(32), inside)
  mask, metrics = blocks(
    keys_of(32), (2, 4, 4), visible=28, masked=4, select=select
  )
  assert metrics['repaired_visible'] == 1
  assert metrics['repaired_masked'] == 0
  for visible, masked in zip(*map(np.asarray, mask), strict=True):
    assert set(outside) < set(visible)
    # The four block tokens that are still hidden.
    assert set(masked) == set(inside) - set(visible)
  mask, metrics = blocks(
    keys_of(32), (2, 4, 4), visible=10, masked=15, select=select
  )
  assert metrics['repaired_visible'] == 0
  assert metrics['repaired_masked'] == 1
  for visible, masked in zip(*map(np.asarray, mask), strict=True):
    assert set(visible) < set(outside)
    assert set(inside) < set(masked)


def test_one_block_is_one_rectangle_for_the_whole_clip():
  mask, metrics = blocks(
    keys_of(32),
    (3, 8, 8),
    blocks=1,
    scale=0.25,
    aspect=(1.0, 1.0),
    visible=144,
    masked=48,
  )
  assert metrics['repaired_visible'] == metrics['repaired_masked'] == 0
  t, y, x = np.unravel_index(np.asarray(mask.masked), (3, 8, 8))
  assert (np.ptp(y, 1) == 3).all()
  assert (np.ptp(x, 1) == 3).all()
  assert (np.ptp(t, 1) == 2).all()


def sides(mask):
  """Returns the (height, width) of each example's only block."""
  _, y, x = np.unravel_index(np.asarray(mask.masked), (2, 14, 14))
  return set(zip(np.ptp(y, 1) + 1, np.ptp(x, 1) + 1, strict=True))


def test_aspect_is_drawn_per_step_or_per_example():
  # 20 tokens a step: the smallest block of this scale, 4 x 5, fits.
  settings = {'grid': (2, 14, 14), 'blocks': 1, 'scale': 0.15}
  settings |= {'visible': 8, 'masked': 50}
  steps = [
    sides(blocks(keys_of(16), size_seed=s, **settings)[0]) for s in range(8)
  ]
  assert all(len(step) == 1 for step in steps)
  assert len(set.union(*steps)) > 1
  assert set.union(*steps) <= {(5, 6), (5, 5), (6, 5), (7, 4), (6, 4)}
  assert len(sides(blocks(keys_of(64), size_per='example', **settings)[0])) > 1


@pytest.mark.parametrize(
  ('settings', 'visible', 'masked'),
  [
    (
      {'blocks': 8, 'scale': 0.15, 'visible': 320, 'masked': 656},
      (0.002, 0.018),
      (0.0005, 0.009),
    ),
    (
      {'blocks': 2, 'scale': 0.7, 'visible': 80, 'masked': 1096},
      (0.025, 0.055),
      (0.03, 0.06),
    ),
  ],
)
def test_repairs_are_as_rare_as_measured(settings, visible, masked):
  _, metrics = blocks(
    keys_of(4_000), (8, 14, 14), size_per='example', **settings
  )
  assert visible[0] < metrics['repaired_visible'] < visible[1]
  assert masked[0] < metrics['repaired_masked'] < masked[1]


@pytest.mark.parametrize(
  'wrong',
  [
    {'visible': 100, 'masked': 100},
    {'visible': 0},
    {'masked': 0},
  ],
)
def test_impossible_block_counts_are_refused(wrong):
  with pytest.raises(ValueError, match='at most 144 together'):
    blocks(keys_of(1), **wrong)


def test_gather_takes_tokens_by_index():
  x = np.arange(2 * 5 * 3, dtype=np.float32).reshape(2, 5, 3)
  index = np.asarray([[0, 4], [1, 2]], np.int32)
  found = sampling.gather(jnp.asarray(x), jnp.asarray(index))
  np.testing.assert_array_equal(found, [x[0, [0, 4]], x[1, [1, 2]]])
  flat = sampling.gather(jnp.asarray(x[..., 0]), jnp.asarray(index))
  np.testing.assert_array_equal(flat, [[0, 12], [18, 21]])
