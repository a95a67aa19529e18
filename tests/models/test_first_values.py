"""First values that official codes leave to torch, by size and spread."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssl_jax.masks import sampling
from vssl_jax.models import decoder, vit

KEY = jax.random.key(0)


def _uniform(values, bound):
  """Checks U(-bound, bound): no value outside, and its standard deviation."""
  values = np.asarray(values)
  assert np.abs(values).max() <= bound
  assert np.abs(values).max() > 0.95 * bound
  np.testing.assert_allclose(values.std(), bound / np.sqrt(3), rtol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize('family', ['videomae', 'mae', 'vjepa', '4ds'])
def test_bias_of_patch_embeddings(family):
  """A convolution of VideoMAE, MVD and MAE: 1 / sqrt(2 * 8 * 8 * 3)."""
  network = vit.make(
    {'width': 512, 'depth': 1, 'num_heads': 1}, mlp_width=8, patch=(2, 8, 8),
    init=family,
  )  # fmt: skip
  clip = np.zeros((1, 2, 8, 8, 3), np.uint8)
  bias = jax.jit(network.init)(KEY, clip)['params']['embed']['bias']
  if family in ('videomae', 'mae'):
    _uniform(bias, 384**-0.5)
  else:
    assert not np.any(bias)


@pytest.mark.parametrize(
  ('fields', 'bound'),
  [
    # VideoMAE: `encoder_to_decoder` keeps torch's start of a linear layer.
    ({}, 256**-0.5),
    # MVD: Glorot, as all its linear layers.
    (decoder.MVD, (6 / (256 + 128)) ** 0.5),
  ],
)
def test_projection_into_the_decoder(fields, bound):
  network = decoder.VideoMaeDecoder(
    8, width=128, depth=1, num_heads=1, mlp_width=8, **fields
  )
  index = jnp.arange(2, dtype=jnp.int32)[None]
  mask = sampling.Mask(index, index + 2)
  tokens = jnp.zeros((1, 2, 256))
  params = jax.jit(lambda: network.init(KEY, tokens, mask, (1, 2, 2)))()
  _uniform(params['params']['embed']['kernel'], bound)
