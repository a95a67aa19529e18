"""Attention that tokens get, against numpy that writes the blocks out."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from tests.methods import pmd_numpy as reference
from tests.methods import pmd_small as small
from vssl_jax.models import attention, framewise, vit

VIDEO, PATCH, GRID = (4, 8, 12, 3), (2, 4, 4), (2, 2, 3)
SHAPE = dict(width=16, depth=2, num_heads=2, mlp_width=24)
IMAGE = vit.make(
  SHAPE,
  patch=(1, 4, 4),
  positions='sincos_2d',
  class_token=True,
  dtype='float32',
)
CLIP = vit.make(SHAPE, patch=PATCH, positions='sinusoid_1d', dtype='float32')


def test_attention_sums_to_one_and_mixes_as_fused_attention_does():
  """Invariant 10: the mean over queries and heads that see the same values."""
  q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 9, 3, 8)) * 3
  found = attention.received(q[:, :5], k)
  assert found.shape == (2, 9) and np.all(found >= 0)
  np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
  same = jnp.broadcast_to(v[:, :, :1], v.shape)
  fused = attention.attend(q, k, same)[:, :5].mean((1, 2))
  mixed = jnp.einsum('bs,bsd->bd', found, same[:, :, 0])
  np.testing.assert_allclose(mixed, fused, rtol=1e-5, atol=1e-5)


def video():
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (2, *VIDEO), dtype=np.uint8)


@functools.cache
def params_of(module):
  clip = jax.ShapeDtypeStruct((2, *VIDEO), np.uint8)
  if module is IMAGE:
    clip = jax.ShapeDtypeStruct((2, 1, *VIDEO[1:]), np.uint8)
  return small.draw(jax.eval_shape(module.init, small.KEY, clip)['params'])


@functools.cache
def call(module, kind):
  """Returns a compiled call that gives features and scores."""
  return jax.jit(functools.partial(module.apply, attention_to=kind))


def attends(layer, x, heads):
  """Returns [B, heads, N, N], each row summing to 1."""

  def split(name):
    y = reference.linear(layer['attn'][name], y0)
    return y.reshape(*y.shape[:2], heads, -1).swapaxes(1, 2)

  y0 = reference.layer_norm(layer['norm_1'], x)
  q, k = split('q'), split('k')
  logits = q @ k.swapaxes(2, 3) / math.sqrt(q.shape[-1])
  return scipy.special.softmax(logits, -1)


def test_the_class_token_looks_at_patches():
  params = params_of(IMAGE)
  module = framewise.Framewise(IMAGE)
  features, found = call(module, 'cls')({'params': params}, video())
  net = small.double(params)
  frames = video()[:, ::2].reshape(4, 1, *VIDEO[1:])
  x = reference.patches(frames, (1, 4, 4))
  x = reference.linear(net['embed'], x)
  x = x + reference.image_table((1, 2, 3), 16)
  first = np.broadcast_to(net['class_token'], (4, 1, 16))
  stream = reference.blocks(net, np.concatenate([first, x], 1), 2)
  for one, want in zip(features, stream, strict=True):
    patches = want[:, 1:].reshape(2, 12, 16)
    np.testing.assert_allclose(one, patches, rtol=1e-3, atol=1e-3)
  rows = attends(net['block_01'], stream[1], 2)
  np.testing.assert_allclose(rows.sum(-1), 1)
  wanted = rows[:, :, 0].mean(1)  # class token first
  assert found.shape == (2, 12) and np.all(found >= 0)
  np.testing.assert_allclose(
    found, wanted[:, 1:].reshape(2, 12), rtol=1e-4, atol=1e-6
  )
  _, columns = call(module, 'column_mean')({'params': params}, video())
  wanted = rows[:, :, 1:, 1:].mean((1, 2)).reshape(2, 12)
  np.testing.assert_allclose(columns, wanted, rtol=1e-4, atol=1e-6)


def test_patches_look_at_patches():
  params = params_of(CLIP)
  _, found = call(CLIP, 'column_mean')({'params': params}, video())
  net, table = small.double(params), reference.video_table(GRID, 16)
  stream = reference.stream(net, video(), PATCH, 2, table)
  wanted = attends(net['block_01'], stream[1], 2).mean((1, 2))
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)


def test_frames_look_at_themselves():
  """Invariant 8: frame 2j decides on step j, the frames between on nothing."""
  run, params = call(framewise.Framewise(IMAGE), 'cls'), params_of(IMAGE)
  _, then = run({'params': params}, video())
  for frame in range(4):
    other = video()
    other[:, frame] ^= 255
    _, now = run({'params': params}, other)
    changed = np.any((now != then).reshape(2, 2, 6), axis=(0, 2))
    wanted = (np.arange(2) == frame // 2) & (frame % 2 == 0)
    np.testing.assert_array_equal(changed, wanted)


@pytest.mark.parametrize(
  ('kind', 'message'),
  [
    ('cls', "found 'cls', wanted one of .*without a class token"),
    ('rows', "found 'rows', wanted one of"),
  ],
)
def test_scores_that_do_not_exist_are_refused(kind, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(
      functools.partial(CLIP.apply, attention_to=kind),
      {'params': params_of(CLIP)},
      video(),
    )
