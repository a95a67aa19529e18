"""Hiera-MAE's decoder: sizes, what it sees, and what it has to predict."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssl_jax import losses, trees
from vssl_jax.masks import hiera_units, sampling, tubelets
from vssl_jax.models.hiera import decoder as decoder_lib
from vssl_jax.models.hiera import encoder as encoder_lib

KEY = jax.random.key(0)
GRID = (4, 2, 2)
MASK = sampling.Mask(
  jnp.array([[0, 3, 6], [1, 2, 15]], jnp.int32),
  jnp.array([[1, 9, 10, 14], [0, 5, 7, 8]], jnp.int32),
)


def small(**overrides):
  fields = dict(out_width=5, width=8, depth=2, num_heads=2, dtype='float32')
  return decoder_lib.Decoder(**{**fields, **overrides})


def random(shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal(shape).astype(np.float32)


@pytest.fixture(scope='module')
def ends():
  sizes = ((8, 4), (4, 8), (2, 16), (2, 32))
  return [random((2, 3, 1, n, n, d), i) for i, (n, d) in enumerate(sizes)]


@pytest.fixture(scope='module')
def params(ends):
  shapes = jax.eval_shape(
    lambda ends: small().init(KEY, ends, MASK, GRID), ends
  )['params']
  return jax.tree.map(lambda x: 0.3 * random(x.shape, x.size), shapes)


def call(params, ends, mask=MASK):
  return jax.jit(
    lambda p, ends, mask: small().apply({'params': p}, ends, mask, GRID)
  )(params, ends, mask)


# Source: `methods/architectures.md` by way of the released code: encoder and
# decoder of clips of 16 x 224 x 224.
@pytest.mark.parametrize(
  ('size', 'wanted'),
  [
    ('T', 55_752_352),
    ('S', 62_850_208),
    ('B', 79_367_104),
    ('B+', 98_320_352),
    ('L', 243_621_760),
    ('H', 710_861_568),
  ],
)
def test_parameter_counts(size, wanted):
  encoder, decoder = encoder_lib.make(size), decoder_lib.Decoder(768)
  # The encoder's are counted in test_hiera.
  trunk = {
    'T': 27_168_672, 'S': 34_266_528, 'B': 50_783_424, 'B+': 69_031_648,
    'L': 212_628_096, 'H': 670_803_968,
  }[size]  # fmt: skip
  ends = [
    jnp.zeros((1, 1, 1, side, side, encoder.channels * 2**i))
    for i, side in enumerate((8, 4, 2, 2))
  ]
  unit = jnp.zeros((1, 1), jnp.int32)
  made = jax.eval_shape(
    lambda: decoder.init(KEY, ends, sampling.Mask(unit, unit), (8, 7, 7))
  )
  assert trunk + trees.count(made) == wanted
  if encoder.width == 768:  # without what brings the stages together
    inside = {
      n: x for n, x in made['params'].items() if not n.startswith('fuse')
    }
    assert trees.count(inside) == 26_811_136


def test_the_sum_of_scales_by_hand(ends, params):
  """Strided convolutions of the first two stages, in numpy, and the last."""
  total = ends[3][:, :, 0].copy()
  for i, side in ((0, 4), (1, 2)):
    kernel = params[f'fuse_{i + 1}']['kernel']
    kernel = kernel.reshape(side, side, ends[i].shape[-1], 32)
    for y in range(2):
      for x in range(2):
        cell = ends[i][
          :, :, 0, side * y : side * (y + 1), side * x : side * (x + 1)
        ]
        total[:, :, y, x] += np.einsum('bkyxc,yxco->bko', cell, kernel)
    total += params[f'fuse_{i + 1}']['bias']
  assert call(params, ends).shape == (2, 16, 5)
  # The third stage is not used; a change of any other is seen.
  for i in range(4):
    other = list(ends)
    other[i] = other[i] + random(other[i].shape, 9)
    change = np.abs(call(params, other) - call(params, ends)).max()
    assert (change == 0) == (i == 2), i
  # What the sum is decides all: as the last stage alone, without the others.
  alone = {
    n: jax.tree.map(np.zeros_like, x) if n in ('fuse_1', 'fuse_2') else x
    for n, x in params.items()
  }
  whole = [*ends[:3], total[:, :, None]]
  np.testing.assert_allclose(
    call(alone, whole), call(params, ends), rtol=1e-4, atol=1e-4
  )


def test_order_of_units_does_not_matter(ends, params):
  found = call(params, ends)
  # Visible units in another order, with their stages.
  order = np.array([2, 0, 1])
  mask = sampling.Mask(MASK.visible[:, order], MASK.masked)
  again = call(params, [x[:, order] for x in ends], mask)
  np.testing.assert_allclose(again, found, atol=1e-5)
  # Masked units in another order give their four tokens in that order.
  order = np.array([3, 1, 0, 2])
  mask = sampling.Mask(MASK.visible, MASK.masked[:, order])
  again = call(params, ends, mask).reshape(2, 4, 4, 5)
  wanted = np.asarray(found).reshape(2, 4, 4, 5)[:, order]
  np.testing.assert_allclose(again, wanted, atol=1e-5)


def test_each_token_knows_where_it_stands(ends, params):
  moved = sampling.Mask(MASK.visible, MASK.masked.at[0, 0].set(4))
  change = np.abs(call(params, ends, moved) - call(params, ends))
  change = change.reshape(2, 4, 4, 5).max((2, 3))
  assert change[0].min() > 1e-4  # others attend to it
  assert change[1].max() == 0
  table = jax.tree.map(np.copy, params)
  spot = np.asarray(hiera_units.expand_units(MASK.masked[:1, :1], GRID))[0]
  t, y, x = np.unravel_index(spot, (4, 4, 4))
  assert list(zip(t, y, x, strict=True)) == [
    (0, 0, 2), (0, 0, 3), (0, 1, 2), (0, 1, 3),
  ]  # fmt: skip
  # Unit 15 is visible in the second clip and nothing in the first.
  table['positions'][3, 3, 3] += random(8)
  change = np.abs(call(table, ends) - call(params, ends)).reshape(2, -1).max(1)
  assert change[0] == 0
  assert change[1] > 1e-4


def test_three_poolings_leave_too_little(ends):
  fewer = [jnp.asarray(x) for x in (*ends[:3], ends[3][:, :, :, :1, :1])]
  with pytest.raises(ValueError, match='q_pool=2'):
    small().init(KEY, fewer, MASK, GRID)


def test_targets_are_first_frames_normed_by_all_values_of_a_patch():
  encoder = encoder_lib.make('T')
  video = np.random.default_rng(0).integers(0, 256, (2, 4, 32, 32, 3), np.uint8)
  found = np.asarray(decoder_lib.targets(video, encoder))
  assert found.shape == (2, 2 * 2 * 2, 768)
  seen = (video / 255.0 - encoder.mean) / encoder.std
  patch = seen[1, 2, 16:, :16]  # the second token in time, lower left
  flat = patch.reshape(-1)
  wanted = (flat - flat.mean()) / np.sqrt(flat.var(ddof=1) + 1e-6)
  np.testing.assert_allclose(found[1, 6], wanted, atol=1e-4)
  other = video.copy()
  other[:, 1::2] = 0  # no second frame of a token is looked at
  np.testing.assert_array_equal(decoder_lib.targets(other, encoder), found)


@pytest.mark.parametrize('kind', ['none', 'patch', 'patch_channel'])
def test_what_is_predicted_comes_back_as_pixels(kind):
  encoder = encoder_lib.make('T')
  video = np.random.default_rng(0).integers(0, 256, (2, 4, 32, 32, 3), np.uint8)
  every, *side = encoder.patch
  clip = tubelets.to_unit(jnp.asarray(video[:, ::every]))
  raw = losses.pixel_targets(clip, (1, *side), kind)
  index = jnp.array([[7, 0, 3], [1, 2, 6]], jnp.int32)
  predicted = sampling.gather(decoder_lib.targets(video, encoder, kind), index)
  found = decoder_lib.as_raw(predicted, index, video, encoder, kind)
  np.testing.assert_allclose(found, sampling.gather(raw, index), atol=2e-5)
