"""Image models as their authors released them: names, tables, what is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vssl_jax
from tests.weights import pth
from vssl_jax import trees, weights
from vssl_jax.models import framewise, positions, vit
from vssl_jax.weights import read

KEY = jax.random.key(0)
VIDEO = (4, 12, 12, 3)
IMAGE = vit.make(
  {'width': 24, 'depth': 2, 'num_heads': 2}, mlp_width=96, patch=(1, 4, 4),
  init='mae', positions='learned', class_token=True, dtype='float32',
)  # fmt: skip
MAE = IMAGE.clone(positions='sincos_2d')


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
      'mlp.fc1': block['mlp']['fc1'],
      'mlp.fc2': block['mlp']['fc2'],
    }
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


def test_keys_too_many_and_too_few_are_errors(tmp_path):
  tensors, file = as_released(start(IMAGE)), tmp_path / 'x.pth'
  extra = {'register_tokens': np.zeros((1, 4, 24), np.float32)}
  pth.save(file, fakes(tensors | extra))
  with pytest.raises(read.WeightsError, match=r'no use for.*register_tokens'):
    weights.load_published(file, num_heads=2)
  lost = {k: x for k, x in tensors.items() if k != 'blocks.1.attn.qkv.bias'}
  pth.save(file, fakes(lost))
  with pytest.raises(read.WeightsError, match=r'blocks\.1\.attn\.qkv\.bias'):
    weights.load_published(file, num_heads=2)
  pth.save(file, fakes(tensors | {'pos_embed': tensors['pos_embed'][:, 1:]}))
  with pytest.raises(read.WeightsError, match=r'x\.pth: pos_embed.*square'):
    weights.load_published(file, num_heads=2)
  pth.save(file, fakes(tensors))
  with pytest.raises(read.WeightsError, match=r"no head; wanted.*'encoder'"):
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
  with pytest.raises(read.WeightsError, match='encoder of single frames'):
    weights.export(module, params, tmp_path, layout='videomae')
  with pytest.raises(read.WeightsError, match='class_token=True'):
    weights.export(
      image.clone(positions='sinusoid_1d', qkv_bias='qv', layer_scale=False),
      params,
      tmp_path,
      layout='videomae',
    )
