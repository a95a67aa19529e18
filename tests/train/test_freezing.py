import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from vssl_jax import trees
from vssl_jax.train import freezing, optimizer

WIDTH, DEPTH = 64, 6


def _params():
  keys = jax.random.split(jax.random.key(0), DEPTH)
  return {
    f'layer_{i}': {'kernel': jax.random.normal(k, (WIDTH, WIDTH)) / 8}
    for i, k in enumerate(keys)
  }


def _loss(trained, frozen, x):
  params = freezing.join(trained, frozen)
  for name in sorted(params):
    x = jnp.tanh(x @ params[name]['kernel'])
  return jnp.mean(jnp.square(x))


def _step(labels, tx):
  def step(params, opt, x):
    trained, frozen = freezing.split(params, labels)
    grads = jax.grad(_loss)(trained, frozen, x)
    norm = optax.tree.norm(grads)
    grads = freezing.join(grads, jax.tree.map(jnp.zeros_like, frozen))
    updates, opt = tx.update(grads, opt, params, step=jnp.zeros((), jnp.int32))
    return optax.apply_updates(params, updates), opt, norm

  return jax.jit(step)


def _tx(labels):
  optim = optimizer.default().copy_and_resolve_references()
  optim.clip = 0.1
  return optimizer.make(
    optim, labels, lambda s: jnp.float32(1e-2), lambda s: jnp.float32(0.5)
  )


def test_patterns_must_match_and_leave_something():
  params = _params()
  with pytest.raises(ValueError, match=r"'layer_9' matches no parameter"):
    freezing.labels(params, ('layer_9',))
  with pytest.raises(ValueError, match='leaves nothing to train'):
    freezing.labels(params, ('layer_',))


def test_each_leaf_is_in_one_part_and_the_parts_make_the_whole():
  """Vectors and matrices alike."""
  params = {
    name: {'kernel': np.full((2, 2), i), 'bias': np.full(2, i)}
    for i, name in enumerate(('a', 'b'))
  }
  labels = freezing.labels(params, ('a',))
  trained, frozen = freezing.split(params, labels)
  nothing = {'kernel': None, 'bias': None}
  assert trained == {'a': nothing, 'b': params['b']}
  assert frozen == {'a': params['a'], 'b': nothing}
  assert freezing.join(trained, frozen) == params


def test_frozen_leaves_keep_every_bit_and_have_no_state():
  params = _params()
  labels = freezing.labels(params, ('layer_0', 'layer_3'))
  tx = _tx(labels)
  step, opt, new = _step(labels, tx), tx.init(params), params
  x = jax.random.normal(jax.random.key(1), (8, WIDTH))
  for _ in range(3):
    new, opt, _ = step(new, opt, x)
  for name, layer in params.items():
    same = np.array_equal(layer['kernel'], new[name]['kernel'])
    assert same == (name in ('layer_0', 'layer_3')), name
  moments = {n.split('/')[-2] for n, x in trees.named_leaves(opt) if x.ndim}
  assert moments == {'layer_1', 'layer_2', 'layer_4', 'layer_5'}


def test_backward_of_a_frozen_prefix_is_not_computed():
  """With the gradient norm and clipping on, as in the real step."""
  params, x = _params(), jnp.ones((256, WIDTH))
  flops = []
  for frozen in ((), ('layer_[0-2]',)):
    labels = freezing.labels(params, frozen)
    tx = _tx(labels)
    compiled = _step(labels, tx).lower(params, tx.init(params), x).compile()
    flops.append(compiled.cost_analysis()['flops'])
  one_product = 2 * 256 * WIDTH * WIDTH
  # dW of the three frozen layers, and dx of the three layers after the first
  # (which never needs one). The rest is tanh.
  saved = (flops[0] - flops[1]) / one_product
  assert 5.9 < saved < 6.5, saved


def test_no_update_is_made_of_weight_decay_or_momentum():
  params = _params()
  labels = freezing.labels(params, ('layer_0',))
  optim = ml_collections.ConfigDict(optimizer.default().to_dict())
  tx = optimizer.make(
    optim, labels, lambda s: jnp.float32(1), lambda s: jnp.float32(1)
  )
  grads = jax.tree.map(jnp.ones_like, params)
  updates, _ = tx.update(grads, tx.init(params), params, step=jnp.int32(0))
  assert not np.any(updates['layer_0']['kernel'])
  assert np.all(updates['layer_1']['kernel'] != 0)
