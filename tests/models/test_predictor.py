"""Predictor and decoder: sizes, token order and what may reach them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssl_jax import trees
from vssl_jax.masks import sampling
from vssl_jax.models import decoder, predictor, vit

KEY = jax.random.key(0)
GRID = (2, 3, 3)
MASK = sampling.Mask(
  jnp.array([[0, 4, 17], [3, 9, 10]], jnp.int32),
  jnp.array([[1, 2, 5, 16], [0, 1, 2, 8]], jnp.int32),
)
FULL = sampling.Mask(
  jnp.zeros((1, 8), jnp.int32), jnp.zeros((1, 16), jnp.int32)
)


def small(kind, **overrides):
  fields = dict(
    out_width=7, width=24, depth=2, num_heads=2, dtype='float32', **overrides
  )
  if kind == 'videomae':
    return decoder.VideoMaeDecoder(**fields)
  return predictor.Predictor(**fields, positions=kind)


KINDS = ('rope_3d', 'sinusoid_1d', 'sincos_3d_vjepa', 'learned', 'videomae')


def call(module, params, z, mask=MASK, token=0):
  apply = jax.jit(lambda p, z, mask: module.apply(p, z, mask, GRID, token))
  return apply({'params': params}, z, mask)


def init(module, z):
  return jax.jit(lambda z: module.init(KEY, z, MASK, GRID))(z)['params']


def start(module, z):
  params = init(module, z)
  return jax.tree.map(
    lambda x: x + 0.3 * jax.random.normal(KEY, x.shape), params
  )


@pytest.mark.parametrize(
  ('width', 'out', 'wanted'),
  [
    (768, 768, 21_886_080),
    (1024, 1024, 22_082_944),
    (1280, 1024, 22_181_248),
    (1408, 1024, 22_230_400),
    (1664, 1024, 22_328_704),
    (1024, 1536, 22_280_064),  # the pixel decoder of SALT
    (768, 1536, 22_181_760),
  ],
)
def test_predictor_counts(width, out, wanted):
  z = jax.ShapeDtypeStruct((1, 8, width), jnp.float32)
  module = predictor.Predictor(out)
  shapes = jax.eval_shape(lambda z: module.init(KEY, z, FULL, (8, 14, 14)), z)
  assert trees.count(shapes) == wanted


@pytest.mark.parametrize(
  ('size', 'wanted'),
  [('S', 24_029_376), ('B', 94_210_944), ('L', 342_996_992)],
)
def test_whole_videomae_counts(size, wanted):
  clip = jax.ShapeDtypeStruct((1, 16, 224, 224, 3), jnp.uint8)
  encoder = vit.make(size, positions='sinusoid_1d', qkv_bias='qv')
  z = jax.ShapeDtypeStruct((1, 8, encoder.width), jnp.float32)
  module = decoder.VideoMaeDecoder(1536, **decoder.SIZES[size])
  total = trees.count(jax.eval_shape(encoder.init, KEY, clip))
  total += trees.count(
    jax.eval_shape(lambda z: module.init(KEY, z, FULL, (8, 14, 14)), z)
  )
  assert total == wanted


@pytest.mark.parametrize('kind', KINDS)
def test_order_of_tokens_does_not_matter(kind):
  module = small(kind)
  z = jax.random.normal(KEY, (2, 3, 16))
  params = start(module, z)
  out = call(module, params, z, MASK)
  seen, hidden = jnp.array([1, 2, 0]), jnp.array([3, 0, 2, 1])
  moved = sampling.Mask(MASK.visible[:, seen], MASK.masked[:, hidden])
  again = call(module, params, z[:, seen], moved)
  np.testing.assert_allclose(out[:, hidden], again, atol=1e-5)
  assert jnp.abs(out - again).max() > 1e-2  # the rows are not all alike


@pytest.mark.parametrize('kind', KINDS)
def test_predictions_depend_on_positions_and_on_visible_tokens(kind):
  module = small(kind)
  z = jax.random.normal(KEY, (2, 3, 16))
  params = start(module, z)
  out = call(module, params, z, MASK)
  assert out.dtype == jnp.float32
  other = MASK._replace(visible=MASK.visible + 1)
  moved = call(module, params, z, other)
  assert jnp.abs(out - moved).max() > 1e-3
  change = jax.grad(lambda z: call(module, params, z, MASK)[0].sum())(z)
  assert (jnp.abs(change[0]).sum(-1) > 0).all()
  assert (change[1] == 0).all()  # examples do not mix


def test_each_mask_type_has_its_token_and_all_start_at_zero():
  module = small('rope_3d')
  z = jax.random.normal(KEY, (2, 3, 16))
  fresh = init(module, z)
  assert fresh['mask_token_0'].shape == fresh['mask_token_1'].shape == (1, 24)
  assert not fresh['mask_token_0'].any()
  assert not fresh['mask_token_1'].any()
  params = start(module, z)
  params['mask_token_1'] = params['mask_token_1'] + 1.0

  def used(token):
    return jax.grad(lambda p: call(module, p, z, MASK, token)[0, 0, 0])(params)

  for token in (0, 1):
    grad = used(token)
    assert grad[f'mask_token_{token}'].any()
    assert not grad[f'mask_token_{1 - token}'].any()
  shared = small('rope_3d', num_mask_tokens=1)
  names = init(shared, z)
  assert 'mask_token_1' not in names
  np.testing.assert_array_equal(
    call(shared, params, z, MASK, 1),
    call(module, params, z, MASK, 0),
  )


def test_videomae_decoder_starts_as_published():
  z = jax.random.normal(KEY, (2, 3, 16))
  params = init(small('videomae'), z)
  assert 'bias' not in params['embed']
  assert 'bias' not in params['block_00']['attn']['k']
  token = jnp.abs(params['mask_token'])
  assert token.min() > 0
  assert token.max() <= 0.02
