import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssl_jax.evals import features

RNG = np.random.default_rng(0)


def clips(videos=3, views=2, segments=2, pad=0):
  """One batch: the segments of a view in successive rows."""
  index, view, segment = np.indices((videos, views, segments)).reshape(3, -1)
  video = RNG.integers(0, 256, size=(len(index), 2, 4, 4, 3), dtype=np.uint8)
  batch = {
    'video': video,
    'label': index % 2,
    'index': index,
    'view': view,
    'segment': segment,
    'weight': np.ones(len(index)),
  }
  if pad:
    batch = {
      k: np.concatenate([v, np.zeros((pad, *v.shape[1:]), v.dtype)])
      for k, v in batch.items()
    }
  return batch


def encode(video):
  """Tokens that are the two frames' colours: [R, 2, 3]."""
  return jnp.mean(jnp.asarray(video, jnp.float32), axis=(2, 3))


def test_segments_are_joined_along_the_tokens():
  batch = clips()
  (rows,) = features.encode_batches(encode, [batch], segments=2)
  assert rows.tokens.shape == (6, 4, 3)
  each = np.asarray(encode(batch['video'])).reshape(6, 4, 3)
  np.testing.assert_allclose(rows.tokens, each, rtol=1e-6)
  np.testing.assert_array_equal(rows.index, [0, 0, 1, 1, 2, 2])
  np.testing.assert_array_equal(rows.view, [0, 1] * 3)
  np.testing.assert_array_equal(rows.weight, 1)


def test_padding_and_substitutes_weigh_nothing():
  batch = clips(pad=2)
  (rows,) = features.encode_batches(encode, [batch], segments=2)
  np.testing.assert_array_equal(rows.weight, [1] * 6 + [0])
  batch['substituted'] = np.arange(14) == 5
  (rows,) = features.encode_batches(encode, [batch], segments=2)
  np.testing.assert_array_equal(rows.weight, [1, 1, 0, 1, 1, 1, 0])
  found = features.table(encode, [batch], segments=2)
  np.testing.assert_array_equal(found.index, [0, 0, 1, 2, 2])


def test_rows_out_of_order_are_refused():
  batch = clips()
  mixed = {k: np.concatenate([v[1:], v[:1]]) for k, v in batch.items()}
  with pytest.raises(ValueError, match='clips of different'):
    features.join(mixed, 2)
  with pytest.raises(ValueError, match='no whole number of views'):
    features.join(batch, 5)


def test_a_table_is_the_same_for_any_batches_and_devices():
  batch = clips(videos=8, views=1, segments=1)
  half = [{k: v[i : i + 4] for k, v in batch.items()} for i in (0, 4)]
  mesh = jax.make_mesh(
    (2, 1),
    ('data', 'fsdp'),
    devices=jax.devices()[:2],
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
  )
  whole = features.table(jax.jit(encode), [batch])
  for other in (
    features.table(jax.jit(encode), half),
    features.table(jax.jit(encode), [batch], mesh=mesh),
  ):
    np.testing.assert_allclose(other.tokens, whole.tokens, rtol=1e-6)
    np.testing.assert_array_equal(other.index, whole.index)
    np.testing.assert_array_equal(other.label, whole.label)


def test_pooling_keeps_the_mean_token():
  batch = clips()
  full = features.table(encode, [batch], segments=2)
  pooled = features.table(encode, [batch], segments=2, pool=True)
  np.testing.assert_allclose(
    pooled.tokens, full.tokens.mean(1, keepdims=True), rtol=1e-6
  )
  vectors = features.table(features.pixels, [batch], segments=2, pool=True)
  assert vectors.tokens.shape == (6, 1, 96)


def rows(n):
  return features.Table(
    RNG.normal(size=(n, 1, 2)).astype(np.float32), *[np.arange(n)] * 3
  )


def test_one_pass_meets_every_row_once():
  batches = list(rows(10).batches(4))
  assert [b.tokens.shape[0] for b in batches] == [4, 4, 4]
  index = np.concatenate([b.index for b in batches])
  weight = np.concatenate([b.weight for b in batches])
  np.testing.assert_array_equal(index[weight > 0], np.arange(10))


def test_shuffled_passes_drop_the_rest_and_differ():
  first, second = (
    np.concatenate(
      [b.index for b in rows(10).batches(4, rng=np.random.default_rng(s))]
    )
    for s in (0, 1)
  )
  assert len(first) == len(set(first)) == 8
  assert (first != second).any()
  (small,) = rows(3).batches(4, rng=np.random.default_rng(0))
  assert sorted(np.asarray(small.index)[:3]) == [0, 1, 2]
  np.testing.assert_array_equal(small.weight, [1, 1, 1, 0])


def test_only_some_videos_in_full_batches():
  batches = [
    {k: v[i : i + 8] for k, v in clips(9, 1, 2, pad=6).items()}
    for i in (0, 8, 16)
  ]
  found = list(features.only(batches, lambda index: index % 2 == 0))
  assert [len(b['index']) for b in found] == [8, 8]
  index = np.concatenate([b['index'] for b in found])
  weight = np.concatenate([b['weight'] for b in found])
  np.testing.assert_array_equal(
    index[weight > 0], [0, 0, 2, 2, 4, 4, 6, 6, 8, 8]
  )
  source = np.concatenate([b['video'] for b in batches])
  picked = np.concatenate([b['video'] for b in found])[weight > 0]
  np.testing.assert_array_equal(picked[:2], source[:2])
  np.testing.assert_array_equal(picked[2:4], source[4:6])
  assert not list(features.only(batches, lambda index: index < 0))


def test_no_clips_is_an_error():
  with pytest.raises(ValueError, match='no clips'):
    features.table(encode, [])


def test_motion_energy_sees_change_and_nothing_else():
  video = RNG.integers(0, 256, size=(1, 1, 16, 16, 3), dtype=np.uint8)
  still = np.repeat(video, 3, axis=1)
  np.testing.assert_array_equal(features.motion_energy(still), 0)
  flash = still.copy()
  flash[0, 1, :2, :2] = 255 - flash[0, 1, :2, :2]
  found = np.asarray(features.motion_energy(flash)).reshape(2, 8, 8)
  change = np.abs(flash[0, 1, :2, :2] / 255.0 - still[0, 0, :2, :2] / 255.0)
  np.testing.assert_allclose(found[:, 0, 0], change.mean(), rtol=1e-5)
  assert np.count_nonzero(found) == 2


def test_middle_frame_ignores_the_others():
  video = RNG.integers(0, 256, size=(2, 5, 4, 4, 3), dtype=np.uint8)
  other = RNG.integers(0, 256, size=video.shape, dtype=np.uint8)
  other[:, 2] = video[:, 2]
  np.testing.assert_array_equal(
    features.middle_frame(video), features.middle_frame(other)
  )
  np.testing.assert_allclose(
    features.middle_frame(video)[0, :3], video[0, 2, 0, 0] / 255, rtol=1e-6
  )
  assert (
    np.asarray(features.pixels(video)) != np.asarray(features.pixels(other))
  ).any()
