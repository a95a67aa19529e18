"""Image models on frames: which frames, which tokens, which parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssl_jax import trees
from vssl_jax.masks import sampling
from vssl_jax.models import decoder, framewise, positions, vit

KEY = jax.random.key(0)
GRID = (3, 2, 3)  # every second of 6 frames of 8 x 12 pixels
MASK = sampling.Mask(  # 2 of 6 tokens of each frame are seen, 3 are predicted
  jnp.array([[0, 4, 7, 11, 12, 13], [1, 2, 6, 9, 15, 17]], jnp.int32),
  jnp.array(
    [[1, 2, 3, 6, 8, 9, 15, 16, 17], [0, 3, 5, 7, 8, 10, 12, 13, 14]], jnp.int32
  ),
)


def image(**overrides):
  fields = dict(
    width=24, depth=2, num_heads=2, patch=(1, 4, 4), dtype='float32',
    positions='sincos_2d', class_token=True, init='mae',
  )  # fmt: skip
  return vit.make({**fields, **overrides})


@pytest.fixture(scope='module')
def video():
  return np.random.default_rng(0).random((2, 6, 8, 12, 3), np.float32)


def start(module, *args):
  """Parameters large enough that every path matters."""
  params = jax.jit(module.init, static_argnums=3)(KEY, *args)['params']
  return trees.map_named(
    lambda name, x: x + 0.3 * jax.random.normal(KEY, x.shape), params
  )


def call(module, params, *args, **kwargs):
  def apply(params, *args):
    return module.apply({'params': params}, *args, **kwargs)

  return jax.jit(apply)(params, *args)


@pytest.fixture(scope='module')
def params(video):
  return start(image(), video[:, :1])


@pytest.mark.parametrize('positions', ['sincos_2d', 'learned'])
def test_its_parameters_are_those_of_the_image_encoder(video, positions):
  inner = image(positions=positions)
  own = jax.eval_shape(inner.init, KEY, video[:, :1])['params']
  found = jax.eval_shape(framewise.Framewise(inner).init, KEY, video)['params']
  assert not trees.difference(found, own)
  names = {n for n, _ in trees.named_leaves(found)}
  assert {'class_token', 'embed/kernel', 'block_01/attn/q/bias'} <= names


def test_it_encodes_every_second_frame_alone(video, params):
  module = framewise.Framewise(image())
  found = call(module, params, video)
  assert found.shape == (2, 18, 24)
  for t in range(3):
    alone = call(image(), params, video[:, 2 * t : 2 * t + 1])
    np.testing.assert_allclose(found[:, 6 * t : 6 * t + 6], alone, atol=1e-5)


def test_features_of_a_clip_are_those_of_its_frames_in_a_batch(video, params):
  found = call(framewise.Framewise(image()), params, video, features=True)
  frames = video[:, ::2].reshape(6, 1, 8, 12, 3)
  stacked = call(image(), params, frames, features=True)
  assert len(found) == 3
  for a, b in zip(found, stacked, strict=True):
    np.testing.assert_allclose(a, b.reshape(2, 18, 24), atol=1e-5)


@pytest.mark.parametrize('options', [{'upto': 1}, {'depth': 0.5}])
def test_options_reach_the_image_encoder(video, params, options):
  found = call(framewise.Framewise(image()), params, video, **options)
  frames = video[:, ::2].reshape(6, 1, 8, 12, 3)
  wanted = call(image(), params, frames, **options)
  np.testing.assert_allclose(found, wanted.reshape(2, 18, 24), atol=1e-5)


def test_frames_between_are_not_looked_at(video, params):
  module = framewise.Framewise(image())

  def loss(video):
    return jnp.sum(module.apply({'params': params}, video) ** 2)

  grad = np.abs(jax.jit(jax.grad(loss))(video)).max(axis=(0, 2, 3, 4))
  assert (grad[1::2] == 0).all()
  assert (grad[::2] > 0).all()


def test_visible_tokens_are_encoded_frame_by_frame(video, params):
  module = framewise.Framewise(image())
  found = call(module, params, video, MASK.visible)
  assert found.shape == (2, 6, 24)
  for t in range(3):
    alone = call(
      image(),
      params,
      video[:, 2 * t : 2 * t + 1],
      MASK.visible[:, 2 * t : 2 * t + 2] - 6 * t,
    )
    np.testing.assert_allclose(found[:, 2 * t : 2 * t + 2], alone, atol=1e-5)


def test_tokens_that_frames_cannot_share_are_refused(video, params):
  module = framewise.Framewise(image())
  with pytest.raises(ValueError, match='5 tokens for 3 frames'):
    module.apply({'params': params}, video, MASK.visible[:, :5])


def test_it_reads_as_an_encoder():
  module = framewise.Framewise(image(final_norm=False), every=3)
  assert module.patch == (3, 4, 4)
  assert (module.width, module.depth, module.encoder_depth) == (24, 2, 2)
  assert (module.final_norm, module.dtype) == (False, 'float32')
  assert hash(module) == hash(framewise.Framewise(image(final_norm=False), 3))
  other = module.clone(every=1, dtype='bfloat16', drop_path=0.1)
  assert (other.every, other.dtype) == (1, 'bfloat16')
  assert other.image == image(final_norm=False, dtype='bfloat16', drop_path=0.1)


@pytest.mark.parametrize(
  ('patch', 'every', 'cell'),
  [((2, 4, 4), 2, None), ((1, 4, 4), 0, None), ((1, 4, 4), 2, 0)],
)
def test_it_takes_encoders_of_one_frame(video, patch, every, cell):
  module = framewise.Framewise(image(patch=patch), every, cell)
  with pytest.raises(ValueError, match=r'such as patch \(1, 4, 4\)'):
    module.init(KEY, video)


@pytest.mark.parametrize(('cell', 'side'), [(2, 4), (4, 2)])
def test_frames_are_resized_to_the_cells(video, cell, side):
  """8 x 12 pixels become 4 x 6 or 2 x 3 patches of 3 x 3 pixels."""
  module = framewise.Framewise(image(patch=(1, 3, 3)), cell=cell)
  assert module.patch == (2, cell, cell)
  params = start(module, video)
  found = call(module, params, video)
  assert found.shape == (2, 3 * side * side * 3 // 2, 24)
  weights = [resizing(n, 3 * n // cell) for n in (8, 12)]
  smaller = np.einsum('bthwc,yh,xw->btyxc', video[:, ::2], *weights)
  wanted = call(framewise.Framewise(module.image, 1), params, smaller)
  np.testing.assert_allclose(found, wanted, atol=1e-4)
  # Bytes are as good as numbers in [0, 1].
  codes = np.round(255 * video).astype(np.uint8)
  again = call(module, params, codes)
  wanted = call(module, params, codes.astype(np.float32) / 255)
  np.testing.assert_allclose(again, wanted, atol=1e-4)


def resizing(old, new):
  """Triangles as wide as two of the coarser pixels, each row summing to 1."""
  width = max(old / new, 1)
  centres = (np.arange(new) + 0.5) * old / new - 0.5
  gaps = np.abs(centres[:, None] - np.arange(old)[None]) / width
  found = np.maximum(1 - gaps, 0)
  return (found / found.sum(axis=1, keepdims=True)).astype(np.float32)


def test_a_decoder_decodes_each_frame_alone():
  inner = decoder.VideoMaeDecoder(
    10, width=16, depth=2, num_heads=2, dtype='float32'
  )
  module = framewise.FramewiseDecoder(inner)
  z = jax.random.normal(KEY, (2, 6, 24))
  params = start(module, z, MASK, GRID)
  one = sampling.Mask(MASK.visible[:, :2], MASK.masked[:, :3])
  own = jax.eval_shape(lambda: inner.init(KEY, z[:, :2], one, (1, 2, 3)))
  assert not trees.difference(params, own['params'])

  def apply(params, z):
    return module.apply({'params': params}, z, MASK, GRID)

  found = jax.jit(apply)(params, z)
  assert found.shape == (2, 9, 10)
  for t in range(3):
    alone = inner.apply(
      {'params': params},
      z[:, 2 * t : 2 * t + 2],
      sampling.Mask(
        MASK.visible[:, 2 * t : 2 * t + 2] - 6 * t,
        MASK.masked[:, 3 * t : 3 * t + 3] - 6 * t,
      ),
      (1, 2, 3),
    )
    np.testing.assert_allclose(found[:, 3 * t : 3 * t + 3], alone, atol=1e-5)
  assert (module.out_width, module.width, module.depth) == (10, 16, 2)


def test_a_class_token_is_attended_to_and_not_returned(video):
  module = image()
  params = start(module, video[:, :1])
  # No row of its own: with a fixed table its row is zeros.
  assert 'class_position' not in params

  def encode(token):
    return module.apply(
      {'params': {**params, 'class_token': token}}, video[:, :1], features=True
    )

  features = jax.jit(encode)(params['class_token'])
  assert {x.shape for x in features} == {(2, 6, 24)}
  moved = jax.jit(encode)(-params['class_token'])
  np.testing.assert_array_equal(features[0], moved[0])
  assert np.abs(features[1] - moved[1]).max() > 1e-3


def test_a_learned_row_is_added_to_the_class_token(video):
  module = image(positions='learned')
  params = start(module, video[:, :1])
  assert params['class_position'].shape == (1, 24)
  whole = params['class_position'] + params['class_token']
  split = {**params, 'class_token': whole, 'class_position': 0 * whole}
  frame = video[:, :1]
  np.testing.assert_allclose(
    call(module, params, frame), call(module, split, frame), atol=1e-5
  )
  lost = {**params, 'class_position': 0 * whole}
  change = call(module, params, frame) - call(module, lost, frame)
  assert np.abs(change).max() > 1e-3


@pytest.mark.parametrize('kind', positions.ROTATIONS)
def test_a_class_token_and_positions_that_turn_are_refused(video, kind):
  with pytest.raises(ValueError, match='class_token=False'):
    image(positions=kind).init(KEY, video[:, :1])


def test_a_class_token_and_blocks_that_decode_are_refused(video):
  module = image(decoder_blocks=1, final_norm=False)
  with pytest.raises(ValueError, match='no place for it'):
    module.init(KEY, video[:, :1])


def test_gains_scale_the_branches_of_a_block(video):
  module = image(layer_scale=True)
  params = start(module, video[:, :1])
  block = params['block_00']
  assert {'gain_1', 'gain_2'} <= set(block)
  # A gain on a branch is a gain on the layer that ends it.
  merged = jax.tree.map(lambda x: x, params)
  for name in ('block_00', 'block_01'):
    inner = merged[name]
    for gain, layer in (
      ('gain_1', ('attn', 'out')),
      ('gain_2', ('mlp', 'fc2')),
    ):
      scale = inner.pop(gain)
      last = inner[layer[0]][layer[1]]
      last['kernel'] = last['kernel'] * scale.reshape(1, -1)
      last['bias'] = last['bias'] * scale
  frame = video[:, :1]
  np.testing.assert_allclose(
    call(module, params, frame), call(image(), merged, frame), atol=1e-4
  )
  fresh = jax.jit(module.init)(KEY, frame)['params']
  np.testing.assert_array_equal(
    fresh['block_00']['gain_1'], np.full(24, 1e-5, np.float32)
  )
