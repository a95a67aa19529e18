"""The encoder: sizes, invariants, and independence from hidden pixels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssl_jax import trees
from vssl_jax.models import vit

KEY = jax.random.key(0)
GRID = (2, 3, 3)


def small(**overrides):
  fields = dict(
    width=24, depth=2, num_heads=2, patch=(2, 4, 4), dtype='float32'
  )
  return vit.make({**fields, **overrides})


@pytest.fixture(scope='module')
def video():
  return np.random.default_rng(0).integers(0, 256, (2, 4, 12, 12, 3), np.uint8)


def call(encoder, params, *args, **kwargs):
  """Compiled: much faster than operation by operation."""
  apply = functools.partial(encoder.apply, **kwargs)
  return jax.jit(apply)({'params': params}, *args)


def start(encoder, video):
  """Parameters large enough that every path matters."""
  params = jax.jit(encoder.init)(KEY, video)['params']
  return trees.map_named(
    lambda name, x: (
      0.3 * jax.random.normal(KEY, x.shape)
      if x.ndim > 1
      else x + 0.1 * jax.random.normal(KEY, x.shape)
    ),
    params,
  )


# Source: `methods/architectures.md` by way of the papers' tables; RoPE with
# final norm, q and v biases only, learned positions without final norm.
COUNTS = {
  'Ti': (5_633_856, 5_631_552, 5_934_528),
  'S': (21_884_544, 21_879_936, 22_485_888),
  'M': (38_616_576, 38_610_432, 39_418_368),
  'B': (86_236_416, 86_227_200, 87_439_104),
  'L': (303_885_312, 303_860_736, 305_488_896),
  'H': (631_648_000, 631_607_040, 633_652_480),
  'g': (1_012_173_952, 1_012_117_632, 1_014_378_880),
  'g22': (1_012_173_952, 1_012_117_632, 1_014_378_880),
  'G': (1_843_923_840, 1_843_843_968, 1_846_529_664),
  'e': (3_806_657_792, 3_806_557_440, 3_809_464_064),
}
VARIANTS = (
  {},
  {'positions': 'sinusoid_1d', 'qkv_bias': 'qv'},
  {'positions': 'learned', 'final_norm': False},
)


@pytest.mark.parametrize('size', COUNTS)
def test_parameter_counts(size):
  clip = jax.ShapeDtypeStruct((1, 16, 224, 224, 3), jnp.uint8)

  def count(encoder):
    return trees.count(jax.eval_shape(encoder.init, KEY, clip))

  assert count(vit.make(size)) == COUNTS[size][0]
  for overrides, wanted in zip(VARIANTS, COUNTS[size], strict=True):
    encoder = vit.make(size, **overrides)  # all its blocks are alike
    one, two = (count(encoder.clone(depth=n)) for n in (1, 2))
    assert one + (encoder.depth - 1) * (two - one) == wanted


def test_names_and_types_of_parameters(video):
  params = jax.eval_shape(small(qkv_bias='qv').init, KEY, video)['params']
  names = {n for n, _ in trees.named_leaves(params)}
  block = {'norm_1/scale', 'norm_1/bias', 'norm_2/scale', 'norm_2/bias'}
  block |= {f'attn/{p}/kernel' for p in ('q', 'k', 'v', 'out')}
  block |= {f'attn/{p}/bias' for p in ('q', 'v', 'out')}
  block |= {f'mlp/{p}/{x}' for p in ('fc1', 'fc2') for x in ('kernel', 'bias')}
  wanted = {f'block_{i:02d}/{n}' for i in range(2) for n in block}
  wanted |= {'embed/kernel', 'embed/bias', 'norm/scale', 'norm/bias'}
  assert names == wanted
  half = jax.eval_shape(small(dtype='bfloat16').init, KEY, video)['params']
  assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype('float32')}


def test_modules_are_static_arguments():
  assert hash(small()) == hash(small())
  assert small() == small()
  assert small() != small(depth=4)
  assert small(patch=[2, 4, 4], mean=[0.5, 0.5, 0.5]).patch == (2, 4, 4)


def test_make_names_what_is_wrong():
  with pytest.raises(ValueError, match=r"'XL'.*'Ti'"):
    vit.make('XL')
  with pytest.raises(ValueError, match="'posit'; nearest: 'positions'"):
    vit.make('B', posit='rope_3d')
  with pytest.raises(ValueError, match='qkv_bias'):
    small(qkv_bias='none').block_spec
  assert vit.make('B', init='videomae').init_family == 'videomae'


def test_bytes_and_unit_floats_are_the_same_video(video):
  encoder = small()
  params = start(encoder, video)
  a = call(encoder, params, video)
  b = call(encoder, params, video.astype(np.float32) / 255)
  np.testing.assert_allclose(a, b, atol=1e-5)
  # A constant clip of the mean colour embeds to the bias alone.
  mean = np.broadcast_to(np.float32(encoder.mean), video.shape)
  embedded = call(encoder, params, mean, features=True)[0]
  wanted = jnp.broadcast_to(params['embed']['bias'], embedded.shape)
  np.testing.assert_allclose(embedded, wanted, atol=1e-6)


POSITIONS = (
  'rope_3d', 'sinusoid_1d', 'sincos_3d_vjepa', 'learned', 'none',
)  # fmt: skip


@pytest.mark.parametrize('positions', POSITIONS)
def test_hidden_pixels_have_no_gradient(video, positions):
  encoder = small(positions=positions)
  params = start(encoder, video)
  clip = jnp.asarray(video, jnp.float32) / 255
  visible = jnp.array([[0, 4, 17], [3, 9, 10]], jnp.int32)

  def total(clip):
    return jnp.sum(call(encoder, params, clip, visible) ** 3)

  grad = np.asarray(jax.jit(jax.grad(total))(clip))
  hit = np.abs(grad).reshape(2, 2, 2, 3, 4, 3, 4, 3).sum((2, 4, 6, 7)) > 0
  wanted = np.zeros((2, 18), bool)
  np.put_along_axis(wanted, np.asarray(visible), True, 1)
  np.testing.assert_array_equal(hit.reshape(2, 18), wanted)


@pytest.mark.parametrize('positions', POSITIONS[:4])
def test_order_of_visible_tokens_does_not_matter(video, positions):
  encoder = small(positions=positions)
  params = start(encoder, video)
  visible = jnp.array([[0, 4, 9, 17], [3, 5, 9, 10]], jnp.int32)
  order = jnp.array([2, 0, 3, 1])
  a = call(encoder, params, video, visible)
  b = call(encoder, params, video, visible[:, order])
  np.testing.assert_allclose(a[:, order], b, atol=1e-5)


@pytest.mark.parametrize('positions', POSITIONS[:2])
def test_all_tokens_visible_is_the_full_clip(video, positions):
  encoder = small(positions=positions)
  params = start(encoder, video)
  every = jnp.tile(jnp.arange(18, dtype=jnp.int32)[None], (2, 1))
  a = call(encoder, params, video, every)
  np.testing.assert_allclose(a, call(encoder, params, video), atol=1e-5)


def test_positions_matter(video):
  still = np.broadcast_to(video[:, :1, :1, :1], video.shape)
  for positions in POSITIONS:
    encoder = small(positions=positions)
    params = start(encoder, still)
    tokens = call(encoder, params, still)
    spread = float(jnp.abs(tokens - tokens[:, :1]).max())
    if positions in ('none', 'rope_3d'):  # equal values attend to the same
      assert spread < 1e-5
    else:
      assert spread > 1e-2


def test_features_are_the_tokens_after_each_block(video):
  encoder = small(depth=3)
  params = start(encoder, video)
  features = call(encoder, params, video, features=True)
  assert len(features) == 4
  for k in range(1, 4):
    prefix = encoder.clone(depth=k, final_norm=False)
    kept = {
      n: x
      for n, x in params.items()
      if n == 'embed' or (n.startswith('block') and int(n[-2:]) < k)
    }
    shorter = call(prefix, kept, video)
    np.testing.assert_allclose(features[k], shorter, atol=1e-6)
    assert jnp.abs(features[k] - features[k - 1]).max() > 1e-2
  norm = jax.tree.map(np.asarray, params['norm'])
  last = np.asarray(features[-1], np.float64)
  last -= last.mean(-1, keepdims=True)
  last /= np.sqrt((last**2).mean(-1, keepdims=True) + 1e-6)
  last = last * norm['scale'] + norm['bias']
  np.testing.assert_allclose(call(encoder, params, video), last, atol=1e-4)


@pytest.mark.parametrize(
  ('depth', 'after'),
  [(12, 10), (24, 21), (32, 29), (40, 36), (48, 44), (56, 52)],
)
def test_tap_of_4ds_at_95_percent(depth, after):
  assert vit.tap(depth, 0.95) == after


def test_depth_runs_part_of_the_blocks(video):
  encoder = small(depth=3)
  params = start(encoder, video)
  features = call(encoder, params, video, features=True)
  tapped = call(encoder, params, video, depth=1.0)
  np.testing.assert_array_equal(tapped, features[2])
  del params['block_02'], params['norm']  # not needed, so not read
  np.testing.assert_array_equal(tapped, call(encoder, params, video, depth=1.0))
  with pytest.raises(ValueError, match=r'1\.5'):
    call(encoder, params, video, depth=1.5)


def test_a_key_bias_changes_nothing_without_rotation(video):
  full = small(positions='sinusoid_1d')
  params = start(full, video)
  tokens = call(full, params, video)
  without = jax.tree.map(lambda x: x, params)
  for i in range(2):
    del without[f'block_{i:02d}']['attn']['k']['bias']
  qv = small(positions='sinusoid_1d', qkv_bias='qv')
  np.testing.assert_allclose(tokens, call(qv, without, video), atol=1e-5)
  grad = jax.jit(
    jax.grad(lambda p: jnp.sum(full.apply({'params': p}, video) ** 3))
  )(params)['block_01']['attn']
  assert jnp.abs(grad['k']['bias']).max() < 1e-4
  assert jnp.abs(grad['q']['bias']).max() > 1e-2


@pytest.mark.parametrize('remat', ['dots', 'full'])
def test_rematerialisation_changes_memory_and_no_number(video, remat):
  def gradients(encoder):
    def total(p):
      return jnp.sum(call(encoder, p, video) ** 3)

    compiled = jax.jit(jax.grad(total)).lower(params).compile()
    return compiled(params), compiled.cost_analysis()['flops']

  params = start(small(), video)
  plain, flops = gradients(small())
  again, more = gradients(small(remat=remat))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3),
    plain,
    again,
  )
  assert more > flops * (1.2 if remat == 'full' else 1.0)


def test_bfloat16_is_close_to_float32_and_returns_float32(video):
  params = start(small(), video)
  exact = call(small(), params, video)
  half = call(small(dtype='bfloat16'), params, video)
  assert half.dtype == jnp.float32
  assert 1e-4 < jnp.abs(exact - half).mean() < 0.05


def test_drop_path_leaves_out_branches_per_example(video):
  encoder = small(depth=3, drop_path=0.5)
  video = np.repeat(video[:1], 64, 0)
  params = start(encoder, video)
  features = call(
    encoder,
    params,
    video,
    features=True,
    deterministic=False,
    rngs={'dropout': KEY},
  )
  plain = call(encoder, params, video, features=True)
  # The rate of the first of three blocks is 0, of the last 0.5.
  np.testing.assert_allclose(features[1], plain[1], atol=1e-5)
  untouched = jnp.all(features[3] == features[2], axis=(1, 2)).mean()
  assert 0.1 < untouched < 0.4  # both branches left out: a quarter
  np.testing.assert_array_equal(
    plain[3],
    call(encoder.clone(drop_path=0.0), params, video, features=True)[3],
  )
