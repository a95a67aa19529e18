"""Folders, files and hub ids: what is found in them and what is refused."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vssl_jax
from tests.weights import pth
from vssl_jax import encoder as encoder_lib
from vssl_jax import trees, weights
from vssl_jax.masks import sampling
from vssl_jax.models import predictor, vit
from vssl_jax.weights import convert
from vssl_jax.weights import source as source_lib
from vssl_jax.weights.name_maps import video as video_lib
from vssl_jax.weights.readers import tensors as tensors_lib

KEY = jax.random.key(0)
SMALL = {'width': 24, 'depth': 2, 'num_heads': 2, 'patch': (2, 4, 4)}
VJEPA2 = vit.make(SMALL, rope_pairing='vjepa2', dtype='float32')
VIDEOMAE = vit.make(
  SMALL,
  positions='sinusoid_1d',
  qkv_bias='qv',
  init='videomae',
  dtype='float32',
  norm_eps=1e-12,
  mlp_width=40,
)
VIDEO = (4, 12, 12, 3)
ORIGINAL = [
  layout
  for layout in video_lib.LAYOUTS
  if layout.name in ('V-JEPA 2 (original)', 'VideoMAE (original)')
]


def start(encoder):
  shapes = jax.eval_shape(encoder.init, KEY, np.zeros((1, *VIDEO), np.uint8))
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: rng.standard_normal(x.shape).astype(np.float32),
    shapes['params'],
  )


@pytest.mark.parametrize(
  ('encoder', 'layout'),
  [
    (VJEPA2, 'vjepa2'),
    (VIDEOMAE, 'videomae'),
    (VIDEOMAE.clone(final_norm=False), 'videomae'),
    (VJEPA2.clone(rope_pairing='paired'), 'vssl_vit'),
    (VJEPA2.clone(final_norm=False), 'vssl_vit'),
    (VIDEOMAE.clone(positions='learned', gelu='tanh'), 'vssl_vit'),
    (VJEPA2.clone(mean=(0.5,) * 3, std=(0.1,) * 3, gelu='tanh'), 'vjepa2'),
  ],
)
def test_what_is_exported_comes_back(tmp_path, encoder, layout):
  params = start(encoder)
  assert weights.export(encoder, params, tmp_path, video=VIDEO) == layout
  module, again, report = weights.load_published(tmp_path, dtype='float32')
  # None stands for 4 * width, and the file says 96.
  assert module == encoder.clone(mlp_width=module.mlp_width)
  assert not trees.difference(again, params)
  jax.tree.map(np.testing.assert_array_equal, again, params)
  assert report.missing == report.unused == ()
  assert weights.clip_shape(tmp_path) == VIDEO
  assert weights.describe(tmp_path).clone(dtype='float32') == module


def test_a_layout_that_would_compute_something_else_is_refused(tmp_path):
  paired = VJEPA2.clone(rope_pairing='paired')
  with pytest.raises(tensors_lib.WeightsError, match="rope_pairing='paired'"):
    weights.export(paired, start(paired), tmp_path, layout='vjepa2')
  with pytest.raises(tensors_lib.WeightsError, match="positions='rope_3d'"):
    weights.export(paired, start(paired), tmp_path, layout='videomae')
  with pytest.raises(tensors_lib.WeightsError, match='not square'):
    weights.export(VJEPA2, {}, tmp_path, layout='vjepa2', video=(4, 12, 16, 3))
  with pytest.raises(tensors_lib.WeightsError, match="'torch'"):
    weights.export(VJEPA2, {}, tmp_path, layout='torch')
  assert not list(tmp_path.iterdir())


def test_learned_positions_load_onto_another_grid(tmp_path):
  encoder = VJEPA2.clone(positions='learned')
  weights.export(encoder, start(encoder), tmp_path, video=VIDEO)
  module, params, report = weights.load_published(tmp_path, grid=(3, 4, 5))
  assert params['positions'].shape == (3, 4, 5, 24)
  assert report.resized == ('positions (2, 3, 3, 24) -> (3, 4, 5, 24)',)
  clip = np.zeros((1, 6, 16, 20, 3), np.uint8)
  tokens = jax.eval_shape(module.apply, {'params': params}, clip)
  assert tokens.shape == (1, 60, 24)


def published_files(tmp_path, change=lambda tensors: tensors):
  """A VideoMAE folder as it is on the hub."""
  params = start(VIDEOMAE)
  weights.export(VIDEOMAE, params, tmp_path, video=VIDEO, layout='videomae')
  file = tmp_path / 'model.safetensors'
  tensors = {k: np.array(x) for k, x in tensors_lib.safetensors(file).items()}
  tensors_lib.write_safetensors(file, change(tensors))
  return params


def test_names_of_files_on_the_hub(tmp_path):
  def as_published(tensors):
    renamed = {'decoder.head.bias': np.zeros(3, np.float32)}
    for key, x in tensors.items():
      old = key.replace('query.bias', 'q_bias').replace('value.bias', 'v_bias')
      renamed[f'videomae.{old}'] = x
    assert 'videomae.encoder.layer.1.attention.attention.v_bias' in renamed
    return renamed

  params = published_files(tmp_path, as_published)
  _, again, report = weights.load_published(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, again, params)
  assert 'videomae.encoder.layer.0.attention.attention.q_bias' in report.loaded
  assert report.unused == ('decoder.head.bias',)


def test_a_key_that_no_table_knows_is_an_error(tmp_path):
  extra = {'encoder.layer.0.gamma': np.zeros(3, np.float32)}
  published_files(tmp_path, lambda tensors: tensors | extra)
  with pytest.raises(
    tensors_lib.WeightsError, match=r'encoder\.layer\.0\.gamma'
  ):
    weights.load_published(tmp_path)
  weights.load_published(tmp_path, allow_unused=[r'.*\.gamma$'])


def test_several_files_with_an_index(tmp_path):
  params = published_files(tmp_path)
  tensors = tensors_lib.safetensors(tmp_path / 'model.safetensors')
  keys = sorted(tensors)
  for i in range(2):
    tensors_lib.write_safetensors(
      tmp_path / f'part{i}.safetensors', {k: tensors[k] for k in keys[i::2]}
    )
  where = {k: f'part{i % 2}.safetensors' for i, k in enumerate(keys)}
  index = tmp_path / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': where}))
  (tmp_path / 'model.safetensors').unlink()
  _, again, _ = weights.load_published(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, again, params)
  where[keys[0]] = '../../etc/passwd'
  index.write_text(json.dumps({'weight_map': where}))
  with pytest.raises(tensors_lib.WeightsError, match='not a file beside it'):
    weights.load_published(tmp_path)


@pytest.mark.parametrize('layout', ORIGINAL, ids=lambda x: x.name)
def test_original_pth_files(tmp_path, layout):
  family = layout.family
  encoder = {'vjepa2': VJEPA2, 'videomae': VIDEOMAE}[family]
  encoder = encoder.clone(norm_eps=1e-6, mlp_width=96)
  params = start(encoder)
  rows = layout.parts['encoder'].rows(2)
  tensors = convert.to_theirs(params, rows, (2, 4, 4))
  as_saved = {
    'vjepa2': lambda x: {
      'encoder': {f'module.backbone.{k}': v for k, v in fakes(x, 0).items()},
      'target_encoder': {
        f'module.backbone.{k}': v for k, v in fakes(x).items()
      },
      'epoch': 1,
    },
    'videomae': lambda x: {
      'model': {f'encoder.{k}': v for k, v in fakes(x).items()},
      'optimizer': {'state': {}},
    },
  }[family]
  pth.save(tmp_path / 'model.pth', as_saved(tensors))
  module, again, report = weights.load_published(
    tmp_path / 'model.pth', num_heads=2, dtype='float32'
  )
  assert module == encoder
  jax.tree.map(np.testing.assert_array_equal, again, params)
  assert report.layout == layout.name
  assert weights.clip_shape(tmp_path / 'model.pth') == (16, 224, 224, 3)
  with pytest.raises(tensors_lib.WeightsError, match=r'width 24.*num_heads'):
    weights.load_published(tmp_path / 'model.pth')


def fakes(tensors, scale=1):
  return {k: pth.FakeTensor(np.array(x) * scale) for k, x in tensors.items()}


def test_the_predictor_beside_an_encoder(tmp_path):
  head = predictor.Predictor(
    24, width=16, depth=1, num_heads=2, num_mask_tokens=3,
    rope_pairing='vjepa2', dtype='float32',
  )  # fmt: skip
  index = jnp.zeros((1, 1), jnp.int32)
  z, mask = jnp.ones((1, 1, 24)), sampling.Mask(index, index)
  init = jax.jit(lambda z: head.init(KEY, z, mask, (1, 1, 1)))
  params = init(z)['params']
  params = trees.map_named(
    lambda n, x: x + float(n[-1]) if 'mask_token' in n else x, params
  )
  encoder = start(VJEPA2)
  weights.export(VJEPA2, encoder, tmp_path, video=VIDEO)
  file = tmp_path / 'model.safetensors'
  tensors = {k: np.array(x) for k, x in tensors_lib.safetensors(file).items()}
  rows = video_lib.VJEPA2['head'].rows(1, 3)
  tensors |= convert.to_theirs(params, rows)
  assert tensors['predictor.embeddings.mask_tokens'].shape == (3, 1, 1, 16)
  tensors_lib.write_safetensors(file, tensors)
  config = json.loads((tmp_path / 'config.json').read_text())
  # A published config is wrong about the depth: the file decides.
  config |= {'pred_num_attention_heads': 2, 'pred_num_hidden_layers': 24}
  (tmp_path / 'config.json').write_text(json.dumps(config))
  module, again, report = weights.load_published(
    tmp_path, part='head', dtype='float32'
  )
  assert module == head.clone(mlp_width=64)
  jax.tree.map(np.testing.assert_array_equal, again, params)
  assert float(again['mask_token_2'][0, 0]) == 2
  assert 'encoder.layernorm.bias' in report.unused
  _, again, _ = weights.load_published(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, again, encoder)


@pytest.fixture
def training_state(tmp_path):
  """A file as V-JEPA 2 releases it, and its parts as our parameters."""
  encoder = VJEPA2.clone(width=384, num_heads=12, depth=1, norm_eps=1e-6)
  head = predictor.Predictor(
    384, width=384, depth=1, num_heads=12, rope_pairing='vjepa2'
  )
  mask = sampling.Mask(*jnp.zeros((2, 1, 1), jnp.int32))
  shapes = jax.eval_shape(
    lambda: head.init(KEY, jnp.zeros((1, 1, 384)), mask, (1, 1, 1))['params']
  )
  student, target = (
    start(encoder),
    trees.map_named(lambda _, x: x + np.float32(1), start(encoder)),
  )
  rng = np.random.default_rng(1)
  made = jax.tree.map(
    lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes
  )
  (layout,) = [x for x in ORIGINAL if x.family == 'vjepa2']
  rows = layout.parts['encoder'].rows(1)

  def group(tensors):
    return {f'module.backbone.{k}': v for k, v in fakes(tensors).items()}

  pth.save(
    tmp_path / 'vitl.pt',
    {
      'encoder': group(convert.to_theirs(student, rows, (2, 4, 4))),
      'target_encoder': group(convert.to_theirs(target, rows, (2, 4, 4))),
      'predictor': group(
        convert.to_theirs(made, layout.parts['head'].rows(1, 2))
      ),
      'epoch': 3,
    },
  )
  return tmp_path / 'vitl.pt', student, target, made


def test_training_continues_from_what_was_trained(training_state):
  """`load` takes the average, `load_role` the network and its predictor."""
  path, student, target, head = training_state
  equal = np.testing.assert_array_equal
  jax.tree.map(equal, encoder_lib.load(str(path)).params, target)
  module, params = encoder_lib.load_role(str(path))
  jax.tree.map(equal, params, student)
  assert module.rope_pairing == 'vjepa2'
  module, params = encoder_lib.load_role(str(path), 'predictor')
  assert isinstance(module, predictor.Predictor)
  jax.tree.map(equal, params, head)


@pytest.mark.slow
def test_published_weights_compute_in_float32_on_cpus(training_state, caplog):
  path, _, target, _ = training_state
  video = np.random.default_rng(0).random((1, *VIDEO), np.float32)
  exact = VJEPA2.clone(width=384, num_heads=12, depth=1, mlp_width=1536)
  exact = jax.jit(exact.apply)({'params': target}, video)
  with caplog.at_level('INFO', 'vssl_jax'):
    features = vssl_jax.load(str(path))(video)
  assert f'{path}: computes in float32 on cpu' in caplog.messages
  np.testing.assert_allclose(features, exact, atol=1e-4)
  half = encoder_lib.load(str(path), dtype='bfloat16')
  assert half.module.dtype == 'bfloat16'
  assert np.abs(half(video) - exact).max() > 1e-3
  with pytest.raises(ValueError, match="dtype: found 'float16'"):
    encoder_lib.load(str(path), dtype='float16')


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value):
  def spoil(tensors):
    tensors['encoder.layer.1.output.dense.bias'][3] = value
    return tensors

  published_files(tmp_path, spoil)
  with pytest.raises(
    tensors_lib.WeightsError,
    match=r'NaN or Inf in 1 tensors.*layer\.1\.output\.dense\.bias '
    r'\(block_01/mlp/fc2/bias\)',
  ):
    weights.load_published(tmp_path)


@pytest.mark.parametrize('dtype', ['int32', 'int8', 'bool'])
def test_integer_weights_are_refused_by_name(tmp_path, dtype):
  name = 'encoder.layer.0.intermediate.dense.weight'

  def quantise(tensors):
    return tensors | {name: tensors[name].astype(dtype)}

  published_files(tmp_path, quantise)
  with pytest.raises(tensors_lib.WeightsError, match=f'{name} holds {dtype}'):
    weights.load_published(tmp_path)


def test_float64_beyond_float32_is_not_finite(tmp_path):
  def grow(tensors):
    return tensors | {'layernorm.bias': np.full(24, 1e300)}

  published_files(tmp_path, grow)
  with pytest.raises(
    tensors_lib.WeightsError, match=r'NaN or Inf.*layernorm\.bias'
  ):
    weights.load_published(tmp_path)


def test_sources_that_are_not_there(tmp_path, monkeypatch):
  with pytest.raises(tensors_lib.WeightsError, match='not a hub id'):
    weights.load_published(tmp_path / 'nowhere' / 'at' / 'all')
  with pytest.raises(tensors_lib.WeightsError, match=r'no model\.safetensors'):
    weights.load_published(tmp_path)
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(
    tensors_lib.WeightsError, match='pip install huggingface_hub'
  ):
    weights.load_published('owner/model')


class Hub:
  """Takes the place of huggingface_hub."""

  def __init__(self, folder):
    self.folder = folder

  def snapshot_download(self, name, *, allow_patterns):
    if self.folder is None:
      raise ConnectionError('no route')
    assert name == 'owner/model'
    assert allow_patterns == source_lib.HUB_FILES
    return str(self.folder)


def test_the_hub(tmp_path, monkeypatch):
  params = published_files(tmp_path)
  monkeypatch.setitem(sys.modules, 'huggingface_hub', Hub(tmp_path))
  _, again, report = weights.load_published('owner/model')
  jax.tree.map(np.testing.assert_array_equal, again, params)
  assert str(report).startswith('owner/model [VideoMAE (transformers)]')
  monkeypatch.setitem(sys.modules, 'huggingface_hub', Hub(None))
  with pytest.raises(
    tensors_lib.WeightsError, match=r'hub could not be read.*no rou'
  ):
    weights.load_published('owner/model')


def test_files_that_are_something_else(tmp_path):
  tensors_lib.write_safetensors(tmp_path / 'x.safetensors', {'a': np.zeros(3)})
  with pytest.raises(
    tensors_lib.WeightsError, match=r"layout is unknown.*\['a'\]"
  ):
    weights.load_published(tmp_path / 'x.safetensors')
  pth.save(tmp_path / 'x.pth', [1, 2])
  with pytest.raises(tensors_lib.WeightsError, match='no dict of tensors'):
    weights.load_published(tmp_path / 'x.pth')
  published_files(tmp_path)
  config = json.loads((tmp_path / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(
    json.dumps(config | {'hidden_act': 'x'})
  )
  with pytest.raises(tensors_lib.WeightsError, match="hidden_act is 'x'"):
    weights.load_published(tmp_path)
  (tmp_path / 'config.json').write_text('[1]')
  with pytest.raises(tensors_lib.WeightsError, match='no JSON object'):
    weights.load_published(tmp_path)


def test_npz_of_a_published_layout(tmp_path):
  params = published_files(tmp_path)
  tensors = tensors_lib.safetensors(tmp_path / 'model.safetensors')
  np.savez(tmp_path / 'model.npz', **tensors)
  _, again, _ = weights.load_published(tmp_path / 'model.npz', num_heads=2)
  jax.tree.map(np.testing.assert_array_equal, again, params)
