"""Layer-wise decay: the factors, and one step of AdamW in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssl_jax import trees
from vssl_jax.models import classifier, vit
from vssl_jax.train import freezing, optimizer


def params_of(size, **fields):
  """Shapes of an encoder and a head."""
  encoder = vit.make(size, **fields)
  video = jax.ShapeDtypeStruct((1, 2, 32, 32, 3), np.uint8)
  key = jax.random.key(0)
  tokens = jax.ShapeDtypeStruct((1, 4, encoder.width), np.float32)
  return {
    'encoder': jax.eval_shape(encoder.init, key, video)['params'],
    'head': jax.eval_shape(classifier.Classifier(5).init, key, tokens)[
      'params'
    ],
  }


def test_the_factors_of_b():
  found = params_of('B', positions='learned', final_norm=False)
  by_name = dict(trees.named_leaves(optimizer.layer_scales(found, 0.75)))
  wanted = {
    'encoder/embed/kernel': 0.02376,
    'encoder/positions': 0.02376,
    'encoder/block_00/mlp/fc1/kernel': 0.03168,
    'encoder/block_11/norm_1/scale': 0.75,
    'head/norm/scale': 1.0,
    'head/head/kernel': 1.0,
  }
  for name, value in wanted.items():
    np.testing.assert_allclose(by_name[name], value, rtol=2e-4)
  assert len(set(by_name.values())) == 14


def step_of(frozen=(), **fields):
  """Parameters, gradients, updates of a step of two blocks and a head."""
  rng = np.random.default_rng(0)
  shapes = params_of(
    {'width': 8, 'depth': 2, 'num_heads': 2}, patch=(2, 16, 16)
  )
  params, grads = (
    jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), shapes)
    for _ in range(2)
  )
  optim = optimizer.default()
  optim.update(dict(b2=0.999, clip=0.0, layer_decay=0.7) | fields)
  tx = optimizer.make(
    optim,
    freezing.labels(params, frozen),
    lambda step: jnp.float32(0.01),
    lambda step: jnp.float32(0.05),
  )
  updates, _ = tx.update(grads, tx.init(params), params, step=jnp.int32(0))
  return [
    {name: np.asarray(x) for name, x in trees.named_leaves(tree)}
    for tree in (params, grads, updates)
  ]


def test_one_step_is_adamw_with_those_factors():
  p, g, updates = step_of()
  for name, update in updates.items():
    factor = 1.0  # the head, and the norm behind the blocks
    if name.startswith('encoder/embed'):
      factor = 0.7**3
    elif 'block_' in name:
      factor = {'0': 0.7**2, '1': 0.7}[name.split('block_0')[1][0]]
    grad, value = g[name].astype(np.float64), p[name]
    # The first step of Adam: both moments are corrected to the gradient.
    direction = grad / (np.abs(grad) + 1e-8)
    if value.ndim >= 2:
      direction = direction + 0.05 * value
    np.testing.assert_allclose(update, -0.01 * factor * direction, rtol=2e-5)


def test_roles_that_are_clipped_apart_have_the_same_rates():
  *_, joint = step_of()
  *_, apart = step_of(clip_scope='per_role')
  for name, update in joint.items():
    np.testing.assert_array_equal(update, apart[name], err_msg=name)


@pytest.mark.parametrize('scope', ['joint', 'per_role'])
@pytest.mark.parametrize('frozen', ['encoder/block_01', 'encoder'])
def test_frozen_blocks_count_and_stay_where_they_are(frozen, scope):
  *_, whole = step_of()
  *_, found = step_of((frozen,), clip_scope=scope)
  for name, update in found.items():
    wanted = 0 * update if name.startswith(frozen) else whole[name]
    np.testing.assert_array_equal(update, wanted, err_msg=name)


def test_an_encoder_without_blocks_and_a_wrong_decay_are_named():
  with pytest.raises(ValueError, match='no leaves named block_00'):
    optimizer.layer_scales({'encoder': {'kernel': jnp.ones(3)}}, 0.75)
  for decay in (0.0, 1.5):
    with pytest.raises(ValueError, match=rf'layer_decay: found {decay}'):
      optimizer.scale_by_layer(decay)
