"""Hiera: sizes, order of tokens, and independence from hidden units."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssl_jax import trees
from vssl_jax.models import hiera, unrolled

KEY = jax.random.key(0)
TINY = dict(channels=8, depths=(1, 1, 2, 1), num_heads=1)
UNITS = jnp.array([[0, 3, 6, 13], [1, 2, 9, 15]], jnp.int32)
GRID = (4, 2, 2)


def small(**overrides):
  return hiera.make(TINY, **{'dtype': 'float32', **overrides})


@pytest.fixture(scope='module')
def video():
  return np.random.default_rng(0).integers(0, 256, (2, 8, 64, 64, 3), np.uint8)


def call(encoder, params, *args, **kwargs):
  """Compiled: much faster than operation by operation."""
  apply = functools.partial(encoder.apply, **kwargs)
  return jax.jit(apply)({'params': params}, *args)


@pytest.fixture(scope='module')
def params(video):
  """Parameters large enough that every path matters."""
  rng = np.random.default_rng(0)

  def one(name, x):
    noise = 0.2 * rng.standard_normal(x.shape).astype(np.float32)
    return 1 + noise if name.endswith('scale') else noise

  found = jax.eval_shape(small().init, KEY, video)['params']
  return trees.map_named(one, found)


# Source: `methods/architectures.md` by way of the paper's table and the
# released code: the trunk without a classifier.
COUNTS = {
  'T': 27_168_672,
  'S': 34_266_528,
  'B': 50_783_424,
  'B+': 69_031_648,
  'L': 212_628_096,
  'H': 670_803_968,
}


def shapes(encoder, clip):
  clip = jax.ShapeDtypeStruct((1, *clip, 3), jnp.uint8)
  return jax.eval_shape(encoder.init, KEY, clip)['params']


@pytest.mark.parametrize('size', COUNTS)
def test_parameter_counts(size):
  encoder = hiera.make(size)
  found = shapes(encoder, (16, 224, 224))
  assert trees.count(found) == COUNTS[size]
  assert (encoder.width, encoder.depth) == (
    8 * encoder.channels,
    sum(encoder.depths),
  )


# With a norm and a classifier of 1,000 classes: 27,910,216 and 51,524,968.
@pytest.mark.parametrize(
  ('size', 'wanted'), [('T', 27_910_216), ('B', 51_524_968)]
)
def test_parameter_counts_of_images(size, wanted):
  encoder = hiera.make(size, **hiera.IMAGE)
  found = trees.count(shapes(encoder, (1, 224, 224)))
  assert found + 2 * encoder.width + 1000 * (encoder.width + 1) == wanted


def test_two_and_three_poolings_have_the_same_parameters():
  two, three = (shapes(small(q_pool=n), (8, 64, 64)) for n in (2, 3))
  assert not trees.difference(two, three)
  assert small(q_pool=2).patch == (2, 16, 16)
  assert small(q_pool=3).patch == (2, 32, 32)


def test_where_a_token_goes():
  """Token (1, 9, 3) of 8 x 56 x 56, the 3,643rd, goes to unit 56, place 52."""
  raster = np.arange(8 * 56 * 56).reshape(1, 8, 56, 56, 1)
  found = np.asarray(unrolled.unroll(jnp.asarray(raster), 3))
  assert found.shape == (1, 392, 64, 1)
  assert found[0, 56, 52, 0] == 3643
  # The released code has units as the faster axis.
  published = found[0, :, :, 0].T.reshape(-1)
  assert published[20440] == 3643


@pytest.mark.parametrize('levels', [1, 2, 3])
def test_order_in_a_unit_by_its_bits(levels):
  side = 2**levels
  raster = np.arange(2 * 3 * side * 2 * side).reshape(1, 2, 3 * side, -1, 1)
  found = np.asarray(unrolled.unroll(jnp.asarray(raster), levels))[0, :, :, 0]
  for (t, y, x), value in np.ndenumerate(raster[0, ..., 0]):
    unit = (t * 3 + y // side) * 2 + x // side
    place = 0
    for k in range(levels):
      place = 4 * place + 2 * (y >> k & 1) + (x >> k & 1)
    assert found[unit, place] == value
  # And back.
  rolled = unrolled.reroll(jnp.asarray(found)[None, :, :, None])
  assert rolled.shape == (1, 12, 1, side, side, 1)
  whole = unrolled.together(rolled, (2, 3, 2))
  np.testing.assert_array_equal(whole, raster)


def test_pooling_is_that_of_neighbours():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 3, 16, 16, 5)).astype(np.float32)
  flat = unrolled.unroll(jnp.asarray(x), 3).reshape(2, 12 * 64, 5)
  found = unrolled.pool(flat, 12).reshape(2, 12, 16, 5)
  found = unrolled.together(unrolled.reroll(found), (3, 2, 2))
  wanted = x.reshape(2, 3, 8, 2, 8, 2, 5).max((3, 5))
  np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(('q_pool', 'last'), [(2, 2), (3, 1)])
def test_shapes_of_stages(video, params, q_pool, last):
  encoder = small(q_pool=q_pool)
  dense = call(encoder, params, video, features=True)
  kept = call(encoder, params, video, UNITS, features=True)
  for i, side in enumerate((8, 4, 2, last)):
    width = 8 * 2**i
    assert dense[i].shape == (2, 4, 2 * side, 2 * side, width)
    assert kept[i].shape == (2, 4, 1, side, side, width)
  tokens = call(encoder, params, video)
  assert tokens.shape == (2, 16 * last**2, encoder.width)
  assert tokens.dtype == jnp.float32
  # The tokens are those of the last stage in raster order, after a norm.
  x = np.asarray(dense[-1], np.float64).reshape(2, -1, encoder.width)
  x -= x.mean(-1, keepdims=True)
  x /= np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
  np.testing.assert_allclose(tokens, x, atol=1e-4)
  raw = call(encoder.clone(final_norm=False), params, video)
  np.testing.assert_allclose(raw, dense[-1].reshape(raw.shape), atol=1e-6)


@pytest.mark.parametrize('q_pool', [2, 3])
def test_all_units_kept_is_the_whole_clip(video, params, q_pool):
  encoder = small(q_pool=q_pool)
  every = jnp.tile(jnp.arange(16, dtype=jnp.int32)[None], (2, 1))
  dense = call(encoder, params, video, features=True)
  kept = call(encoder, params, video, every, features=True)
  for a, b in zip(kept, dense, strict=True):
    together = unrolled.together(jnp.asarray(a), GRID)
    np.testing.assert_allclose(together, b, atol=1e-5)


def shown():
  """Which pixels the units show, [2, 8, 64, 64, 1]."""
  found = np.zeros((2, 16), bool)
  np.put_along_axis(found, np.asarray(UNITS), True, 1)
  found = found.reshape(2, 4, 1, 2, 1, 2, 1)
  found = np.broadcast_to(found, (2, 4, 2, 2, 32, 2, 32))
  return found.reshape(2, 8, 64, 64, 1)


def test_hidden_pixels_change_nothing(video, params):
  other = np.random.default_rng(1).integers(0, 256, video.shape, np.uint8)
  other = np.where(shown(), video, other)
  assert (other != video).any()
  a = call(small(), params, video, UNITS, features=True)
  b = call(small(), params, other, UNITS, features=True)
  for x, y in zip(a, b, strict=True):
    np.testing.assert_array_equal(x, y)
  seen = call(small(), params, np.where(shown(), other + 1, video), UNITS)
  assert jnp.abs(seen - call(small(), params, video, UNITS)).max() > 1e-2


def test_hidden_pixels_have_no_gradient(video, params):
  clip = jnp.asarray(video, jnp.float32) / 255

  def total(clip):
    ends = small().apply({'params': params}, clip, UNITS, features=True)
    return sum(jnp.sum(x**3) for x in ends)

  grad = np.asarray(jax.jit(jax.grad(total))(clip))
  assert not grad[np.broadcast_to(~shown(), grad.shape)].any()
  assert np.abs(grad[np.broadcast_to(shown(), grad.shape)]).min() > 0


def test_units_of_the_first_stages_do_not_meet(video, params):
  """Attention stays within units until the third stage."""
  fewer = UNITS[:, :2]
  many = call(small(), params, video, UNITS, features=True)
  few = call(small(), params, video, fewer, features=True)
  # But for the convolution, which sees pixels of neighbours that are kept;
  # these units have none.
  for i in (0, 1):
    np.testing.assert_allclose(many[i][1, 1], few[i][1, 1], atol=1e-5)
  assert jnp.abs(many[2][1, 1] - few[2][1, 1]).max() > 1e-2
