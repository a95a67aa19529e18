"""Hiera: sizes, order of tokens, and independence from hidden units."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssl_jax import trees
from vssl_jax.models import attention, classifier, framewise
from vssl_jax.models.hiera import encoder as encoder_lib
from vssl_jax.models.hiera import token_order

KEY = jax.random.key(0)
TINY = dict(channels=8, depths=(1, 1, 1, 1), num_heads=1)
UNITS = jnp.array([[0, 3, 6, 13], [1, 2, 9, 15]], jnp.int32)
GRID = (4, 2, 2)


def small(**overrides):
  return encoder_lib.make(TINY, **{'dtype': 'float32', **overrides})


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
# released code: the trunk, and with a norm and a classifier of 400 classes.
COUNTS = {
  'T': (27_168_672, 27_477_808),
  'S': (34_266_528, 34_575_664),
  'B': (50_783_424, 51_092_560),
  'B+': (69_031_648, 69_392_240),
  'L': (212_628_096, 213_091_600),
  'H': (670_803_968, 671_627_664),
}


def shapes(encoder, clip):
  clip = jax.ShapeDtypeStruct((1, *clip, 3), jnp.uint8)
  return jax.eval_shape(encoder.init, KEY, clip)['params']


@pytest.mark.parametrize('size', COUNTS)
def test_parameter_counts(size):
  encoder = encoder_lib.make(size)
  found = shapes(encoder, (16, 224, 224))
  head = jax.eval_shape(
    classifier.Classifier(400).init, KEY, jnp.zeros((1, 1, encoder.width))
  )
  trunk, whole = COUNTS[size]
  assert trees.count(found) == trunk
  assert trees.count(found) + trees.count(head['params']) == whole
  assert (encoder.width, encoder.depth) == (
    8 * encoder.channels,
    sum(encoder.depths),
  )


# With a norm and a classifier of 1,000 classes: 27,910,216 and 51,524,968.
@pytest.mark.parametrize(
  ('size', 'wanted'), [('T', 27_910_216), ('B', 51_524_968)]
)
def test_parameter_counts_of_images(size, wanted):
  encoder = encoder_lib.make(size, **encoder_lib.IMAGE)
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
  found = np.asarray(token_order.unroll(jnp.asarray(raster), 3))
  assert found.shape == (1, 392, 64, 1)
  assert found[0, 56, 52, 0] == 3643
  # The released code has units as the faster axis.
  published = found[0, :, :, 0].T.reshape(-1)
  assert published[20440] == 3643


@pytest.mark.parametrize('levels', [1, 2, 3])
def test_order_in_a_unit_by_its_bits(levels):
  side = 2**levels
  raster = np.arange(2 * 3 * side * 2 * side).reshape(1, 2, 3 * side, -1, 1)
  found = np.asarray(token_order.unroll(jnp.asarray(raster), levels))[
    0, :, :, 0
  ]
  for (t, y, x), value in np.ndenumerate(raster[0, ..., 0]):
    unit = (t * 3 + y // side) * 2 + x // side
    place = 0
    for k in range(levels):
      place = 4 * place + 2 * (y >> k & 1) + (x >> k & 1)
    assert found[unit, place] == value
  # And back.
  rolled = token_order.reroll(jnp.asarray(found)[None, :, :, None])
  assert rolled.shape == (1, 12, 1, side, side, 1)
  whole = token_order.together(rolled, (2, 3, 2))
  np.testing.assert_array_equal(whole, raster)


def test_pooling_is_that_of_neighbours():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((2, 3, 16, 16, 5)).astype(np.float32)
  flat = token_order.unroll(jnp.asarray(x), 3).reshape(2, 12 * 64, 5)
  found = token_order.pool(flat, 12).reshape(2, 12, 16, 5)
  found = token_order.together(token_order.reroll(found), (3, 2, 2))
  wanted = x.reshape(2, 3, 8, 2, 8, 2, 5).max((3, 5))
  np.testing.assert_array_equal(found, wanted)


EVERY = jnp.tile(jnp.arange(16, dtype=jnp.int32)[None], (2, 1))


@pytest.fixture(scope='module')
def two(video, params):
  """What two poolings make of the whole clip and of units.

  Compiled once: what the calls share is computed once too.
  """

  def run(params):
    apply = functools.partial(small().apply, {'params': params}, video)
    return {
      'dense': apply(features=True),
      'kept': apply(UNITS, features=True),
      'every': apply(EVERY, features=True),
      'tokens': apply(),
    }

  return jax.jit(run)(params)


def normed(x):
  x = np.asarray(x, np.float64)
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def check_stages(found, last):
  for i, side in enumerate((8, 4, 2, last)):
    width = 8 * 2**i
    assert found['dense'][i].shape == (2, 4, 2 * side, 2 * side, width)
    assert found['kept'][i].shape == (2, 4, 1, side, side, width)
  # Tokens are those of the last stage in raster order, after a norm.
  wanted = normed(found['dense'][-1]).reshape(found['tokens'].shape)
  np.testing.assert_allclose(found['tokens'], wanted, atol=1e-4)
  assert found['tokens'].dtype == jnp.float32
  # All units kept is the whole clip.
  for a, b in zip(found['every'], found['dense'], strict=True):
    together = token_order.together(jnp.asarray(a), GRID)
    np.testing.assert_allclose(together, b, atol=1e-5)


def test_two_poolings(two):
  check_stages(two, 2)


@pytest.mark.slow
def test_three_poolings(video, params):
  apply = functools.partial(small(q_pool=3).apply, {'params': params}, video)
  found = jax.jit(
    lambda: {
      'dense': apply(features=True),
      'kept': apply(UNITS, features=True),
      'every': apply(EVERY, features=True),
      'tokens': apply(),
    }
  )()
  check_stages(found, 1)


@pytest.mark.slow
def test_tokens_of_units_and_without_a_norm(video, params, two):
  kept = call(small(), params, video, UNITS)
  wanted = normed(two['kept'][-1]).reshape(kept.shape)
  np.testing.assert_allclose(kept, wanted, atol=1e-4)
  raw = call(small(final_norm=False), params, video)
  np.testing.assert_allclose(
    raw, two['dense'][-1].reshape(raw.shape), atol=1e-5
  )


def test_units_of_the_first_stages_do_not_meet(video, params, two):
  """Nor in the first block of the third, which has the second one's windows."""
  few = call(small(), params, video, UNITS[:, :2], features=True)
  # The convolution sees neighbours that are kept, of which these have none.
  for i in range(3):
    np.testing.assert_allclose(two['kept'][i][1, 1], few[i][1, 1], atol=1e-5)
  assert jnp.abs(two['kept'][3][1, 1] - few[3][1, 1]).max() > 1e-2


# 4DS takes int((blocks + 1) * fraction) - 2 of the blocks.
@pytest.mark.slow
@pytest.mark.parametrize(
  ('fraction', 'stage', 'ends'),
  [(0.5, 0, True), (0.7, 1, True), (0.9, 2, False), (1.0, 2, True)],
)
def test_a_tap_gives_the_tokens_of_its_stage(video, fraction, stage, ends):
  encoder = small(depths=(1, 1, 2, 1))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: 0.2 * rng.standard_normal(x.shape).astype(np.float32),
    jax.eval_shape(encoder.init, KEY, video)['params'],
  )
  found = call(encoder, params, video, depth=fraction)
  dense = call(encoder, params, video, features=True)
  wanted = np.asarray(dense[stage]).reshape(2, -1, 8 * 2**stage)
  assert found.shape == wanted.shape
  assert np.allclose(found, wanted, atol=1e-5) == ends


@pytest.mark.parametrize(('q_pool', 'left'), [(2, 64), (3, 16)])
def test_attention_over_all_tokens_is_the_fused_one(monkeypatch, q_pool, left):
  """Once a block; fused kernels take arrays of four axes, and no others."""
  encoder, asked = small(depths=(1, 2, 3, 2), q_pool=q_pool), []
  attend = attention.attend

  def listen(*given):
    asked.append(tuple(x.shape for x in given[:3]))
    return attend(*given)

  monkeypatch.setattr(attention, 'attend', listen)
  shapes(encoder, (8, 64, 64))
  # 16 units of four tokens, which the third pooling leaves one of. The first
  # block of the third stage still attends within units.
  third, first, last = (1, 64, 4, 8), (1, 64, 8, 8), (1, left, 8, 8)
  assert asked == [*[(third,) * 3] * 2, (last, first, first), (last,) * 3]
  assert len(asked) == sum(not step.windowed for step in encoder.plan())


def shown():
  """Which pixels the units show, [2, 8, 64, 64, 1]."""
  found = np.zeros((2, 16), bool)
  np.put_along_axis(found, np.asarray(UNITS), True, 1)
  found = found.reshape(2, 4, 1, 2, 1, 2, 1)
  found = np.broadcast_to(found, (2, 4, 2, 2, 32, 2, 32))
  return found.reshape(2, 8, 64, 64, 1)


@pytest.fixture(scope='module')
def ends_and_gradient(params):
  """Of the pixels, under a sum over all stages."""

  def total(clip):
    ends = small().apply({'params': params}, clip, UNITS, features=True)
    return sum(jnp.sum(x**3) for x in ends), ends

  run = jax.jit(jax.grad(total, has_aux=True))
  return lambda clip: run(jnp.asarray(clip, jnp.float32) / 255)


def test_hidden_pixels_change_nothing(video, ends_and_gradient):
  other = np.random.default_rng(1).integers(0, 256, video.shape, np.uint8)
  _, found = ends_and_gradient(video)
  _, again = ends_and_gradient(np.where(shown(), video, other))
  for x, y in zip(found, again, strict=True):
    np.testing.assert_array_equal(x, y)
  _, again = ends_and_gradient(np.where(shown(), other, video))
  for x, y in zip(found, again, strict=True):
    assert jnp.abs(x - y).max() > 1e-2


def test_hidden_pixels_have_no_gradient(video, ends_and_gradient):
  grad = np.asarray(ends_and_gradient(video)[0])
  assert not grad[np.broadcast_to(~shown(), grad.shape)].any()
  assert np.abs(grad[np.broadcast_to(shown(), grad.shape)]).min() > 0


@pytest.mark.slow
@pytest.mark.parametrize('remat', ['dots', 'full'])
def test_rematerialisation_changes_no_number(video, params, remat):
  def gradients(encoder):
    def total(p):
      return jnp.sum(encoder.apply({'params': p}, video, UNITS) ** 3)

    compiled = jax.jit(jax.grad(total)).lower(params).compile()
    return compiled(params), compiled.cost_analysis()['flops']

  (plain, flops), (again, more) = (
    gradients(small(remat=r)) for r in ('none', remat)
  )
  # Of the largest of all: a key's bias has no gradient but rounding.
  largest = max(np.abs(x).max() for x in jax.tree.leaves(plain))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-5, atol=1e-6 * largest
    ),
    plain,
    again,
  )
  assert more > flops


@pytest.mark.slow
def test_drop_path_leaves_out_branches_per_example(video, params):
  encoder = small(drop_path=0.5)
  many = np.repeat(video[:1], 32, 0)
  units = jnp.tile(UNITS[:1, :1], (32, 1))
  plain = call(encoder, params, many, units, features=True)
  found = call(
    encoder,
    params,
    many,
    units,
    features=True,
    deterministic=False,
    rngs={'dropout': KEY},
  )
  # The rate of the first of four blocks is 0, of the second 1 / 6, of the
  # last 0.5; both branches of a block are drawn.
  changed = np.stack(
    [
      np.abs(np.asarray(a) - np.asarray(b)).max(axis=(1, 2, 3, 4, 5)) > 0.01
      for a, b in zip(found, plain, strict=True)
    ]
  )
  assert not changed[0].any()
  # A branch that stays is larger by 1 / (1 - rate), so all others change.
  assert changed[1:].all()
  both = np.asarray(found[1]) - np.asarray(plain[1])
  # Attention's branch stays or not, and the MLP's.
  assert len(np.unique(both.reshape(32, -1)[:, 0].round(3))) == 4


@pytest.mark.slow
def test_drop_path_rises_linearly_over_the_blocks(video):
  """A branch that stays is larger by 1 / (1 - rate), which tells the rate."""
  encoder = small(depths=(1, 1, 2, 1), drop_path=0.6)
  many = np.repeat(video[:1], 32, 0)
  units = jnp.tile(UNITS[:1, :1], (32, 1))
  rng = np.random.default_rng(0)
  drawn = jax.tree.map(
    lambda x: 0.2 * rng.standard_normal(x.shape).astype(np.float32),
    jax.eval_shape(encoder.init, KEY, video)['params'],
  )

  def only(branch):
    """All branches but one add nothing."""

    def one(name, x):
      ends = ('attn/out/kernel', 'attn/out/bias', 'fc2/kernel', 'fc2/bias')
      return 0 * x if name.endswith(ends) and branch not in name else x

    return trees.map_named(one, drawn)

  @jax.jit
  def run(params):
    apply = functools.partial(
      encoder.apply, {'params': params}, many, units, features=True
    )
    return apply(), apply(deterministic=False, rngs={'dropout': KEY})

  stages = (0, 1, 2, 2, 3)
  without, _ = run(only('none'))
  for block, stage in enumerate(stages):
    for branch in ('attn/out', 'mlp/fc2'):
      plain, found = run(only(f'block_{block:02d}/{branch}'))
      base = np.asarray(without[stage])
      added = (np.asarray(plain[stage]) - base).reshape(32, -1)
      told = (np.asarray(found[stage]) - base).reshape(32, -1)
      share = (told * added).sum(1) / (added**2).sum(1)
      wanted = 1 / (1 - 0.6 * block / 4)
      kept = share > 0.5
      assert 0 < kept.sum() < 32 or not block
      np.testing.assert_allclose(share, np.where(kept, wanted, 0), atol=1e-3)


@pytest.mark.slow
def test_bfloat16_is_close_to_float32(video, params):
  exact = call(small(), params, video, UNITS)
  half = call(small(dtype='bfloat16'), params, video, UNITS)
  assert half.dtype == jnp.float32
  assert 1e-4 < jnp.abs(exact - half).mean() < 0.05


def test_starts():
  """As released: see `layers.kernel_init`."""
  clip = jnp.zeros((1, 2, 32, 32, 3), jnp.uint8)

  def start(init):
    encoder = small(channels=32, init=init)

    def some(key):  # what is not returned is not compiled
      params = encoder.init(key, clip)['params']
      block = params['block_01']
      return {
        'embed': params['embed'],
        'positions_space': params['positions_space'],
        'q': block['attn']['q'],
        'shortcut': block['shortcut'],
        'norm': block['norm_1'],
        'fc1': block['mlp']['fc1'],
      }

    return jax.jit(some)(KEY)

  for init, bias in (('classifier', 0.02), ('mae', 0.0)):
    params = start(init)
    assert (params['norm']['scale'] == 1).all()
    assert 0.8 < jnp.abs(params['embed']['bias']).max() * 21 <= 1  # sqrt(441)
    for name in ('q', 'shortcut', 'norm', 'fc1'):
      assert (params[name]['bias'] == jnp.float32(bias)).all(), name
    assert 0.01 < params['positions_space'].std() < 0.03
    if init == 'classifier':
      for name in ('embed', 'q', 'shortcut', 'fc1'):
        assert 0.019 < params[name]['kernel'].std() < 0.021, name
      continue
    # The second stage makes q, k and v, 3 * 64 channels, of 32 at once.
    fans = {'q': 32 + 3 * 64, 'shortcut': 32 + 64, 'fc1': 64 + 256}
    fans['embed'] = 3 * 7 * 7 * 3 + 32
    for name, fan in fans.items():
      limit = np.sqrt(6 / fan)
      assert 0.95 * limit < params[name]['kernel'].max() <= limit, name


@pytest.mark.slow
def test_an_image_model_on_frames(video):
  image = small(**encoder_lib.IMAGE)
  module = framewise.Framewise(image)
  frames = video[:, ::2].reshape(8, 1, 64, 64, 3)
  shape = jax.eval_shape(image.init, KEY, frames)['params']
  assert shape['positions'].shape == (1, 16, 16, 8)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: 0.2 * rng.standard_normal(x.shape).astype(np.float32), shape
  )
  assert not trees.difference(
    jax.eval_shape(module.init, KEY, video)['params'], shape
  )
  assert (module.patch, module.width) == ((2, 16, 16), 64)
  own = call(image, params, frames, features=True)
  found = call(module, params, video, features=True)
  for a, b in zip(found, own, strict=True):
    assert a.shape[:2] == (2, 4)
    np.testing.assert_allclose(a.reshape(b.shape), b, atol=1e-5)
  # Of every frame units 0 and 3.
  units = np.array([0, 3, 4, 7, 8, 11, 12, 15], np.int32)
  kept = call(module, params, video, jnp.asarray(np.stack([units, units])))
  own = call(image, params, frames, jnp.tile(jnp.array([[0, 3]]), (8, 1)))
  np.testing.assert_allclose(kept.reshape(own.shape), own, atol=1e-5)


def test_what_is_no_hiera_says_so(video):
  with pytest.raises(ValueError, match=r"'XL'.*'B\+'"):
    encoder_lib.make('XL')
  with pytest.raises(ValueError, match="'q_pol'; nearest: 'q_pool'"):
    encoder_lib.make('B', q_pol=3)
  with pytest.raises(ValueError, match='of 4 stages'):
    small(depths=[1, 2, 3])
  with pytest.raises(ValueError, match='q_pool is 4'):
    small(q_pool=4)
  with pytest.raises(ValueError, match=r"'vjepa'.*classifier"):
    small(init='vjepa')
  with pytest.raises(ValueError, match='48, 64'):
    jax.eval_shape(small().init, KEY, video[:, :, :48])
  assert small(depths=[1, 1, 1, 1], mean=[0.5] * 3).mean == (0.5, 0.5, 0.5)
  assert hash(small()) == hash(small())
