"""Image models as their authors released them: names, tables, what is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vssl_jax
from tests.weights import pth
from vssl_jax import flops, trees, weights
from vssl_jax.models import framewise, positions, resizing, vit
from vssl_jax.weights.readers import tensors as tensors_lib

KEY = jax.random.key(0)
VIDEO = (4, 12, 12, 3)
IMAGE = vit.make(
  {'width': 24, 'depth': 2, 'num_heads': 2}, mlp_width=96, patch=(1, 4, 4),
  init='mae', positions='learned', class_token=True, dtype='float32',
  resize='bicubic_offset',
)  # fmt: skip
MAE = IMAGE.clone(positions='sincos_2d', resize='trilinear')


def start(image):
  shapes = jax.eval_shape(image.init, KEY, np.zeros((1, 1, 12, 12, 3)))
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: rng.standard_normal(x.shape).astype(np.float32),
    shapes['params'],
  )


def as_released(params):
  """Our parameters by the names of MAE's and DINO's own code."""
  found = {
    'cls_token': params['class_token'][None],
    'patch_embed.proj.weight': params['embed']['kernel']
    .reshape(4, 4, 3, 24)
    .transpose(3, 2, 0, 1),
    'patch_embed.proj.bias': params['embed']['bias'],
    'norm.weight': params['norm']['scale'],
    'norm.bias': params['norm']['bias'],
  }
  if 'registers' in params:
    found['register_tokens'] = params['registers'][None]
  if 'positions' in params:
    grid = params['positions'].reshape(-1, 24)
    table = np.concatenate([params['class_position'], grid])
  else:
    grid = positions.sincos_2d((1, 3, 3), 24)
    table = np.concatenate([np.zeros((1, 24), np.float32), grid])
  found['pos_embed'] = table[None]
  for i in range(2):
    block = params[f'block_{i:02d}']
    parts = [block['attn'][n] for n in 'qkv']
    layers = {
      'attn.qkv': {
        'kernel': np.concatenate([p['kernel'] for p in parts], axis=1),
        'bias': np.concatenate([p['bias'] for p in parts]),
      },
      'attn.proj': block['attn']['out'],
    }
    mlp = block['mlp']
    if 'gate' in mlp:  # one layer for both
      layers['mlp.w12'] = {
        leaf: np.concatenate([mlp['gate'][leaf], mlp['fc1'][leaf]], axis=-1)
        for leaf in ('kernel', 'bias')
      }
      layers['mlp.w3'] = mlp['fc2']
    else:
      layers |= {'mlp.fc1': mlp['fc1'], 'mlp.fc2': mlp['fc2']}
    for name, layer in layers.items():
      found[f'blocks.{i}.{name}.weight'] = layer['kernel'].T
      found[f'blocks.{i}.{name}.bias'] = layer['bias']
    for n in (1, 2):
      found[f'blocks.{i}.norm{n}.weight'] = block[f'norm_{n}']['scale']
      found[f'blocks.{i}.norm{n}.bias'] = block[f'norm_{n}']['bias']
      if f'gain_{n}' in block:
        found[f'blocks.{i}.ls{n}.gamma'] = block[f'gain_{n}']
  return found


def fakes(tensors, prefix=''):
  return {
    prefix + k: pth.FakeTensor(np.ascontiguousarray(x))
    for k, x in tensors.items()
  }


def same(found, wanted):
  assert not trees.difference(found, wanted)
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


DECODER = {
  'mask_token': np.zeros((1, 1, 8), np.float32),
  'decoder_embed.weight': np.zeros((8, 24), np.float32),
  'decoder_pos_embed': np.zeros((1, 10, 8), np.float32),
  'decoder_blocks.0.norm1.weight': np.zeros(8, np.float32),
}


@pytest.mark.parametrize('extra', [{}, DECODER], ids=['encoder', 'whole'])
def test_mae_as_released(tmp_path, extra):
  params, file = start(MAE), tmp_path / 'mae_vit_base.pth'
  tensors = as_released(params) | extra
  pth.save(file, {'model': fakes(tensors), 'epoch': 1})
  module, again, report = weights.load_published(
    file, num_heads=2, dtype='float32'
  )
  assert module == framewise.Framewise(MAE)
  same(again, params)
  assert report.layout == 'MAE or DINO (original)'
  # Its table is a formula, checked and computed again.
  assert set(report.unused) == {'pos_embed', *extra}
  assert set(report.loaded) | set(report.unused) == set(tensors)
  other = weights.load_published(file, num_heads=2, every=4)[0]
  assert (other.every, other.image.dtype) == (4, 'bfloat16')


@pytest.mark.parametrize(
  'wrap',
  [
    fakes,
    lambda x: {
      'student': fakes({k: 0 * v for k, v in x.items()}, 'module.backbone.'),
      'teacher': fakes(x, 'backbone.')
      | fakes({'head.mlp.0.weight': np.zeros((3, 3), np.float32)}),
      'epoch': 7,
    },
  ],
  ids=['backbone', 'training'],
)
def test_dino_as_released(tmp_path, wrap):
  params, file = start(IMAGE), tmp_path / 'dino.pth'
  pth.save(file, wrap(as_released(params)))
  module, again, report = weights.load_published(
    file, num_heads=2, dtype='float32'
  )
  assert module == framewise.Framewise(IMAGE)
  same(again, params)  # of the average, not of the student
  assert not any('pos_embed' in key for key in report.unused)
  # The first row is the class token's, the others are the grid in raster order.
  stored = as_released(params)['pos_embed']
  np.testing.assert_array_equal(again['class_position'][0], stored[0, 0])
  np.testing.assert_array_equal(again['positions'][0, 2, 1], stored[0, 8])


def test_dinov2_as_released(tmp_path):
  image = IMAGE.clone(layer_scale=True)
  params, file = start(image), tmp_path / 'dinov2.pth'
  mask_token = {'mask_token': np.zeros((1, 24), np.float32)}
  pth.save(file, fakes(as_released(params) | mask_token))
  module, again, report = weights.load_published(
    file, num_heads=2, dtype='float32'
  )
  assert module == framewise.Framewise(image)
  same(again, params)
  assert report.unused == ('mask_token',)


def in_chunks(tensors):
  """Names while DINOv2 trains with block_chunks=2: blocks.<chunk>.<block>."""
  return {
    k.replace(f'blocks.{i}.', f'blocks.{i // 2}.{i}.'): x
    for k, x in tensors.items()
    for i in [int(k.split('.')[1]) if k.startswith('blocks.') else 0]
  }


@pytest.mark.parametrize('chunks', [False, True])
@pytest.mark.parametrize(
  ('fields', 'resize'),
  [
    (dict(registers=4), 'bicubic_antialias'),
    (dict(mlp='swiglu', mlp_width=40), 'bicubic_offset'),
    (dict(registers=2, mlp='swiglu'), 'bicubic_antialias'),
  ],
)
def test_dinov2_with_registers_and_swiglu(tmp_path, fields, resize, chunks):
  """As reg4 files, ViT-g, and states of training are released."""
  image = IMAGE.clone(layer_scale=True, resize=resize, **fields)
  params, file = start(image), tmp_path / 'dinov2_reg4.pth'
  tensors = as_released(params) | {'mask_token': np.zeros((1, 24), np.float32)}
  state = fakes(in_chunks(tensors), 'backbone.') if chunks else fakes(tensors)
  if chunks:
    assert 'backbone.blocks.0.1.norm1.weight' in state
  pth.save(file, {'teacher': state} if chunks else state)
  module, again, report = weights.load_published(
    file, num_heads=2, dtype='float32'
  )
  assert module == framewise.Framewise(image)
  same(again, params)
  assert [k.removeprefix('backbone.') for k in report.unused] == ['mask_token']
  # Taken elsewhere and back, and onto another grid.
  weights.export(module, params, tmp_path / 'out', video=VIDEO)
  module, again, _ = weights.load_published(
    tmp_path / 'out', grid=(2, 2, 4), dtype='float32'
  )
  assert module == framewise.Framewise(image)
  np.testing.assert_array_equal(
    again['positions'], resizing.resize(params['positions'], (1, 2, 4), resize)
  )


def test_registers_and_swiglu_by_hand():
  """A block of both, beside NumPy."""
  image = IMAGE.clone(
    depth=1, registers=3, mlp='swiglu', mlp_width=20, layer_scale=True
  )
  params = start(image)
  video = np.random.default_rng(1).random((1, 1, 12, 12, 3), np.float32)
  found = jax.jit(lambda p: image.apply({'params': p}, video, features=True))(
    params
  )
  cells = (video - np.array(image.mean)) / np.array(image.std)
  cells = cells.reshape(3, 4, 3, 4, 3).transpose(0, 2, 1, 3, 4).reshape(9, 48)
  x = cells @ params['embed']['kernel'] + params['embed']['bias']
  x = x + params['positions'].reshape(9, 24)
  first = params['class_token'] + params['class_position']
  x = np.concatenate([first, params['registers'], x])

  def linear(layer, x):
    return x @ layer['kernel'] + layer['bias']

  def norm(layer, x):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * layer['scale'] + layer['bias']

  block = params['block_00']
  y = norm(block['norm_1'], x)
  q, k, v = (
    linear(block['attn'][n], y).reshape(13, 2, 12).transpose(1, 0, 2)
    for n in 'qkv'
  )
  scores = q @ k.transpose(0, 2, 1) / np.sqrt(12)
  scores = np.exp(scores - scores.max(-1, keepdims=True))
  y = (scores / scores.sum(-1, keepdims=True)) @ v
  y = linear(block['attn']['out'], y.transpose(1, 0, 2).reshape(13, 24))
  x = x + block['gain_1'] * y
  y = norm(block['norm_2'], x)
  gate = linear(block['mlp']['gate'], y)
  y = linear(block['mlp']['fc1'], y) * gate / (1 + np.exp(-gate))
  x = x + block['gain_2'] * linear(block['mlp']['fc2'], y)
  scale = np.abs(x).max()
  np.testing.assert_allclose(found[1][0], x[4:], atol=1e-5 * scale)


def test_registers_want_a_class_token():
  image = IMAGE.clone(registers=1, class_token=False)
  with pytest.raises(ValueError, match='registers is 1 and class_token is Fal'):
    start(image)


def test_flops_of_registers_and_swiglu():
  """Three products in the MLP, and attention over all tokens."""
  plain = IMAGE.clone(depth=1)
  grid, n, d = (1, 3, 3), 1 + 9, 24
  more = IMAGE.clone(depth=1, registers=4, mlp='swiglu')
  blocks = [
    2 * (m * (4 * d * d + k * d * 96) + 2 * m * m * d)
    for m, k in ((n, 2), (n + 4, 3))
  ]
  assert flops.forward(more, grid) - flops.forward(plain, grid) == (
    blocks[1] - blocks[0]
  )


def test_keys_too_many_and_too_few_are_errors(tmp_path):
  tensors, file = as_released(start(IMAGE)), tmp_path / 'x.pth'
  extra = {'other_tokens': np.zeros((1, 4, 24), np.float32)}
  pth.save(file, fakes(tensors | extra))
  with pytest.raises(
    tensors_lib.WeightsError, match=r'no use for.*other_tokens'
  ):
    weights.load_published(file, num_heads=2)
  lost = {k: x for k, x in tensors.items() if k != 'blocks.1.attn.qkv.bias'}
  pth.save(file, fakes(lost))
  with pytest.raises(
    tensors_lib.WeightsError, match=r'blocks\.1\.attn\.qkv\.bias'
  ):
    weights.load_published(file, num_heads=2)
  pth.save(file, fakes(tensors | {'pos_embed': tensors['pos_embed'][:, 1:]}))
  with pytest.raises(
    tensors_lib.WeightsError, match=r'x\.pth: pos_embed.*square'
  ):
    weights.load_published(file, num_heads=2)
  pth.save(file, fakes(tensors))
  with pytest.raises(
    tensors_lib.WeightsError, match=r"no head; wanted.*'encoder'"
  ):
    weights.load_published(file, part='head')


def test_loaded_in_one_line(tmp_path, monkeypatch):
  """An encoder of clips: seven lines of use, as a teacher or by itself."""
  from vssl_jax.weights import modules

  monkeypatch.setitem(modules.HEADS['image'], 24, 2)
  params = start(IMAGE)
  pth.save(tmp_path / 'dino.pth', fakes(as_released(params)))
  encoder = vssl_jax.load(str(tmp_path / 'dino.pth'))
  assert encoder.video == (16, 12, 12, 3)
  assert (encoder.grid, encoder.width) == ((8, 3, 3), 24)
  rng = np.random.default_rng(0)
  video = rng.integers(0, 256, (1, *VIDEO), np.uint8)
  tokens = encoder(video)
  assert tokens.shape == (1, 18, 24)
  assert bool(jnp.isfinite(tokens).all())
  # One table for all frames is resized, whatever the number of frames.
  larger = encoder.at((8, 16, 20, 3))
  assert larger.params['positions'].shape == (1, 4, 5, 24)
  assert larger.shapes((1, 8, 16, 20, 3)).shape == (1, 80, 24)
  assert encoder.at((32, 12, 12, 3)) is encoder


def test_tables_are_resized_for_another_grid(tmp_path):
  params, file = start(IMAGE), tmp_path / 'dino.pth'
  pth.save(file, fakes(as_released(params)))
  _, again, report = weights.load_published(file, num_heads=2, grid=(8, 4, 4))
  assert again['positions'].shape == (1, 4, 4, 24)
  assert report.resized == ('positions (1, 3, 3, 24) -> (1, 4, 4, 24)',)
  np.testing.assert_array_equal(
    again['class_position'], params['class_position']
  )


@pytest.mark.parametrize('image', [MAE, IMAGE.clone(layer_scale=True)])
def test_what_is_exported_comes_back(tmp_path, image):
  module, params = framewise.Framewise(image, every=4, cell=3), start(image)
  layout = weights.export(module, params, tmp_path, video=VIDEO)
  assert layout == 'vssl_vit'
  again, found, _ = weights.load_published(tmp_path)
  assert again == module
  same(found, params)
  assert weights.clip_shape(tmp_path) == VIDEO
  with pytest.raises(
    tensors_lib.WeightsError, match='encoder of single frames'
  ):
    weights.export(module, params, tmp_path, layout='videomae')
  with pytest.raises(tensors_lib.WeightsError, match='class_token=True'):
    weights.export(
      image.clone(positions='sinusoid_1d', qkv_bias='qv', layer_scale=False),
      params,
      tmp_path,
      layout='videomae',
    )
