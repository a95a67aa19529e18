"""Evaluation is exact: every video once per view, whatever the batch."""

import collections

import numpy as np
import pytest

from vssl_jax.data import pipeline


def rows(config, **options):
  """All clips of a pass, keyed by (index, view, segment)."""
  found, seen = {}, collections.Counter()
  options = {'batch_size': 12, 'segments': 2, 'views': 3, **options}
  once = pipeline.evaluation(config, **options)
  batches = list(once)
  assert len(batches) == len(once) == once.num_batches
  for batch in batches:
    for i in np.flatnonzero(batch['weight']):
      key = tuple(int(batch[n][i]) for n in ('index', 'view', 'segment'))
      seen[key] += 1
      found[key] = (batch['video'][i], int(batch['label'][i]), batch['crop'][i])
  once.close()
  assert set(seen.values()) == {1}
  return found, batches, once


def test_every_video_comes_once_per_view_and_segment(data_config):
  found, batches, once = rows(data_config)
  assert set(found) == {
    (i, v, s) for i in range(10) for v in range(3) for s in range(2)
  }
  assert sum(b['weight'].sum() for b in batches) == 60
  assert {k: v.shape[1:] for k, v in batches[0].items()} == once.shapes
  assert [
    label for (i, v, s), (_, label, _) in found.items() if v == s == 0
  ] == [0] * 5 + [1] * 5


def test_clips_of_a_video_lie_next_to_each_other(data_config):
  _, batches, _ = rows(data_config)
  shape = (2, 3, 2)  # videos, views, segments
  for batch in batches:
    index = batch['index'].reshape(shape)
    assert (index == index[:, :1, :1]).all()
    assert (batch['view'].reshape(shape) == np.arange(3)[:, None]).all()
    assert (batch['segment'].reshape(shape) == np.arange(2)).all()


def test_batches_and_processes_do_not_matter(data_config):
  expected, _, _ = rows(data_config)
  parts, lengths = {}, set()
  for process in range(3):
    found, batches, _ = rows(
      data_config, batch_size=18, process_index=process, process_count=3
    )
    assert not set(found) & set(parts)
    parts.update(found)
    lengths.add(len(batches))
  assert lengths == {4}  # also where only padding is left
  data_config.workers = 2
  bigger, _, _ = rows(data_config, batch_size=60)
  for other in (parts, bigger):
    assert set(other) == set(expected)
    for key, (video, label, crop) in expected.items():
      np.testing.assert_array_equal(other[key][0], video)
      assert other[key][1] == label
      np.testing.assert_array_equal(other[key][2], crop)


def test_padding_weighs_nothing(data_config):
  _, batches, _ = rows(data_config, batch_size=24)
  last = batches[-1]
  assert last['weight'].tolist() == [1.0] * 12 + [0.0] * 12
  assert (last['index'][12:] == 10).all() and not last['video'][12:].any()
  assert not last['substituted'].any() and (last['label'][12:] == -1).all()


def test_views_and_segments_are_where_they_should_be(
  tmp_path, film, data_config
):
  film(
    tmp_path / 'x.mkv', frames=75, height=32, width=64, codec='ffv1',
    pix_fmt='bgr0', picture=_marked,
  )  # fmt: skip
  data_config.source = str(tmp_path)
  data_config.frames, data_config.stride, data_config.size = 16, 1, (32, 32)
  (batch,) = pipeline.evaluation(
    data_config, batch_size=15, segments=5, views=3
  )
  # Frame k has red 3 k, pixel x has green 2 x: 5 windows over 75 frames start
  # at 0, 14, 29, 44, 59, three views at 0, 16, 32.
  start = batch['video'][:, 0, :, :, 0].mean(axis=(1, 2)) / 3
  np.testing.assert_allclose(start, [0, 14, 29, 44, 59] * 3, atol=0.4)
  left = batch['video'][:, 0, :, 0, 1].mean(axis=1) / 2
  np.testing.assert_allclose(left, np.repeat([0, 16, 32], 5), atol=0.6)


def _marked(number, height, width):
  picture = np.zeros((height, width, 3), np.uint8)
  picture[..., 0] = 3 * number
  picture[..., 1] = 2 * np.arange(width)
  return picture


def test_bad_videos_weigh_nothing_and_are_named(tmp_path, film, data_config):
  for number in range(4):
    film(tmp_path / f'{number}.mp4', frames=8)
  (tmp_path / '2.mp4').write_bytes(b'x' * 99)
  data_config.source = str(tmp_path)
  data_config.max_bad_fraction = 0.3
  found, batches, once = rows(
    data_config, batch_size=4, segments=1, views=1, folder=str(tmp_path)
  )
  assert {index for index, _, _ in found} == {0, 1, 3}
  assert batches[0]['index'].tolist() == [0, 1, 2, 3]
  assert batches[0]['substituted'].tolist() == [False, False, True, False]
  assert once.bad[2]['file'] == '2.mp4'
  assert (tmp_path / 'bad_files.jsonl').exists()


def test_a_pass_can_be_run_again(data_config):
  once = pipeline.evaluation(data_config, batch_size=5)
  one, two = list(once), list(once)
  for a, b in zip(one, two, strict=True):
    np.testing.assert_array_equal(a['video'], b['video'])
  once.close()
  with pytest.raises(ValueError, match='multiple'):
    pipeline.evaluation(data_config, batch_size=5, views=3)
