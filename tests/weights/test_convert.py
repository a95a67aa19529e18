"""Tables between layouts: exact numbers, whole round trips, every key told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssl_jax import trees
from vssl_jax.masks import sampling
from vssl_jax.models import decoder, predictor, resizing, vit
from vssl_jax.weights import convert
from vssl_jax.weights.name_maps import rules, video
from vssl_jax.weights.readers import tensors as tensors_lib

KEY = jax.random.key(0)
SMALL = {'width': 24, 'depth': 2, 'num_heads': 2, 'patch': (2, 4, 4)}
FULL = {'rope_pairing': 'vjepa2'}
TORCH = [x for x in video.LAYOUTS if x.family in ('vjepa2', 'videomae')]
QV = {'positions': 'sinusoid_1d', 'qkv_bias': 'qv', 'init': 'videomae'}


def random_like(shapes):
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes
  )


def encoder_shapes(**fields):
  encoder = vit.make({**SMALL, **fields})
  clip = jax.ShapeDtypeStruct((1, 4, 8, 8, 3), jnp.uint8)
  return jax.eval_shape(encoder.init, KEY, clip)['params']


def head_shapes(family):
  index = jnp.zeros((1, 1), jnp.int32)
  head = predictor.Predictor(
    out_width=24, width=16, depth=2, num_heads=2, num_mask_tokens=3
  )
  if family == 'videomae':
    head = decoder.VideoMaeDecoder(96, width=16, depth=2, num_heads=2)
  z, mask = jnp.zeros((1, 1, 24)), sampling.Mask(index, index)
  return jax.eval_shape(lambda: head.init(KEY, z, mask, (1, 1, 1)))['params']


@pytest.mark.parametrize('layout', TORCH, ids=lambda x: x.name)
@pytest.mark.parametrize('part', ['encoder', 'head'])
def test_round_trip_through_every_layout(layout, part):
  if part == 'encoder':
    fields = FULL if layout.family == 'vjepa2' else QV
    shapes = encoder_shapes(**fields)
  else:
    shapes = head_shapes(layout.family)
  if part not in layout.parts:  # MVD's two decoders belong to its teachers
    assert layout.name == 'MVD (original)'
    return
  params = random_like(shapes)
  table = layout.parts[part]
  rows = table.rows(2, 3)
  tensors = convert.to_theirs(params, rows, (2, 4, 4))
  assert table.depth(tensors) == 2
  again, report = convert.to_ours(tensors, rows, shapes)
  assert not trees.difference(again, params)
  jax.tree.map(np.testing.assert_array_equal, again, params)
  assert set(report.loaded) == set(tensors)
  assert report.missing == report.unused == report.resized == ()


def test_forms_by_hand():
  rows = [rules.Row('k', 'w', 'dense'), rules.Row('c', 'v', 'conv')]
  conv = np.arange(2 * 3 * 2 * 2 * 2.0).reshape(2, 3, 2, 2, 2)  # O I T H W
  tensors = {'w': np.array([[1.0, 2, 3], [4, 5, 6]]), 'v': conv}
  shapes = {
    'k': jax.ShapeDtypeStruct((3, 2), jnp.float32),
    'c': jax.ShapeDtypeStruct((24, 2), jnp.float32),
  }
  tree, _ = convert.to_ours(tensors, rows, shapes)
  np.testing.assert_array_equal(tree['k'], [[1, 4], [2, 5], [3, 6]])
  # Row (t, y, x, c) = (1, 0, 1, 2): ((1 * 2 + 0) * 2 + 1) * 3 + 2 = 17.
  np.testing.assert_array_equal(tree['c'][17], conv[:, 2, 1, 0, 1])


def test_fused_projections_are_cut_in_the_order_q_k_v():
  rows = video.ORIGINAL_VJEPA2['encoder'].rows(1)
  by_name = {r.ours: r for r in rows}
  fused = np.arange(18.0).reshape(6, 3)
  tensors = {'blocks.0.attn.qkv.weight': fused}
  names = [f'block_00/attn/{x}/kernel' for x in 'qkv']
  shapes = {n: jax.ShapeDtypeStruct((3, 2), jnp.float32) for n in names}
  tree, _ = convert.to_ours(tensors, [by_name[n] for n in names], shapes)
  found = tree['block_00']['attn']
  np.testing.assert_array_equal(found['q']['kernel'], fused[:2].T)
  np.testing.assert_array_equal(found['k']['kernel'], fused[2:4].T)
  np.testing.assert_array_equal(found['v']['kernel'], fused[4:].T)


def small_case():
  rows = video.VJEPA2['encoder'].rows(2)
  shapes = encoder_shapes(**FULL)
  tensors = convert.to_theirs(random_like(shapes), rows, (2, 4, 4))
  return rows, shapes, tensors


def test_missing_and_unused_keys_are_errors_unless_allowed():
  rows, shapes, tensors = small_case()
  gone = tensors.pop('encoder.layer.1.mlp.fc1.bias')
  with pytest.raises(
    tensors_lib.WeightsError,
    match=r'block_01/mlp/fc1/bias \(encoder\.layer\.1\.mlp',
  ):
    convert.to_ours(tensors, rows, shapes)
  tree, report = convert.to_ours(
    tensors, rows, shapes, allow_missing=['block_01/mlp/fc1/bias']
  )
  assert 'bias' not in tree['block_01']['mlp']['fc1']
  assert len(report.missing) == 1
  assert '1 missing (block_01/mlp/fc1/bias' in str(report)
  tensors['encoder.layer.1.mlp.fc1.bias'] = gone
  tensors['encoder.extra'] = gone
  with pytest.raises(
    tensors_lib.WeightsError, match=r'no use for 1.*encoder\.extra'
  ):
    convert.to_ours(tensors, rows, shapes)
  _, report = convert.to_ours(
    tensors, rows, shapes, allow_unused=[r'encoder\.extra']
  )
  assert report.unused == ('encoder.extra',)


def test_a_shape_that_does_not_fit_is_named():
  rows, shapes, tensors = small_case()
  key = 'encoder.layer.0.attention.query.weight'
  tensors[key] = tensors[key][:, :20]
  with pytest.raises(
    tensors_lib.WeightsError, match=rf'{key} gives shape \(20, 24\)'
  ):
    convert.to_ours(tensors, rows, shapes)
  tensors[key] = tensors[key].ravel()
  with pytest.raises(tensors_lib.WeightsError, match=r'wanted 2 axes'):
    convert.to_ours(tensors, rows, shapes)


def test_a_tree_that_the_layout_cannot_hold():
  params = random_like(encoder_shapes(positions='learned'))
  rows = video.VIDEOMAE['encoder'].rows(2)
  with pytest.raises(
    tensors_lib.WeightsError, match=r'no place for.*positions'
  ):
    convert.to_theirs(params, rows, (2, 4, 4))


def test_learned_positions_are_resized_and_reported():
  row = [rules.Row('positions', 'positions')]
  table = np.array([0.0, 1.0, 3.0]).reshape(3, 1, 1, 1)
  shapes = {'positions': jax.ShapeDtypeStruct((6, 1, 1, 1), jnp.float32)}
  tree, report = convert.to_ours({'positions': table}, row, shapes)
  # Centres of halves: outside the first and last centre the ends are kept.
  np.testing.assert_allclose(
    tree['positions'].ravel(), [0, 0.25, 0.75, 1.5, 2.5, 3], atol=1e-6
  )
  assert report.resized == ('positions (3, 1, 1, 1) -> (6, 1, 1, 1)',)
  assert '1 resized' in str(report)
  smaller = resizing.resize(np.arange(4.0).reshape(4, 1, 1, 1), (2, 1, 1))
  np.testing.assert_allclose(smaller.ravel(), [0.5, 2.5], atol=1e-6)
  wider = {'positions': jax.ShapeDtypeStruct((6, 1, 1, 2), jnp.float32)}
  with pytest.raises(tensors_lib.WeightsError, match='gives shape'):
    convert.to_ours({'positions': table}, row, wider)
