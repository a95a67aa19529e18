"""The readout of 4DS against plain numpy, gradients included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssl_jax import trees
from vssl_jax.models import readout

RNG = np.random.default_rng(0)
GRID = (2, 2, 1)


def tokens(*shape):
  return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def small(**kwargs):
  fields = dict(outputs=3, grid=GRID, frames=4, queries=2, width=8, num_heads=2)
  return readout.CrossAttention(**{**fields, 'dtype': 'float32', **kwargs})


@functools.partial(jax.jit, static_argnums=0)
def first(network, x):
  return network.init(jax.random.key(3), x, jnp.ones(len(x)))['params']


def params_of(network, x):
  """First values, moved so that every bias and scale is seen to act."""
  params = first(network, x)
  return jax.tree.map(
    lambda p: p + 0.3 * jnp.asarray(RNG.normal(size=p.shape), p.dtype), params
  )


@functools.partial(jax.jit, static_argnums=0)
def apply(network, params, x):
  return network.apply({'params': params}, x, jnp.ones(len(x)))


@pytest.mark.parametrize(
  ('classes', 'wanted'), [(174, 11_213_486), (700, 11_752_636)]
)
def test_parameters_of_a_classifier_are_counted_exactly(classes, wanted):
  network = readout.CrossAttention(classes, (8, 14, 14), 16)
  assert count(network) == wanted


def test_parameters_of_the_depth_readout_are_counted_exactly():
  network = readout.Dense((8, 14, 14), (16, 224, 224))
  assert count(network) == 17_587_840
  shapes = shapes_of(network)['params']['readout']
  assert shapes['query'].shape == (6272, 16, 64)
  assert shapes['head']['kernel'].shape == (1024, 128)


def shapes_of(network):
  x = jax.ShapeDtypeStruct((1, 1568, 768), jnp.float32)
  return jax.eval_shape(network.init, jax.random.key(0), x, jnp.ones(1))


def count(network):
  return trees.count(shapes_of(network)['params'])


def cubic(t, frames):
  """Weights [frames, t] of Keys' kernel (a = -1/2), edges renormalised."""
  place = (np.arange(frames) + 0.5) * t / frames - 0.5
  x = np.abs(place[:, None] - np.arange(t))
  near = 1.5 * x**3 - 2.5 * x**2 + 1
  far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
  weights = np.where(x < 1, near, np.where(x < 2, far, 0))
  return weights / weights.sum(1, keepdims=True)


def reference(x, p, frames=4, heads=2):
  """The whole readout in float64."""
  b, _, width = x.shape
  t = GRID[0]
  f = np.einsum('Tt,btnd->bTnd', cubic(t, frames), x.reshape(b, t, -1, width))

  def norm(z, q):
    z = z - z.mean(-1, keepdims=True)
    z = z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-6)
    return z * q['scale'] + q['bias']

  dense = lambda z, q: z @ q['kernel'] + q['bias']
  f = norm(f, p['norm_1']) + p['time'][:, None]
  f = f.reshape(b, -1, width)
  k, v = (dense(f, p[n]).reshape(b, f.shape[1], heads, -1) for n in 'kv')
  score = np.einsum('qhd,bkhd->bhqk', p['query'], k) / np.sqrt(k.shape[-1])
  score = np.exp(score) / np.exp(score).sum(-1, keepdims=True)
  mixed = np.einsum('bhqk,bkhd->bqhd', score, v)
  query = p['query'].reshape(1, len(p['query']), -1)
  y = query + dense(mixed.reshape(b, len(p['query']), -1), p['out'])
  h = dense(norm(y, p['norm_2']), p['fc1'])
  h = h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))) / 2
  return dense(y + dense(h, p['fc2']), p['head'])


def test_it_matches_numpy_and_so_do_its_gradients():
  x = tokens(2, 4, 6)
  network = small()
  params = params_of(network, x)
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  at = np.asarray(x, np.float64)
  found = apply(network, params, x)
  np.testing.assert_allclose(found, reference(at, p), rtol=2e-4, atol=2e-5)
  # A fixed direction in the outputs, and its slope along each parameter.
  toward = RNG.normal(size=found.shape)
  along = lambda q: jnp.sum(apply(network, q, x) * jnp.asarray(toward))
  gradient = jax.jit(jax.grad(along))(params)
  for path, slope in jax.tree_util.tree_leaves_with_path(gradient):
    leaf = p
    for key in path:
      leaf = leaf[key.key]
    aside = RNG.normal(size=leaf.shape)
    leaf += 1e-5 * aside
    high = (reference(at, p) * toward).sum()
    leaf -= 2e-5 * aside
    low = (reference(at, p) * toward).sum()
    leaf += 1e-5 * aside
    wanted = (high - low) / 2e-5
    got = (np.asarray(slope, np.float64) * aside).sum()
    np.testing.assert_allclose(got, wanted, rtol=2e-3, atol=2e-4, err_msg=path)


def test_a_single_query_answers_without_an_axis_for_it():
  x = tokens(2, 4, 6)
  network = small(queries=1)
  params = params_of(network, x)
  found = apply(network, params, x)
  assert found.shape == (2, 3)
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  wanted = reference(np.asarray(x, np.float64), p)[:, 0]
  np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-5)


def test_it_knows_when_but_not_where():
  x = tokens(1, 4, 6)
  network = small()
  params = params_of(network, x)
  answer = lambda y: apply(network, params, y)
  rows = x.reshape(1, 2, 2, 6)
  moved = rows[:, :, ::-1].reshape(x.shape)
  np.testing.assert_allclose(answer(moved), answer(x), atol=1e-5)
  backward = rows[:, ::-1].reshape(x.shape)
  assert np.abs(answer(backward) - answer(x)).max() > 0.05


def test_time_is_resized_cubically():
  ramp = jnp.broadcast_to(jnp.arange(8.0)[:, None, None], (8, 3, 2))
  found = readout.resize_time(ramp.reshape(1, 24, 2), (8, 3, 1), 16)
  assert found.shape == (1, 16, 3, 2)
  np.testing.assert_allclose(
    found[0, :, 0, 0], cubic(8, 16) @ np.arange(8), atol=1e-5
  )
  # Inside, where all four neighbours exist, a ramp stays one.
  inside = np.asarray(found[0, 3:13, 1, 1])
  np.testing.assert_allclose(inside, np.arange(3, 13) / 2 - 0.25, atol=1e-2)
  np.testing.assert_allclose(found.mean(), ramp.mean(), atol=1e-2)
  same = readout.resize_time(jnp.full((1, 24, 2), 7.0), (8, 3, 1), 16)
  np.testing.assert_allclose(same, 7, rtol=1e-5)
  x = tokens(1, 24, 2)
  as_many = readout.resize_time(x, (8, 3, 1), 8)
  np.testing.assert_array_equal(as_many.reshape(x.shape), x)


def test_tokens_that_are_left_out_are_noticed():
  with pytest.raises(ValueError, match=r'3 tokens where a grid of \(2, 2, 1\)'):
    small().init(jax.random.key(0), tokens(1, 3, 6), jnp.ones(1))
  with pytest.raises(ValueError, match='8 channels and 3 heads'):
    small(num_heads=3).init(jax.random.key(0), tokens(1, 4, 6), jnp.ones(1))


def test_dropout_acts_in_training_alone():
  x = tokens(2, 4, 6)
  network = small(dropout=0.5)
  params = params_of(small(), x)

  def run(key, train=True):
    rngs = {'dropout': jax.random.key(key)}
    return network.apply({'params': params}, x, jnp.ones(2), train, rngs=rngs)

  np.testing.assert_array_equal(run(0, False), run(1, False))
  np.testing.assert_array_equal(run(0), run(0))
  assert np.abs(run(0) - run(1)).max() > 1e-3


def test_each_pixel_belongs_to_one_value_of_one_query():
  """Values that name (query, place in its patch) land where they should."""
  clip, patch = (4, 16, 24), (2, 8, 8)
  network = readout.Dense(
    (2, 2, 3), clip, patch, width=8, num_heads=2, dtype='float32'
  )
  x = tokens(1, 12, 6)
  params = first(network, x)
  head = params['readout']['head']
  head['kernel'] = jnp.zeros_like(head['kernel'])
  head['bias'] = jnp.arange(128.0)
  within = apply(network, params, x)[0]
  assert within.shape == clip
  t, y, px = np.meshgrid(*map(np.arange, clip), indexing='ij')
  wanted = (t % 2) * 64 + (y % 8) * 8 + px % 8
  np.testing.assert_array_equal(within, wanted)
  # Queries, by what a change of one changes.
  p = params_of(network, x)
  before = apply(network, p, x)[0]
  queries = 2 * 2 * 3
  owner = np.full(clip, -1)
  for number in range(queries):
    other = jax.tree.map(lambda a: a, p)
    changed = other['readout']['query'].at[number].add(5.0)
    other['readout']['query'] = changed
    moved = apply(network, other, x)[0] != before
    assert (owner[moved] == -1).all()
    owner[moved] = number
  np.testing.assert_array_equal(owner, t // 2 * 6 + y // 8 * 3 + px // 8)
