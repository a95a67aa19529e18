"""Blocks that decode, blocks in loops, and rotated normed tokens."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssl_jax import trees
from vssl_jax.models import blocks, positions, vit

KEY = jax.random.key(0)
GRID = (2, 3, 3)


def small(**overrides):
  fields = dict(
    width=24, depth=4, num_heads=2, patch=(2, 4, 4), dtype='float32',
    decoder_blocks=1, final_norm=False, positions='rope_post_norm',
  )  # fmt: skip
  return vit.make({**fields, **overrides})


@pytest.fixture(scope='module')
def video():
  return np.random.default_rng(0).integers(0, 256, (2, 4, 12, 12, 3), np.uint8)


def start(encoder, video):
  """Parameters large enough that every path matters."""
  shapes = jax.eval_shape(encoder.init, KEY, video)['params']
  rng = np.random.default_rng(1)
  return trees.map_named(
    lambda name, x: jnp.asarray(
      0.15 * rng.normal(size=x.shape) + name.endswith('scale'), jnp.float32
    ),
    shapes,
  )


def call(encoder, params, *args, **kwargs):
  apply = functools.partial(encoder.apply, **kwargs)
  return jax.jit(apply)({'params': params}, *args)


class Stack(nn.Module):
  """Blocks alone, on tokens that stand where the caller says."""

  spec: blocks.Spec

  @nn.compact
  def __call__(self, x, where):
    rope = positions.rope('rope_post_norm', where, GRID, 24, 2)
    return blocks.run(self.spec, 2, x, rope)[-1]


def test_tokens_and_their_positions_may_change_order_together():
  """Latents are told apart by their values and positions alone."""
  stack = Stack(small().block_spec)
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(1, 18, 24)), jnp.float32)
  where = jnp.arange(18, dtype=jnp.int32)[None]
  params = stack.init(KEY, x, where)
  params = jax.tree.map(lambda p: 5 * p, params)
  apply = jax.jit(stack.apply)
  order = rng.permutation(18)
  y = apply(params, x, where)
  both = apply(params, x[:, order], where[:, order])
  np.testing.assert_allclose(both, y[:, order], atol=1e-5)
  moved = apply(params, x[:, order], where)
  assert np.abs(moved - y[:, order]).max() > 1e-2


def test_latents_see_visible_tokens_and_not_the_other_way_round(video):
  """The encoder's outputs do not depend on latents, the decoder's do."""
  encoder = small()
  params = start(encoder, video)
  visible = jnp.array([[0, 4, 17], [3, 9, 10]], jnp.int32)
  rng = np.random.default_rng(2)
  latents = jnp.asarray(rng.normal(size=(18, 24)), jnp.float32)
  out = call(encoder, params, video, visible, latents=latents)
  assert out.shape == (2, 18, 24) and out.dtype == jnp.float32
  other = np.array(video)
  other[0, :2, :4, :4] ^= 255  # token 0, visible in the first clip only
  moved = call(encoder, params, other, visible, latents=latents)
  changed = np.any(moved != out, axis=-1)
  assert changed[0].all() and not changed[1].any()
  # Latents attend to each other. (A norm would take a constant out again.)
  turned = latents.at[5].multiply(-1)
  bumped = call(encoder, params, video, visible, latents=turned)
  assert np.any(bumped != out, axis=-1).all()
  tokens = call(encoder, params, video, visible)
  assert tokens.shape == (2, 3, 24)
  three = call(encoder, params, video, visible, features=True, upto=3)
  np.testing.assert_array_equal(tokens, three[3])


def test_a_prefix_reads_only_its_own_blocks(video):
  encoder = small()
  params = start(encoder, video)
  every = call(encoder, params, video, features=True)
  assert len(every) == 5  # the blocks that decode too
  first = {n: params[n] for n in ('embed', 'block_00', 'block_01')}
  part = call(encoder, first, video, features=True, upto=2)
  assert len(part) == 3
  for a, b in zip(part, every, strict=False):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  'loops',
  [
    (0, 2, 3),
    pytest.param((0,), marks=pytest.mark.slow),
    pytest.param((1,), marks=pytest.mark.slow),
  ],
)
def test_loops_are_the_same_network(video, loops):
  plain, looped = small(), small(loops=loops)
  a = jax.eval_shape(plain.init, KEY, video)
  b = jax.eval_shape(looped.init, KEY, video)
  assert not trees.difference(a, b)
  params = start(plain, video)
  want = call(plain, params, video, features=True)
  got = call(looped, params, video, features=True)
  assert len(want) == len(got)
  for x, y in zip(want, got, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
  part = call(looped, params, video, upto=2)
  np.testing.assert_allclose(part, want[2], rtol=1e-5, atol=1e-5)


def test_a_deeper_loop_compiles_to_no_more():
  """What loops are for: the program does not grow with the depth."""
  clip = jax.ShapeDtypeStruct((1, 4, 12, 12, 3), jnp.uint8)

  def size(**kwargs):
    encoder = small(decoder_blocks=0, **kwargs)
    params = jax.eval_shape(encoder.init, KEY, clip)
    return jax.jit(encoder.apply).lower(params, clip).as_text().count('dot_')

  assert size(depth=4, loops=(0,)) == size(depth=12, loops=(0,)) < size(depth=4)


def test_what_cannot_run_is_refused(video):
  with pytest.raises(ValueError, match='decoder_blocks is 1 and final_norm is'):
    jax.eval_shape(small(final_norm=True).init, KEY, video)
  with pytest.raises(ValueError, match='is 4, wanted fewer than the 4 blocks'):
    jax.eval_shape(small(decoder_blocks=4).init, KEY, video)
  encoder = small(drop_path=0.1, loops=(0,))
  params = jax.eval_shape(encoder.init, KEY, video)
  jax.eval_shape(encoder.apply, params, video)  # nothing is dropped
  with pytest.raises(ValueError, match=r'drop_path is 0.1 .* loops from \(0,'):
    jax.eval_shape(
      lambda p: encoder.apply(
        p, video, deterministic=False, rngs={'dropout': KEY}
      ),
      params,
    )
