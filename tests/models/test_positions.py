"""Position tables and rotations against hand numbers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssl_jax.models import positions


def test_sinusoid_1d_hand_number():
  row = positions.sinusoid_1d((1, 2, 2), 4)[3]
  np.testing.assert_allclose(row, [0.1411, -0.9900, 0.0300, 0.9996], atol=5e-5)


def test_sincos_3d_vjepa_hand_number():
  table = positions.sincos_3d_vjepa((3, 4, 4), 16)
  wanted = [0.8415, 0.0998, 0.0100, 0.0010, 0.5403, 0.9950, 1.0, 1.0]
  wanted += [0.9093, 0.0200, -0.4161, 0.9998]
  wanted += [0.1411, 0.0300, -0.9900, 0.9996]
  np.testing.assert_allclose(table[27], wanted, atol=6e-5)


def test_sincos_3d_vjepa_uniform_has_three_equal_parts_cut_to_the_width():
  # 16 channels: parts of 2 * ceil(16 / 6) = 6, the last one cut to 4.
  row = positions.sincos_3d_vjepa_uniform((3, 4, 4), 16)[27]
  omega = 10000.0 ** (-np.arange(3) / 3)
  parts = [np.r_[np.sin(p * omega), np.cos(p * omega)] for p in (1, 2, 3)]
  np.testing.assert_allclose(row, np.concatenate(parts)[:16], atol=1e-6)


def test_sincos_3d_mvd_hand_number():
  row = positions.sincos_3d_mvd((3, 4, 4), 16)[27]
  wanted = [0.8415, 0.0100, 0.5403, 1.0000]  # time, then columns, then rows
  wanted += [0.1411, 0.1388, 0.0065, -0.9900, 0.9903, 1.0000]
  wanted += [0.9093, 0.0927, 0.0043, -0.4161, 0.9957, 1.0000]
  np.testing.assert_allclose(row, wanted, atol=6e-5)
  with pytest.raises(ValueError, match='multiple of 16, found 24'):
    positions.sincos_3d_mvd((1, 2, 2), 24)


def test_sincos_2d_has_columns_first_and_is_the_same_at_any_time():
  table = positions.sincos_2d((3, 4, 5), 8)
  # Row 2, column 3; frequencies 1 and 1/100.
  wanted = [0.1411, 0.0300, -0.9900, 0.9996, 0.9093, 0.0200, -0.4161, 0.9998]
  np.testing.assert_allclose(table[13], wanted, atol=6e-5)
  still = np.tile(positions.sincos_2d((1, 4, 5), 8), (3, 1))
  np.testing.assert_array_equal(table, still)
  with pytest.raises(ValueError, match='multiple of 4, found 6'):
    positions.sincos_2d((1, 2, 2), 6)


def test_sincos_3d_vjepa_refuses_odd_parts():
  with pytest.raises(ValueError, match='multiple of 8, found 12'):
    positions.sincos_3d_vjepa((1, 2, 2), 12)


@pytest.mark.parametrize(
  ('head_dim', 'segment', 'free'),
  [
    (64, 20, 4),
    (24, 8, 0),
    (32, 10, 2),
    (80, 26, 2),
    (88, 28, 4),
    (104, 34, 2),
  ],
)
def test_rope_segments_of_the_published_heads(head_dim, segment, free):
  assert positions.rope_segment(head_dim) == segment
  index = jnp.array([[1 + 5 + 25]], jnp.int32)  # 1 on every axis
  rope = positions.rope_3d(index, (5, 5, 5), head_dim)
  still = np.asarray(rope.sin[0, 0] == 0)
  assert still.sum() == free
  assert still[head_dim - free :].all()


@pytest.mark.parametrize(
  ('pairing', 'wanted'),
  [
    ('paired', [0.5403, 0.8415, -0.0100, 0.99995]),
    ('vjepa2', [0.5403, 0.0100, -0.8415, 0.99995]),
  ],
)
@pytest.mark.parametrize('axis', [0, 1, 2])
def test_rotation_hand_number(pairing, wanted, axis):
  # A head of 12 has a segment of 4 for each axis; position 1 on one axis.
  index = jnp.array([[(9, 3, 1)[axis]]], jnp.int32)
  rope = positions.rope_3d(index, (2, 3, 3), 12, pairing)
  x = jnp.tile(jnp.array([1.0, 0, 0, 1]), 3).reshape(1, 1, 1, 12)
  parts = np.asarray(positions.rotate(x, rope)).reshape(3, 4)
  for i, part in enumerate(parts):
    expected = wanted if i == axis else [1, 0, 0, 1]
    np.testing.assert_allclose(part, expected, atol=5e-5)


def test_rope_refuses_an_unknown_pairing():
  with pytest.raises(ValueError, match='rope_pairing'):
    positions.rope_3d(jnp.zeros((1, 1), jnp.int32), (1, 1, 1), 12, 'halves')


@pytest.mark.parametrize('pairing', ['paired', 'vjepa2'])
def test_rotation_at_position_0_is_the_identity(pairing):
  x = jax.random.normal(jax.random.key(0), (1, 1, 2, 24))
  rope = positions.rope_3d(jnp.zeros((1, 1), jnp.int32), (2, 3, 3), 24, pairing)
  np.testing.assert_array_equal(positions.rotate(x, rope), x)


def test_paired_rotation_keeps_norms_and_scores_are_relative():
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 4, 2, 64))
  grid = (8, 14, 14)
  index = jnp.array([[0, 3, 14, 200]], jnp.int32)
  shifted = index + 2 * 196 + 3 * 14 + 5  # by (2, 3, 5), no axis wraps

  def scores(index):
    rope = positions.rope_3d(index, grid, 64)
    a, b = positions.rotate(q, rope), positions.rotate(k, rope)
    np.testing.assert_allclose(
      jnp.linalg.norm(a, axis=-1), jnp.linalg.norm(q, axis=-1), rtol=1e-5
    )
    return jnp.einsum('bqhd,bkhd->bhqk', a, b)

  np.testing.assert_allclose(scores(index), scores(shifted), atol=1e-5)
  assert jnp.abs(scores(index) - scores(jnp.flip(index, 1))).max() > 0.1


class Table(nn.Module):
  kind: str

  @nn.compact
  def __call__(self, grid):
    return positions.table(self, self.kind, grid, 8)


def test_learned_table_is_a_parameter_of_the_grid_and_checks_it():
  module = Table('learned')
  variables = module.init(jax.random.key(0), (2, 3, 4))
  assert variables['params']['positions'].shape == (2, 3, 4, 8)
  assert module.apply(variables, (2, 3, 4)).shape == (24, 8)
  with pytest.raises(ValueError, match=r'grid of \(2, 3, 4\)'):
    module.apply(variables, (2, 4, 3))


def test_fixed_tables_are_no_parameters():
  for kind in ('sinusoid_1d', 'sincos_3d_vjepa', 'rope_3d', 'none'):
    assert not Table(kind).init(jax.random.key(0), (2, 3, 4))
  assert Table('none').apply({}, (2, 3, 4)) is None
  with pytest.raises(ValueError, match="'sin'"):
    Table('sin').apply({}, (2, 3, 4))


@pytest.mark.parametrize(
  ('width', 'sizes'),
  [(1792, (180, 448, 448)), (768, (76, 192, 192)), (24, (2, 6, 6))],
)
def test_rope_post_norm_turns_10_25_and_25_percent(width, sizes):
  for axis, index in enumerate((25, 5, 1)):  # 1 along one axis
    where = jnp.array([[index]], jnp.int32)
    rope = positions.rope_post_norm(where, (5, 5, 5), width)
    turning = np.flatnonzero(rope.sin[0, 0])
    first = sum(sizes[:axis])
    # The slowest of 10000^(-i / pairs) still turns in float32.
    np.testing.assert_array_equal(turning, np.arange(sizes[axis]) + first)
    pairs = sizes[axis] // 2
    angle = np.repeat(10000.0 ** (-np.arange(pairs) / pairs), 2)
    np.testing.assert_allclose(
      rope.sin[0, 0, turning], np.sin(angle), atol=1e-6
    )
    np.testing.assert_allclose(
      rope.cos[0, 0, turning], np.cos(angle), atol=1e-6
    )


def test_rope_post_norm_turns_pairs_and_keeps_lengths():
  # One pair for time, three for rows and columns; the token at time 2.
  rope = positions.rope_post_norm(jnp.array([[18]], jnp.int32), (3, 3, 3), 24)
  x = jnp.arange(1.0, 25.0).reshape(1, 1, 1, 24)
  y = np.asarray(positions.rotate(x, rope)).ravel()
  c, s = np.cos(2.0), np.sin(2.0)
  np.testing.assert_allclose(y[:2], [c - 2 * s, 2 * c + s], atol=1e-6)
  np.testing.assert_array_equal(y[2:], np.arange(3.0, 25.0))


@pytest.mark.parametrize('channels', [1, 3])
def test_an_odd_number_of_channels_cannot_turn(channels):
  x = jnp.zeros((1, 8, 4, channels))
  rope = positions.rope_3d(jnp.arange(8)[None], (2, 2, 2), channels)
  with pytest.raises(ValueError, match=f'found 4 heads of {channels} channels'):
    positions.rotate(x, rope)
