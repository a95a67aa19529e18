"""Frame numbers and boxes, against numbers worked out by hand."""

import itertools
import math

import numpy as np
import pytest

from vssl_jax.data.clips import transforms


def test_spread_takes_the_published_windows():
  numbers = transforms.spread(300, 16, 4, 5)
  assert (numbers[:, 0] // 4).tolist() == [0, 14, 29, 44, 59]
  assert numbers[0].tolist() == list(range(0, 64, 4))
  assert numbers.max() == 4 * (59 + 15)


def test_one_segment_lies_in_the_middle():
  assert transforms.spread(300, 16, 4, 1)[0, 0] == 4 * ((75 - 16) // 2)


def test_short_videos_repeat_the_last_reachable_frame():
  assert transforms.window(7, 5, 2, 0.9).tolist() == [0, 2, 4, 6, 6]
  assert transforms.window(6, 5, 2, 0.9).tolist() == [0, 2, 4, 4, 4]
  assert transforms.spread(10, 4, 4, 2).tolist() == [[0, 4, 8, 8]] * 2
  assert transforms.window(1, 3, 4, 0.5).tolist() == [0, 0, 0]


def test_window_reaches_both_ends_evenly():
  starts = [
    transforms.window(20, 4, 3, chance)[0]
    for chance in np.linspace(0, 1, 1100, endpoint=False)
  ]
  assert np.bincount(starts).tolist() == [100] * 11  # 20 - 9 places


def test_parts_stay_in_their_part_where_they_fit():
  for which in range(4):
    for chance in (0.0, 0.999):
      numbers = transforms.part(80, 4, 5, chance, which, 4)
      assert which * 20 <= numbers[0] and numbers[-1] < (which + 1) * 20


@pytest.mark.slow
@pytest.mark.parametrize(
  ('count', 'parts'),
  [(300, 8), (530, 8), (46, 2), (250, 2), (129, 2), (128, 2), (40, 2), (90, 1)],
)
def test_parts_start_where_the_published_code_starts_them(count, parts):
  """Starts of clips of 16 frames, 4 apart, in V-JEPA 2's data set."""
  length, part = 64, count // parts
  for which in range(parts):
    if part > length:  # randint(length, part) - length
      wanted = {which * part + i for i in range(part - length)}
    elif count > length:
      wanted = {which * ((count - length) // (parts - 1))} if parts > 1 else {0}
    else:
      wanted = {0}
    found = {
      int(transforms.part(count, 16, 4, chance, which, parts)[0])
      for chance in np.linspace(0, 1, 4001)[:-1]
    }
    assert found == wanted


def test_scattered_takes_one_frame_of_each_part():
  numbers = transforms.scattered(32, 8, np.full(8, 0.99))
  assert numbers.tolist() == [3, 7, 11, 15, 19, 23, 27, 31]
  assert transforms.scattered(3, 6, np.zeros(6)).tolist() == [0, 0, 1, 1, 2, 2]


def test_interleaved_samplings_lie_between_each_other():
  """At 1/4 and 3/4 of each part, as MVD tests on SSv2."""
  numbers = transforms.interleaved(33, 4, 2)
  assert numbers.tolist() == [[2, 10, 18, 26], [6, 14, 22, 30]]
  assert transforms.interleaved(33, 4, 1).tolist() == [[4, 12, 20, 28]]
  assert transforms.interleaved(1, 3, 2).tolist() == [[0] * 3] * 2


@pytest.mark.parametrize('count', [2, 15, 16, 40, 117, 300])
@pytest.mark.parametrize('segments', [1, 2, 3])
def test_interleaved_samplings_are_those_of_a_loop(count, segments):
  """Piece after piece of each part: the middle of its rounded ends."""
  tick = (count - 1) / 16
  wanted = [
    (round(tick * i + tick / segments * k)
     + round(tick * i + tick / segments * (k + 1))) // 2
    for k in range(segments) for i in range(16)
  ]  # fmt: skip
  found = transforms.interleaved(count, 16, segments)
  assert found.ravel().tolist() == wanted


def test_linspace_spans_all_frames_of_a_window():
  """64 frames as VideoMAE and MVD cut K400: steps of 4 and 5."""
  steps = [0, 4, 8, 12, 17, 21, 25, 29, 34, 38, 42, 46, 51, 55, 59, 63]
  for count, chance, start in (
    (300, 0.0, 0), (300, 0.999, 235), (300, 0.5, 118), (65, 0.9, 0),
  ):  # fmt: skip
    found = transforms.linspace(count, 16, 4, chance)
    assert found.tolist() == [start + x for x in steps]
  # Short: 40 // 4 frames over all of the video, then the last one.
  found = transforms.linspace(40, 16, 4, 0.7).tolist()
  assert found == [0, 4, 8, 13, 17, 22, 26, 31, 35] + [39] * 7
  assert transforms.linspace(64, 16, 4, 0.7).tolist() == steps
  assert transforms.linspace(3, 4, 4, 0.0).tolist() == [2] * 4


def test_three_views_start_where_they_should():
  boxes = transforms.views(224, 298, 1.0, 3)
  lefts = [box[1] * 298 for box in boxes]
  np.testing.assert_allclose(lefts, [0, 37, 74], atol=1e-9)
  assert all(box[0] == 0 and box[2] == 1 for box in boxes)
  tall = transforms.views(298, 224, 1.0, 3)
  np.testing.assert_allclose([b[0] * 298 for b in tall], [0, 37, 74], atol=1e-9)


def test_centre_box_has_the_shape_and_the_part():
  top, left, bottom, right = transforms.centre(100, 200, 1.0, 0.5)
  assert (bottom - top) * 100 == pytest.approx(50)
  assert (right - left) * 200 == pytest.approx(50)
  assert top + bottom == pytest.approx(1) and left + right == pytest.approx(1)


def test_random_resized_keeps_area_and_shape():
  rng = np.random.default_rng(0)
  height, width = 240, 320
  boxes = np.asarray(
    [
      transforms.random_resized(rng, height, width, (0.2, 0.6), (0.75, 4 / 3))
      for _ in range(4000)
    ]
  )
  tall, wide = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
  assert boxes.min() >= 0 and boxes.max() <= 1
  area, shape = tall * wide, wide * width / (tall * height)
  assert area.min() >= 0.2 - 1e-9 and area.max() <= 0.6 + 1e-9
  assert shape.min() >= 0.75 - 1e-9 and shape.max() <= 4 / 3 + 1e-9
  assert area.mean() == pytest.approx(0.4, abs=0.01)
  assert np.log(shape).mean() == pytest.approx(0, abs=0.02)
  assert np.log(shape).std() == pytest.approx(
    math.log(4 / 3) / 3**0.5, abs=0.01
  )
  free = boxes[:, 0] / (1 - tall)
  assert free.mean() == pytest.approx(0.5, abs=0.02)


def test_random_resized_falls_back_to_the_centre():
  rng = np.random.default_rng(0)
  box = transforms.random_resized(rng, 10, 1000, (0.9, 1.0), (0.75, 4 / 3))
  np.testing.assert_allclose(box, [0, 0.5 - 1 / 150, 1, 0.5 + 1 / 150])


def test_multi_scale_draws_ten_sizes_at_thirteen_places():
  rng = np.random.default_rng(0)
  boxes = [transforms.multi_scale(rng, 100, 100) for _ in range(3000)]
  sizes = {(round(b[2] - b[0], 6), round(b[3] - b[1], 6)) for b in boxes}
  scales = (1, 0.875, 0.75, 0.66)
  assert sizes == {
    (a, b)
    for i, a in enumerate(scales)
    for j, b in enumerate(scales)
    if abs(i - j) < 2
  }
  small = {
    (round(b[0], 3), round(b[1], 3))
    for b in boxes
    if round(b[2] - b[0], 6) == round(b[3] - b[1], 6) == 0.66
  }
  assert len(small) == 13
  assert min(b[0] for b in boxes) == 0 and max(b[2] for b in boxes) == 1


def test_boxes_turn_like_pictures():
  picture = np.arange(40 * 60).reshape(40, 60)
  box = (0.25, 0.1, 0.75, 0.4)
  seen = set()
  for values in itertools.product((False, True), repeat=3):
    orientation = transforms.Orientation(*values)
    upright = transforms.turn(picture, orientation)
    before = transforms.turn_back(box, orientation)
    np.testing.assert_allclose(transforms.turn_box(before, orientation), box)
    np.testing.assert_array_equal(
      transforms.turn(_cut(picture, before), orientation), _cut(upright, box)
    )
    seen.add(upright.tobytes() + bytes(upright.shape))
  turned = [np.rot90(p, k) for k in range(4) for p in (picture, picture.T)]
  assert seen == {p.tobytes() + bytes(p.shape) for p in turned}


def _cut(picture, box):
  height, width = picture.shape
  top, left, bottom, right = box
  return picture[
    round(top * height) : round(bottom * height),
    round(left * width) : round(right * width),
  ]
