"""Published weights of Hiera: what the authors' files hold, and what not."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.weights import pth
from vssl_jax import encoder as encoder_lib
from vssl_jax import trees, weights
from vssl_jax.masks import sampling
from vssl_jax.models import framewise
from vssl_jax.models.hiera import decoder, token_order
from vssl_jax.models.hiera import encoder as hiera_encoder
from vssl_jax.utils import colours
from vssl_jax.weights import hiera_files
from vssl_jax.weights.readers import tensors as tensors_lib

DEPTHS = (1, 1, 2, 1)
WIDTHS = (8, 16, 32, 64)
CLIP = (8, 64, 64, 3)


def block(name, width, out):
  found = {f'{name}.norm1.weight': (width,), f'{name}.norm1.bias': (width,)}
  linear = {
    'attn.qkv': (3 * out, width),
    'attn.proj': (out, out),
    'mlp.fc1': (4 * out, out),
    'mlp.fc2': (out, 4 * out),
  }
  if width != out:
    linear['proj'] = (out, width)
  for layer, shape in linear.items():
    found[f'{name}.{layer}.weight'] = shape
    found[f'{name}.{layer}.bias'] = shape[:1]
  return found | {f'{name}.norm2.{x}': (out,) for x in ('weight', 'bias')}


def published(kind='mae', image=False):
  """Random tensors under the names of the authors' files."""
  time = () if image else (3,)
  found = {
    'patch_embed.proj.weight': (8, 3, *time, 7, 7),
    'patch_embed.proj.bias': (8,),
  }
  if image:
    found['pos_embed'] = (1, 256, 8)
  else:
    found |= {'pos_embed_spatial': (1, 256, 8)}
    found |= {'pos_embed_temporal': (1, 4, 8)}
  widths = [w for w, n in zip(WIDTHS, DEPTHS, strict=True) for _ in range(n)]
  for i, width in enumerate(widths):
    found |= block(f'blocks.{i}', widths[max(i - 1, 0)], width)
  if kind == 'classifier':
    found |= {'norm.weight': (64,), 'norm.bias': (64,)}
    found |= {'head.projection.weight': (5, 64), 'head.projection.bias': (5,)}
  else:
    one = () if image else (1,)
    steps, values = (1, 768) if image else (4, 768)
    found |= {
      'encoder_norm.weight': (64,),
      'encoder_norm.bias': (64,),
      'multi_scale_fusion_heads.0.weight': (64, 8, *one, 4, 4),
      'multi_scale_fusion_heads.0.bias': (64,),
      'multi_scale_fusion_heads.1.weight': (64, 16, *one, 2, 2),
      'multi_scale_fusion_heads.1.bias': (64,),
      'decoder_embed.weight': (24, 64),
      'decoder_embed.bias': (24,),
      'mask_token': (1, 1, 24),
      'decoder_pos_embed': (1, 16 * steps, 24),
      'decoder_norm.weight': (24,),
      'decoder_norm.bias': (24,),
      'decoder_pred.weight': (values, 24),
      'decoder_pred.bias': (values,),
    }
    for i in range(2):
      found |= block(f'decoder_blocks.{i}', 24, 24)
  rng = np.random.default_rng(0)
  return {
    n: rng.standard_normal(shape).astype(np.float32)
    for n, shape in found.items()
  }


# All that the authors' class is made with, as they write it beside weights.
CONFIG = dict(
  input_size=[64, 64], in_chans=3, embed_dim=8, num_heads=1, num_classes=5,
  stages=[*DEPTHS], q_pool=3, q_stride=[2, 2], mask_unit_size=[8, 8],
  mask_unit_attn=[True, True, False, False], dim_mul=2.0, head_mul=2.0,
  patch_kernel=[7, 7], patch_stride=[4, 4], patch_padding=[3, 3],
  mlp_ratio=4.0, drop_path_rate=0.0, norm_layer='LayerNorm', head_dropout=0.0,
  head_init_scale=0.001, sep_pos_embed=False,
)  # fmt: skip
OF_CLIPS = dict(
  input_size=[8, 64, 64], q_stride=[1, 2, 2], mask_unit_size=[1, 8, 8],
  patch_kernel=[3, 7, 7], patch_stride=[2, 4, 4], patch_padding=[1, 3, 3],
  sep_pos_embed=True,
)  # fmt: skip


def save(path, tensors):
  fake = {n: pth.FakeTensor(x) for n, x in tensors.items()}
  pth.save(path, {'model_state': fake, 'epoch': 3})
  return path


@pytest.fixture(scope='module')
def mae():
  return published()


@pytest.fixture
def file(mae, tmp_path):
  return save(tmp_path / 'mae_hiera_tiny_16x224.pth', mae)


def test_every_number_has_its_place(mae, file):
  module, params, report = weights.load_published(file, num_heads=1)
  assert isinstance(module, hiera_encoder.Hiera)
  assert (module.channels, module.depths, module.q_pool) == (8, DEPTHS, 2)
  assert (module.kernel, module.stride) == ((3, 7, 7), (2, 4, 4))
  assert (module.mean, module.std) == ((0.45,) * 3, (0.225,) * 3)
  trunk = {n for n in mae if n.startswith(('blocks.', 'patch_', 'pos_'))}
  assert set(report.loaded) == trunk
  assert set(report.unused) == set(mae) - trunk
  assert not report.missing
  kernel = mae['patch_embed.proj.weight']  # [out, in, t, y, x]
  assert params['embed']['kernel'][1, 2, 6, 0, 5] == kernel[5, 0, 1, 2, 6]
  space, time = mae['pos_embed_spatial'], mae['pos_embed_temporal']
  np.testing.assert_array_equal(
    params['positions_space'][0, 3, 5], space[0, 3 * 16 + 5]
  )
  np.testing.assert_array_equal(params['positions_time'][2, 0, 0], time[0, 2])
  first = params['block_01']  # of the second stage: [8] -> [16]
  qkv = mae['blocks.1.attn.qkv.weight']
  for i, name in enumerate('qkv'):
    found = first['attn'][name]['kernel']
    np.testing.assert_array_equal(found, qkv[16 * i : 16 * (i + 1)].T)
  np.testing.assert_array_equal(
    first['shortcut']['kernel'], mae['blocks.1.proj.weight'].T
  )
  assert 'shortcut' not in params['block_03']  # within the third stage


def test_the_decoder_beside_it(mae, file):
  with pytest.raises(
    ValueError, match='num_heads: found 16'
  ):  # of the released
    weights.load_published(file, part='head')
  module, params, report = weights.load_published(
    file, part='head', num_heads=8
  )
  assert isinstance(module, decoder.Decoder)
  assert (module.width, module.depth, module.num_heads) == (24, 2, 8)
  assert module.out_width == 768
  rest = {n for n in mae if n.startswith(('blocks.', 'patch_', 'pos_'))}
  assert set(report.unused) == rest
  assert set(report.loaded) == set(mae) - rest
  table = mae['decoder_pos_embed'].reshape(4, 4, 4, 24)
  np.testing.assert_array_equal(params['positions'], table)
  # A convolution of stride 4 is a product with its pixels in raster order.
  x = np.random.default_rng(1).standard_normal((1, 1, 1, 8, 8, 8))
  x = x.astype(np.float32)
  kernel = mae['multi_scale_fusion_heads.0.weight']
  wanted = np.einsum(
    'yixjc,ocij->yxo', x[0, 0, 0].reshape(2, 4, 2, 4, 8), kernel[:, :, 0]
  )
  found = (
    token_order.cells(jnp.asarray(x), 2) @ params['fuse_1']['kernel'][None]
  )
  np.testing.assert_allclose(
    found.reshape(2, 2, 64), wanted, rtol=1e-4, atol=1e-4
  )
  ends = [
    jnp.zeros((1, 2, 1, side, side, width))
    for side, width in zip((8, 4, 2, 2), WIDTHS, strict=True)
  ]
  mask = sampling.Mask(
    jnp.array([[0, 5]], jnp.int32), jnp.array([[1, 2, 7]], jnp.int32)
  )
  made = jax.eval_shape(
    lambda p: module.apply({'params': p}, ends, mask, (4, 2, 2)), params
  )
  assert made.shape == (1, 12, 768)


def test_a_classifier(tmp_path):
  tensors = published('classifier')
  file = save(tmp_path / 'hiera.pth', tensors)
  module, _, report = weights.load_published(file, num_heads=1)
  assert module.q_pool == 3
  unused = {n for n in tensors if n.startswith(('norm.', 'head.'))}
  assert set(report.unused) == unused
  again, _, _ = weights.load_published(file, num_heads=1, q_pool=2)
  assert again.patch == (2, 16, 16)
  with pytest.raises(weights.WeightsError, match='no tensor'):
    weights.load_published(file, part='head')


@pytest.mark.parametrize('kind', ['mae', 'classifier'])
def test_models_of_images(tmp_path, kind):
  tensors = published(kind, image=True)
  file = save(tmp_path / 'image.pth', tensors)
  module, params, report = weights.load_published(file, num_heads=1)
  assert isinstance(module, framewise.Framewise)
  assert module.image.kernel == (1, 7, 7)
  assert module.image.mean == colours.IMAGENET_MEAN
  assert module.image.std == colours.IMAGENET_STD
  assert module.patch == ((2, 16, 16) if kind == 'mae' else (2, 32, 32))
  table = tensors['pos_embed'].reshape(1, 16, 16, 8)
  np.testing.assert_array_equal(params['positions'], table)
  kernel = tensors['patch_embed.proj.weight']
  assert params['embed']['kernel'][0, 2, 6, 0, 5] == kernel[5, 0, 2, 6]
  assert set(report.loaded) | set(report.unused) == set(tensors)
  if kind == 'mae':
    head, params, _ = weights.load_published(file, part='head', num_heads=2)
    assert params['positions'].shape == (1, 4, 4, 24)
    assert params['fuse_2']['kernel'].shape == (4 * 16, 64)
    assert head.out_width == 768


# As the file is; which only the config can tell; and of another model.
@pytest.mark.parametrize('size', [[64, 64], [32, 128], [224, 224]])
@pytest.mark.parametrize(
  ('kind', 'image'), [('classifier', True), ('mae', True), ('mae', False)]
)
def test_a_folder_with_the_authors_config(tmp_path, kind, image, size):
  tensors = published(kind, image)
  config = CONFIG if image else CONFIG | OF_CLIPS
  config = config | dict(q_pool=3 if kind == 'classifier' else 2)
  config['input_size'] = [*config['input_size'][:-2], *size]
  (tmp_path / 'config.json').write_text(json.dumps(config))
  tensors_lib.write_safetensors(tmp_path / 'model.safetensors', tensors)
  h, w = (16, 16) if size == [224, 224] else (n // 4 for n in size)
  module, params, _ = weights.load_published(tmp_path)
  assert getattr(module, 'image', module).q_pool == config['q_pool']
  ours, theirs = 'positions_space', 'pos_embed_spatial'
  if image:
    ours, theirs = 'positions', 'pos_embed'
  np.testing.assert_array_equal(
    params[ours], tensors[theirs].reshape(1, h, w, 8)
  )
  frames = 16 if image else 8
  assert weights.clip_shape(tmp_path) == (frames, 4 * h, 4 * w, 3)
  if kind == 'mae':
    _, params, _ = weights.load_published(tmp_path, part='head', num_heads=2)
    table = tensors['decoder_pos_embed'].reshape(-1, h // 4, w // 4, 24)
    np.testing.assert_array_equal(params['positions'], table)


def test_positions_of_another_clip(tmp_path, mae, file):
  _, params, report = weights.load_published(
    file, num_heads=1, grid=(2, 24, 24)
  )
  assert params['positions_space'].shape == (1, 24, 24, 8)
  assert params['positions_time'].shape == (2, 1, 1, 8)
  assert [r.split()[0] for r in report.resized] == [
    'positions_space', 'positions_time',
  ]  # fmt: skip
  # Two of four steps: the means of the first two and of the last two.
  wanted = mae['pos_embed_temporal'].reshape(2, 2, 8).mean(1)
  np.testing.assert_allclose(params['positions_time'][:, 0, 0], wanted, 1e-5)


def test_an_encoder_for_other_clips(file, caplog):
  module, params, _ = weights.load_published(file, num_heads=1, dtype='float32')
  encoder = encoder_lib.Encoder(module, params, 'hiera', CLIP)
  assert (encoder.width, encoder.grid) == (64, (4, 4, 4))
  assert encoder.at(CLIP) is encoder
  with caplog.at_level('INFO'):
    other = encoder.at((4, 96, 96, 3))
  assert 'positions_space' in caplog.text
  assert 'positions_time' in caplog.text
  video = np.zeros((1, 4, 96, 96, 3), np.uint8)
  assert other(video).shape == (1, 2 * 6 * 6, 64)
  with pytest.raises(ValueError, match=r'grid of \(4, 16, 16\).*\(2, 24, 24\)'):
    encoder(video)


def test_what_we_write_we_read(file, tmp_path):
  module, params, _ = weights.load_published(file, num_heads=1, q_pool=3)
  folder = tmp_path / 'ours'
  assert weights.export(module, params, folder, video=CLIP) == 'vssl_vit'
  again, found, report = weights.load_published(folder)
  assert again == module
  assert weights.describe(folder) == module
  assert not report.unused
  jax.tree.map(np.testing.assert_array_equal, found, params)
  assert weights.clip_shape(folder) == CLIP
  with pytest.raises(weights.WeightsError, match='stages'):
    weights.export(module, params, folder, layout='videomae')


@pytest.mark.parametrize('q_pool', [2, 3])
def test_what_we_write_for_the_authors_code(file, mae, tmp_path, q_pool):
  pixels = dict(mean=(0.3, 0.4, 0.5), std=(0.2, 0.25, 0.3))
  module, params, _ = weights.load_published(
    file, num_heads=1, q_pool=q_pool, **pixels
  )
  folder = tmp_path / 'theirs'
  assert weights.export(module, params, folder, video=CLIP, layout='hiera')
  written = tensors_lib.safetensors(folder / 'model.safetensors')
  others = ('decoder', 'mask_token', 'encoder_norm', 'multi_scale')
  assert set(written) == {n for n in mae if not n.startswith(others)}
  for name, x in written.items():
    np.testing.assert_array_equal(np.asarray(x), mae[name], err_msg=name)
  # Their class takes no other key.
  config = json.loads((folder / 'config.json').read_text())
  assert config.keys() <= CONFIG.keys()
  again, found, report = weights.load_published(folder)
  assert again == module
  assert not report.unused
  jax.tree.map(np.testing.assert_array_equal, found, params)
  assert weights.clip_shape(folder) == CLIP


def test_positions_of_a_clip_that_is_not_square(tmp_path):
  module = hiera_encoder.make(
    dict(channels=8, depths=(1, 1, 1, 1), num_heads=1)
  )
  shape = (4, 32, 64, 3)
  start = jax.jit(module.init)
  params = start(jax.random.key(0), jnp.zeros((1, *shape), jnp.uint8))['params']
  weights.export(module, params, tmp_path, video=shape, layout='hiera')
  _, found, _ = weights.load_published(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, found, params)
  assert weights.clip_shape(tmp_path) == shape


@pytest.mark.parametrize(
  ('fields', 'wanted'),
  [
    (dict(gelu='tanh'), "gelu='tanh'"),
    (dict(separable=False), 'separable=False'),
  ],
)
def test_what_the_authors_code_cannot_express(tmp_path, fields, wanted):
  module = hiera_encoder.make('T', **fields)
  with pytest.raises(weights.WeightsError, match=wanted):
    weights.export(module, {}, tmp_path, layout='hiera')


def test_shape_of_its_clips(file, tmp_path, monkeypatch):
  monkeypatch.setitem(hiera_files.HEADS, 8, 1)
  assert weights.clip_shape(file) == CLIP
  image = save(tmp_path / 'image.pth', published(image=True))
  assert weights.clip_shape(image) == (16, 64, 64, 3)


def test_what_does_not_fit_is_named(mae, tmp_path):
  def load(**changes):
    tensors = {n: x for n, x in (mae | changes).items() if x is not None}
    file = save(tmp_path / 'changed.pth', tensors)
    return weights.load_published(file, num_heads=1)

  with pytest.raises(weights.WeightsError, match=r'8 channels.*num_heads'):
    weights.load_published(save(tmp_path / 'x.pth', mae))
  with pytest.raises(weights.WeightsError, match=r'blocks\.3\.mlp\.fc2\.bias'):
    load(**{'blocks.3.mlp.fc2.bias': None})
  with pytest.raises(weights.WeightsError, match=r'blocks\.0\.gain'):
    load(**{'blocks.0.gain': np.ones(3, np.float32)})
  with pytest.raises(weights.WeightsError, match='255'):
    load(pos_embed_spatial=np.ones((1, 255, 8), np.float32))
  with pytest.raises(weights.WeightsError, match='4 stages'):
    load(**{'blocks.4.proj.weight': None, 'blocks.4.proj.bias': None})
  names = {n for n, _ in trees.named_leaves(load()[1])}
  assert 'block_02/shortcut/kernel' in names
