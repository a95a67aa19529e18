"""Files of VideoMAE and of MVD: the same names and other positions."""

import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest

from tests.weights import pth
from vssl_jax import encoder as encoder_lib
from vssl_jax import trees, weights
from vssl_jax.models import positions, vit
from vssl_jax.weights import convert
from vssl_jax.weights.name_maps import video as video_lib
from vssl_jax.weights.readers import tensors as tensors_lib

SMALL = {'width': 32, 'depth': 2, 'num_heads': 2, 'patch': (2, 4, 4)}
VIDEOMAE = vit.make(
  SMALL,
  positions='sinusoid_1d',
  qkv_bias='qv',
  init='videomae',
  dtype='float32',
  mlp_width=64,
)
MVD = VIDEOMAE.clone(positions='sincos_3d_mvd')
LEARNED = VIDEOMAE.clone(positions='learned')
VIDEO = (4, 12, 12, 3)
GRID = (2, 3, 3)


@pytest.fixture(scope='module')
def params():
  shapes = jax.eval_shape(
    LEARNED.init, jax.random.key(0), np.zeros((1, *VIDEO), np.uint8)
  )
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: rng.standard_normal(x.shape).astype(np.float32),
    shapes['params'],
  )


def fixed(params):
  return {name: x for name, x in params.items() if name != 'positions'}


def file_of(path, params, prefix='', group='model', patch=(2, 4, 4), **more):
  """A file with VideoMAE's names of the encoder, and further tensors."""
  rows = video_lib.ORIGINAL_VIDEOMAE['encoder'].rows(2)
  tensors = convert.to_theirs(fixed(params), rows, patch)
  tensors = {f'{prefix}{k}': x for k, x in tensors.items()} | more
  state = {
    k: pth.FakeTensor(np.ascontiguousarray(x)) for k, x in tensors.items()
  }
  pth.save(path, {group: state, 'epoch': 399} if group else state)
  return str(path)


def pretraining(width=32, table=None):
  """What MVD's code has beside the encoder, two decoders shortened."""
  if table is None:
    table = positions.sincos_3d_mvd(GRID, width)
  found = {'pos_embed': table[None]}
  for name in ('img', 'vid'):
    found |= {
      f'mask_token_{name}': np.zeros((1, 1, 16), np.float32),
      f'pos_embed_{name}': positions.sincos_3d_mvd(GRID, 16)[None],
      f'down_{name}.weight': np.zeros((16, width), np.float32),
      f'down_{name}.bias': np.zeros(16, np.float32),
      f'decoder_{name}.blocks.0.attn.q_bias': np.zeros(16, np.float32),
      f'decoder_{name}.norm.weight': np.zeros(16, np.float32),
      f'decoder_{name}.head.bias': np.zeros(24, np.float32),
    }
  return found


def load(source):
  return weights.load_published(source, num_heads=2, dtype='float32')


@pytest.fixture(autouse=True)
def heads(monkeypatch):
  """Two heads for so narrow an encoder, where no argument can tell."""
  from vssl_jax.weights import modules

  monkeypatch.setitem(modules.HEADS['videomae'], 32, 2)


@pytest.mark.slow
def test_pretraining_files_of_mvd_are_recognised(tmp_path, params, caplog):
  file = file_of(tmp_path / 'checkpoint-399.pth', params, **pretraining())
  with caplog.at_level('INFO', 'vssl_jax'):
    module, found, report = load(file)
  assert module == MVD
  assert report.layout == 'MVD (original)'
  assert not trees.difference(found, fixed(params))
  jax.tree.map(np.testing.assert_array_equal, found, fixed(params))
  assert set(report.unused) == {*pretraining()}
  text = '\n'.join(caplog.messages)
  assert 'positions sincos_3d_mvd (pos_embed in the file equals' in text
  # Features are of that table: MVD's formula, added to the embedded tokens.
  video = np.random.default_rng(1).random((1, *VIDEO), np.float32)
  features = module.apply({'params': found}, video, features=True)
  plain = module.clone(positions='none')
  embedded = plain.apply({'params': found}, video, features=True)
  np.testing.assert_allclose(
    features[0] - embedded[0], pretraining()['pos_embed'], atol=1e-4
  )


def test_a_table_in_a_pretraining_file_that_is_not_mvds(tmp_path, params):
  """Another formula, or none: what is in the file counts."""
  other = pretraining(table=positions.sinusoid_1d(GRID, 32))
  assert load(file_of(tmp_path / 'a.pth', params, **other))[0] == VIDEOMAE
  table = params['positions'].reshape(-1, 32)
  file = file_of(tmp_path / 'b.pth', params, **pretraining(table=table))
  # 18 rows are 2 x 3 x 3; there is no other way to make squares of them.
  module, found, report = load(file)
  assert module == LEARNED
  jax.tree.map(np.testing.assert_array_equal, found, params)
  assert 'pos_embed' in report.loaded
  with pytest.raises(tensors_lib.WeightsError, match=r'#mvd means.*is learned'):
    load(f'{file}#mvd')


@pytest.mark.slow
def test_learned_positions_of_videomae(tmp_path, params):
  table = params['positions'].reshape(1, -1, 32)
  file = file_of(
    tmp_path / 'x.pth', params, 'encoder.', **{'encoder.pos_embed': table}
  )
  module, found, _ = load(file)
  assert module == LEARNED
  jax.tree.map(np.testing.assert_array_equal, found, params)
  assert weights.clip_shape(file) == VIDEO
  bad = {'encoder.pos_embed': table[:, :7]}
  file = file_of(tmp_path / 'y.pth', params, 'encoder.', **bad)
  assert load(file)[0] == LEARNED  # 7 = 7 x 1 x 1
  bad = {'encoder.pos_embed': np.zeros((67, 32), np.float32)}
  file = file_of(tmp_path / 'z.pth', params, 'encoder.', **bad)
  with pytest.raises(
    tensors_lib.WeightsError, match=r'z\.pth: pos_embed has shape'
  ):
    load(file)


def test_fine_tuned_files_tell_neither(tmp_path, params, caplog):
  """The same file is read as either, and what is assumed is said."""
  head = {'head.weight': np.zeros((5, 32), np.float32)}
  file = file_of(tmp_path / 'x.pth', params, group='module', **head)
  module, found, _ = load(file)
  assert module == VIDEOMAE
  (record,) = [r for r in caplog.records if r.levelname == 'WARNING']
  assert re.search(
    r'positions sinusoid_1d assumed.*x\.pth#mvd, else.*x\.pth#videomae',
    record.getMessage(),
  )
  caplog.clear()
  for tag, wanted in (('mvd', MVD), ('videomae', VIDEOMAE)):
    module, again, _ = load(f'{file}#{tag}')
    assert module == wanted
    jax.tree.map(np.testing.assert_array_equal, again, found)
    assert encoder_lib.module_of(f'{file}#{tag}').positions == wanted.positions
    encoder = encoder_lib.load(f'{file}#{tag}')
    assert encoder.module == wanted
    assert (
      encoder_lib.load_role(f'{file}#{tag}')[0].positions == wanted.positions
    )
  assert not [r for r in caplog.records if r.levelname == 'WARNING']
  prints = {encoder_lib.fingerprint(f'{file}{x}') for x in ('', '#mvd')}
  assert len(prints) == 2  # cached targets of one are not those of the other


def test_what_cannot_be_named(tmp_path, params):
  file = file_of(tmp_path / 'x.pth', params)
  with pytest.raises(
    tensors_lib.WeightsError, match=r"behind # is 'mae', wanted one"
  ):
    load(f'{file}#mae')
  weights.export(
    VIDEOMAE.clone(gelu='tanh', rope_pairing='vjepa2'), fixed(params),
    tmp_path / 'ours', video=VIDEO, layout='vssl_vit',
  )  # fmt: skip
  with pytest.raises(
    tensors_lib.WeightsError, match=r'#mvd is for files.*vssl_vit'
  ):
    load(f'{tmp_path}/ours#mvd')
  with pytest.raises(tensors_lib.WeightsError, match='not a hub id'):
    load(f'{tmp_path}/no/where#mvd')
  # A file whose own name has the sign is that file.
  odd = tmp_path / 'x#mvd'
  odd.mkdir()
  weights.export(VIDEOMAE, fixed(params), odd, video=VIDEO)
  assert load(odd)[0].positions == 'sinusoid_1d'


def test_files_of_transformers_name_videomaes_table(tmp_path, params, caplog):
  weights.export(VIDEOMAE, fixed(params), tmp_path, video=VIDEO)
  with caplog.at_level('INFO', 'vssl_jax'):
    assert load(tmp_path)[0].positions == 'sinusoid_1d'
  assert any('positions sinusoid_1d (transf' in m for m in caplog.messages)
  assert load(f'{tmp_path}#mvd')[0].positions == 'sincos_3d_mvd'


@pytest.mark.slow
@pytest.mark.parametrize(
  'grid', [(16, 14, 14), (4, 14, 14), (4, 16, 16), (16, 24, 24)]
)
def test_rows_that_several_grids_have(tmp_path, params, caplog, grid):
  """The likeliest one is assumed and said; 3136 rows were 1 x 56 x 56."""
  rng = np.random.default_rng(0)
  table = rng.standard_normal((*grid, 32), np.float32)
  module = LEARNED.clone(patch=(2, 16, 16))
  wide = params | {
    'embed': params['embed']
    | {'kernel': rng.standard_normal((2 * 16 * 16 * 3, 32), np.float32)}
  }
  file = file_of(
    tmp_path / 'x.pth', wide, patch=module.patch,
    pos_embed=table.reshape(1, -1, 32),
  )  # fmt: skip
  found, again, _ = load(file)
  assert found == module
  np.testing.assert_array_equal(again['positions'], table)
  t, h, w = grid
  assert weights.clip_shape(file) == (2 * t, 16 * h, 16 * w, 3)
  (record,) = [r for r in caplog.records if r.levelname == 'WARNING']
  assert f'a grid (t, h, w) of {grid} tokens assumed' in record.getMessage()


def test_tables_in_16_bits_are_known_by_their_formula(tmp_path, params):
  for kind in (np.float16, ml_dtypes.bfloat16):
    table = positions.sincos_3d_mvd(GRID, 32).astype(kind).astype(np.float32)
    more = pretraining(table=table)
    assert load(file_of(tmp_path / 'x.pth', params, **more))[0] == MVD


def test_heads_of_published_widths_and_of_others(tmp_path):
  """VideoMAE V2's ViT-g has 16 heads; others are asked for where they help."""

  def file(width, name='x.pth'):
    shapes = jax.eval_shape(
      VIDEOMAE.clone(width=width, num_heads=1, depth=1).init,
      jax.random.key(0),
      np.zeros((1, 2, 4, 4, 3), np.uint8),
    )['params']
    some = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    rows = video_lib.ORIGINAL_VIDEOMAE['encoder'].rows(1)
    tensors = convert.to_theirs(some, rows, (2, 4, 4))
    state = {k: pth.FakeTensor(x) for k, x in tensors.items()}
    pth.save(tmp_path / name, {'module': state})
    tensors_lib.write_safetensors(tmp_path / 'model.safetensors', tensors)
    return str(tmp_path / name)

  assert weights.describe(file(1408)).num_heads == 16
  message = (
    r'width 40 does not determine.*config\.json that has num_attention_heads'
  )
  with pytest.raises(tensors_lib.WeightsError, match=message):
    weights.describe(file(40))
  config = tmp_path / 'config.json'
  config.write_text(json.dumps({'num_attention_heads': 5}))
  assert weights.describe(tmp_path).num_heads == 5
  config.write_text(json.dumps({'num_attention_heads': 3}))
  with pytest.raises(
    tensors_lib.WeightsError, match=r'found 3 heads.*divisor of'
  ):
    weights.describe(tmp_path)
