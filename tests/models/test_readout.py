import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssl_jax import trees
from vssl_jax.models import readout

RNG = np.random.default_rng(0)


def small():
  return readout.Attentive(classes=3, num_heads=2, dtype='float32')


def tokens(*shape):
  return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
  ('width', 'classes', 'wanted'),
  [
    (768, 174, 27_895_470),
    (1024, 174, 49_514_670),
    (768, 400, 28_069_264),
    (1024, 400, 49_746_320),
  ],
)
def test_parameters_are_counted_exactly(width, classes, wanted):
  shapes = jax.eval_shape(
    readout.Attentive(classes).init,
    jax.random.key(0),
    jnp.zeros((1, 2, width)),
    jnp.ones(1),
  )
  assert trees.count(shapes['params']) == wanted


def test_the_query_has_no_output_projection_and_is_scaled_like_the_third():
  x = tokens(1, 4, 64)
  params = small().init(jax.random.key(0), x, jnp.ones(1))['params']
  assert {'q', 'k', 'v'} < set(params)
  assert 'out' not in params
  assert 'out' in params['block_00']['attn']
  for role, fc2 in (
    (1, params['block_00']['mlp']['fc2']),
    (3, params['block_02']['mlp']['fc2']),
    (3, params['mlp']['fc2']),
  ):
    wanted = 0.02 / np.sqrt(2 * role)
    np.testing.assert_allclose(fc2['kernel'].std(), wanted, rtol=0.05)
  np.testing.assert_allclose(params['query'].std(), 0.02, rtol=0.4)


def test_tokens_have_no_order():
  x = tokens(2, 6, 8)
  variables = small().init(jax.random.key(0), x, jnp.ones(2))
  other = small().apply(variables, x[:, ::-1], jnp.ones(2))
  found = small().apply(variables, x, jnp.ones(2))
  np.testing.assert_allclose(found, other, atol=1e-5)


def test_attentive_matches_numpy():
  """The whole readout with no blocks before the query, in plain numpy."""
  x = tokens(2, 5, 8)
  network = readout.Attentive(3, num_heads=2, self_blocks=0, dtype='float32')
  params = network.init(jax.random.key(3), x, jnp.ones(2))['params']
  # Biases and scales away from their start, so that each is seen to act.
  params = jax.tree.map(
    lambda p: p + 0.3 * jnp.asarray(RNG.normal(size=p.shape)), params
  )
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

  def norm(z, q):
    z = z - z.mean(-1, keepdims=True)
    z = z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-5)
    return z * q['scale'] + q['bias']

  dense = lambda z, q: z @ q['kernel'] + q['bias']
  erf = np.vectorize(__import__('math').erf)
  z = norm(np.asarray(x, np.float64), p['norm_1'])
  query = np.broadcast_to(p['query'], (2, 1, 8))
  q, k, v = (
    dense(a, p[n]).reshape(2, -1, 2, 4)
    for n, a in (('q', query), ('k', z), ('v', z))
  )
  score = np.einsum('bqhd,bkhd->bhqk', q, k) / 2
  score = np.exp(score) / np.exp(score).sum(-1, keepdims=True)
  y = query + np.einsum('bhqk,bkhd->bqhd', score, v).reshape(2, 1, 8)
  hidden = dense(norm(y, p['norm_2']), p['mlp']['fc1'])
  hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
  y = y + dense(hidden, p['mlp']['fc2'])
  found = network.apply({'params': params}, x, jnp.ones(2))
  np.testing.assert_allclose(found, dense(y[:, 0], p['head']), atol=1e-4)


def test_identical_segments_leave_the_linear_probe_unchanged():
  x = tokens(4, 3, 6)
  network = readout.Linear(2)
  variables = network.init(jax.random.key(0), x, jnp.ones(4))
  twice = jnp.concatenate([x, x], axis=1)
  np.testing.assert_allclose(
    network.apply(variables, x, jnp.ones(4)),
    network.apply(variables, twice, jnp.ones(4)),
    rtol=1e-5,
  )


def test_batch_norm_leaves_padding_out_and_remembers():
  x = tokens(6, 1, 4) * 3 + 2
  weight = jnp.asarray([1.0, 1, 1, 1, 0, 0])
  network = readout.Linear(4)
  variables = network.init(jax.random.key(0), x, weight)
  variables['params']['head'] = {'kernel': jnp.eye(4), 'bias': jnp.zeros(4)}
  stats = {'stats': variables['stats']}
  found, new = network.apply(variables, x, weight, True, mutable=['stats'])
  real = np.asarray(x[:4, 0])
  wanted = (real - real.mean(0)) / np.sqrt(real.var(0) + 1e-6)
  np.testing.assert_allclose(found[:4], wanted, atol=1e-4)
  # After one batch the running statistics are that batch's.
  tested = network.apply({**variables, **new}, x, weight)
  np.testing.assert_allclose(tested[:4], wanted, atol=1e-4)
  # After many of another the first is forgotten.
  for _ in range(60):
    _, new = network.apply(
      {**variables, **new}, x + 5, weight, True, mutable=['stats']
    )
  tested = network.apply({**variables, **new}, x + 5, weight)
  np.testing.assert_allclose(tested[:4], wanted, atol=0.02)
  assert float(stats['stats']['seen'][0, 0]) == 0
