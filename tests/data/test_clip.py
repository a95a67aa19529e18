"""Clips: the right frames, the right pixels, a pure function."""

import dataclasses
import io
import itertools

import numpy as np
import pytest

from vssl_jax.data import options, pipeline
from vssl_jax.data.clips import clip_spec, decode
from vssl_jax.data.tools import transcode

SPEC = clip_spec.Spec(
  frames=4, stride=3, height=24, width=32, crop='centre', flip=False
)


def ramp(number, height, width):
  """Grows to the right in red and downwards in green."""
  y, x = np.mgrid[:height, :width]
  blue = np.full_like(x, 128)
  return np.stack([30 + 2 * x, 40 + 3 * y, blue], -1).astype(np.uint8)


@pytest.fixture(scope='module')
def grey(tmp_path_factory, film):
  return film(tmp_path_factory.mktemp('clip') / 'x.mp4')


@pytest.fixture(scope='module')
def slope(tmp_path_factory, film):
  path = tmp_path_factory.mktemp('clip') / 'x.mkv'
  return film(path, frames=8, codec='ffv1', pix_fmt='bgr0', picture=ramp)


def test_a_clip_is_a_window_at_the_stride(grey, numbered):
  starts = set()
  for seed in range(60):
    numbers = numbered(clip_spec.read(grey, SPEC, [seed]).video[0])
    assert np.diff(numbers).tolist() == [3, 3, 3]
    starts.add(int(numbers[0]))
  assert min(starts) < 4 and max(starts) > 33 and max(starts) <= 38


def test_scaling_keeps_the_brightness(grey):
  spec = dataclasses.replace(SPEC, frames=48, stride=1)
  levels = clip_spec.read(grey, spec, [0]).video[0].mean(axis=(1, 2, 3))
  errors = levels - (20 + 4 * np.arange(48))
  assert abs(errors.mean()) < 0.4 and np.abs(errors).max() <= 1


def test_the_same_seeds_give_the_same_clip(grey):
  spec = dataclasses.replace(SPEC, crop='random_resized', flip=True)
  one, two = (clip_spec.read(grey, spec, [3, 4]) for _ in range(2))
  np.testing.assert_array_equal(one.video, two.video)
  np.testing.assert_array_equal(one.crop, two.crop)
  other = clip_spec.read(grey, spec, [3, 5])
  assert (one.crop != other.crop).any()


def test_the_box_is_the_part_that_is_seen(slope):
  spec = dataclasses.replace(
    SPEC, frames=1, stride=1, crop='random_resized', crop_scale=(0.3, 0.5)
  )
  for seed in range(5):
    found = clip_spec.read(slope, spec, [seed])
    picture, (top, left, bottom, right) = found.video[0, 0], found.crop[0]
    x = (np.arange(32) + 0.5) / 32 * (right - left) * 64 + left * 64 - 0.5
    y = (np.arange(24) + 0.5) / 24 * (bottom - top) * 48 + top * 48 - 0.5
    np.testing.assert_allclose(picture[12, 2:-2, 0], 30 + 2 * x[2:-2], atol=2.5)
    np.testing.assert_allclose(picture[2:-2, 16, 1], 40 + 3 * y[2:-2], atol=2.5)


def test_half_of_the_clips_are_mirrored(slope):
  spec = dataclasses.replace(SPEC, frames=1, stride=1, flip=True)
  plain = clip_spec.read(slope, SPEC, [0]).video[0, 0]
  flips = 0
  for seed in range(40):
    found = clip_spec.read(slope, spec, [seed])
    expected = plain[:, ::-1] if found.flipped[0] else plain
    np.testing.assert_array_equal(found.video[0, 0], expected)
    flips += int(found.flipped[0])
  assert 10 < flips < 30


def test_switching_the_flip_off_moves_no_box(slope):
  on = dataclasses.replace(SPEC, crop='random_resized', flip=True, repeats=3)
  off = dataclasses.replace(on, flip=False)
  one, two = clip_spec.read(slope, on, [8]), clip_spec.read(slope, off, [8])
  np.testing.assert_array_equal(one.crop, two.crop)
  assert not two.flipped.any()


@pytest.mark.parametrize('degrees', [90, 180, 270])
def test_rotated_videos_are_brought_upright(degrees, tmp_path, film):
  import av

  if not hasattr(av.VideoStream, 'set_display_rotation'):
    pytest.skip('this PyAV cannot write rotated videos')
  upright = lambda k, h, w: ramp(k, 48, 64)
  stored = lambda k, h, w: np.rot90(upright(k, h, w), -degrees // 90).copy()
  height, width = stored(0, 0, 0).shape[:2]
  path = film(
    tmp_path / 'x.mp4', frames=6, picture=stored, height=height, width=width,
    rotation=degrees, pix_fmt='yuv444p',
  )  # fmt: skip
  plain = film(tmp_path / 'y.mp4', frames=6, picture=upright, pix_fmt='yuv444p')
  for kind in ('centre', 'random_resized'):
    spec = dataclasses.replace(SPEC, stride=1, crop=kind)
    turned, straight = (
      clip_spec.read(path, spec, [5]),
      clip_spec.read(plain, spec, [5]),
    )
    np.testing.assert_allclose(turned.crop, straight.crop, atol=0.03)
    difference = np.abs(turned.video.astype(int) - straight.video)
    assert difference.mean() < 2.5


def quarters(pixels):
  """Colours of the four quarters of pixels [24, 32, 3], row by row."""
  names = {(1, 0, 0): 'R', (0, 1, 0): 'G', (0, 0, 1): 'B', (1, 1, 1): 'W'}
  return ''.join(
    names.get(tuple((pixels[y, x] > 128).astype(int)), '?')
    for y in (6, 18)
    for x in (8, 24)
  )


def coloured(number, height, width):
  """Red, green; blue, white."""
  picture = np.zeros((height, width, 3), np.uint8)
  picture[: height // 2, : width // 2, 0] = 255
  picture[: height // 2, width // 2 :, 1] = 255
  picture[height // 2 :, : width // 2, 2] = 255
  picture[height // 2 :, width // 2 :] = 255
  return picture


# What the eight orientations of EXIF make of red, green; blue, white.
UPRIGHT = {
  1: 'RGBW', 2: 'GRWB', 3: 'WBGR', 4: 'BWRG',
  5: 'RBGW', 6: 'BRWG', 7: 'WGBR', 8: 'GWRB',
}  # fmt: skip


@pytest.mark.parametrize('ending', ['jpg', 'png', 'webp'])
def test_images_are_turned_and_mirrored_as_exif_says(ending, tmp_path):
  pillow = pytest.importorskip('PIL.Image')
  spec = dataclasses.replace(SPEC, frames=1)
  for orientation, expected in UPRIGHT.items():
    exif = pillow.Exif()
    exif[0x0112] = orientation
    path = str(tmp_path / f'{orientation}.{ending}')
    pillow.fromarray(coloured(0, 48, 64)).save(path, exif=exif)
    assert quarters(clip_spec.read(path, spec, [0]).video[0, 0]) == expected


def test_videos_are_turned_and_mirrored_as_their_matrix_says(tmp_path, film):
  import av

  turns = [(d, h) for d in (0, 90, 180, 270) for h in (False, True)]
  spec = dataclasses.replace(SPEC, stride=1)
  seen = {}
  for degrees, mirror in turns:
    path = film(
      tmp_path / f'{degrees}{mirror}.mp4', frames=4, picture=coloured,
      rotation=degrees, mirror=mirror,
    )  # fmt: skip
    expected = coloured(0, 48, 64)
    expected = np.rot90(expected, degrees // 90)
    expected = expected[:, ::-1] if mirror else expected
    height, width = expected.shape[:2]
    found = quarters(clip_spec.read(path, spec, [0]).video[0, 0])
    y, x = np.arange(24) * height // 24, np.arange(32) * width // 32
    assert found == quarters(expected[y][:, x]), (degrees, mirror)
    content = transcode.transcode(path, transcode.Target(quality=1))
    assert quarters(clip_spec.read(content, spec, [0]).video[0, 0]) == found
    with av.open(io.BytesIO(content)) as container:
      assert not next(container.decode(video=0)).rotation
    seen[found] = degrees, mirror
  assert len(seen) == 8


@pytest.mark.parametrize('form', ['yuv420p', 'yuv422p', 'yuv410p', 'gray'])
@pytest.mark.parametrize('size', [(1, 1), (1, 64), (64, 1), (2, 64), (3, 5)])
def test_thin_pictures_are_cut(size, form):
  import av

  frame = av.VideoFrame(*size[::-1], form)
  for plane in frame.planes:
    plane.update(bytes([128]) * plane.buffer_size)
  for kind, seed in itertools.product(clip_spec.CROPS, range(8)):
    spec = dataclasses.replace(SPEC, crop=kind)
    (plan,) = clip_spec.plans(size, spec, np.random.default_rng(seed))
    out = np.zeros((24, 32, 3), np.uint8)
    clip_spec.Cutter(*plan, spec).cut(frame, out)
    np.testing.assert_allclose(out, 130, atol=2)


def test_pictures_that_cannot_be_cut_are_bad_files(monkeypatch, grey):
  monkeypatch.setattr(clip_spec, '_pixels', lambda *args: (0, 0, 9999, 9999))
  with pytest.raises(decode.VideoError, match='cannot be cropped') as caught:
    clip_spec.read(grey, SPEC, [0])
  assert caught.value.reason == 'undecodable'


def test_odd_sizes_and_few_colours(tmp_path, film):
  for number, (height, width, form) in enumerate(
    [(131, 97, 'yuv444p'), (2, 2, 'yuv420p'), (720, 16, 'yuv420p'),
     (48, 64, 'gray')]
  ):  # fmt: skip
    path = film(
      tmp_path / f'{number}.mp4', frames=6, height=height, width=width,
      pix_fmt=form,
    )  # fmt: skip
    spec = dataclasses.replace(SPEC, stride=1, crop='random_resized')
    for channels in (1, 3):
      spec = dataclasses.replace(spec, channels=channels)
      found = clip_spec.read(path, spec, [1])
      assert found.video.shape == (1, 4, 24, 32, channels)
      assert 8 < found.video.mean() < 45
      assert (found.crop[:, 2:] > found.crop[:, :2]).all()


def test_repeats_share_frames_or_have_their_own(grey, numbered):
  spec = dataclasses.replace(SPEC, crop='random_resized', repeats=4)
  shared = dataclasses.replace(spec, repeat_frames='shared')
  numbers = numbered(clip_spec.read(grey, shared, [1]).video)
  assert (numbers == numbers[:1]).all()
  found = clip_spec.read(grey, spec, [1])
  assert len({tuple(row) for row in numbered(found.video)}) > 1
  assert len({tuple(box) for box in found.crop.tolist()}) == 4


def test_parts_walk_through_the_video(grey, numbered):
  spec = dataclasses.replace(SPEC, sampling='parts', repeats=3)
  starts = numbered(clip_spec.read(grey, spec, [1]).video)[:, 0]
  assert (starts // 16).tolist() == [0, 1, 2]


def test_evaluation_clips_are_ordered_by_view_then_segment(
  slope, grey, numbered
):
  spec = clip_spec.Spec(
    frames=2, stride=2, height=48, width=48, sampling='spread', segments=3,
    views=2,
  )  # fmt: skip
  numbers = numbered(clip_spec.read(grey, spec, []).video)
  assert numbers[:, 0].tolist() == [0, 22, 44] * 2
  found = clip_spec.read(slope, spec, [])
  np.testing.assert_allclose(
    found.crop[:, 1] * 64, [0, 0, 0, 16, 16, 16], atol=1e-4
  )
  assert found.short is False


def test_short_clips_say_so_and_can_be_refused(tmp_path, film):
  path = film(tmp_path / 'x.mp4', frames=3)
  assert clip_spec.read(path, SPEC, [0]).short
  spec = dataclasses.replace(SPEC, min_frames=4)
  with pytest.raises(decode.VideoError, match='3 frames, wanted 4'):
    clip_spec.read(path, spec, [0])


def test_settings_that_make_no_sense_are_named():
  with pytest.raises(ValueError, match=r'data\.crop is .round'):
    clip_spec.Spec(crop='round')
  with pytest.raises(ValueError, match='not both'):
    clip_spec.Spec(fps=8.0, stride=4)
  with pytest.raises(ValueError, match=r'data\.frames is 0'):
    clip_spec.Spec(frames=0)


# What takes each of `options.FIXED` away.
LOOSE = {
  'sampling': 'window',
  'crop': 'multi_scale',
  'flip': True,
  'auto_augment': 'rand-m7-n4-mstd0.5-inc1',
  'erase': 1.0,
  'repeats': 2,
}


def test_a_video_gives_one_clip_where_nothing_is_left_to_chance(
  tmp_path, film, grey, numbered
):
  def moving(number, height, width):
    return np.roll(ramp(number, height, width), number, 1)

  film(tmp_path / 'x.mkv', codec='ffv1', pix_fmt='bgr0', picture=moving)
  config = options.default()
  config.update(options.FIXED | dict(frames=4, stride=3, size=(24, 32)))
  config.update(dict(source=str(tmp_path), isolate=False, decode_processes=1))
  middle = numbered(clip_spec.read(grey, options.spec(config), [1]).video[0])
  assert middle.tolist() == [19, 22, 25, 28]

  def seen():
    """Clips of the first four epochs."""
    clips = pipeline.make(config, batch_size=config.repeats, seed=0)
    found = [x['video'] for x in itertools.islice(clips.iterator(), 4)]
    clips.close()
    return {video.tobytes() for x in found for video in x}

  assert options.unfixed(config) == {} and len(seen()) == 1
  assert options.FIXED.keys() == LOOSE.keys()
  for key, value in LOOSE.items():
    config.update({**options.FIXED, key: value})
    assert options.unfixed(config) == {key: (value, options.FIXED[key])}
    # Repeats give an example two clips, here the same.
    assert (len(seen()) > 1) == (key != 'repeats'), key
