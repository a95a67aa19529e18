"""Clips with depth: what is cut, which measurement is taken, what is masked."""

import json

import numpy as np
import pytest
from PIL import Image

from vssl_jax.data import options, pipeline
from vssl_jax.data.clips import clip_spec, decode, rgbd

T, HEIGHT, WIDTH = 6, 12, 16


def picture(number, height=HEIGHT, width=WIDTH):
  """Depth that says where it is: frame, row and column in one number."""
  y, x = np.mgrid[:height, :width]
  return (1000 + 2000 * number + 40 * y + x).astype(np.uint16)


def write(folder, *, shape=(HEIGHT, WIDTH), depth=picture, frames=T):
  """A scene whose colour is its column (red), row (green) and frame (blue)."""
  for kind in ('color', 'depth'):
    (folder / kind).mkdir(parents=True, exist_ok=True)
  y, x = np.mgrid[: shape[0], : shape[1]]
  for number in range(frames):
    scale = 10 * HEIGHT // shape[0]
    colour = np.stack([scale * x, scale * y, np.full_like(x, 40 * number)], -1)
    colour = Image.fromarray(colour.astype(np.uint8))
    colour.save(folder / 'color' / f'{number}.png')
    Image.fromarray(depth(number)).save(folder / 'depth' / f'{number}.png')
  return folder


def media(folder, frames=T):
  names = {'colour': 'color', 'depth': 'depth'}
  return json.dumps(
    {'folder': str(folder)}
    | {k: [f'{v}/{i}.png' for i in range(frames)] for k, v in names.items()}
  )


def spec(**kwargs):
  fields = dict(frames=2, stride=2, height=HEIGHT, width=WIDTH, crop='centre')
  fields |= dict(depth_units=1000.0, depth_range=(0.1, 60.0), flip=False)
  return clip_spec.Spec(**{**fields, **kwargs})


def read(folder, frames=T, entropy=(0,), **kwargs):
  wanted = spec(**kwargs)
  found = rgbd.read(media(folder, frames), wanted, entropy)
  return *rgbd.split(found.video, wanted), found


def test_whole_frames_come_back_as_they_are(tmp_path):
  video, depth, found = read(
    write(tmp_path), frames=T, sampling='spread', segments=2
  )
  assert video.shape == (2, 2, HEIGHT, WIDTH, 3)
  assert depth.shape == video.shape[:-1]
  # 0, 2, 4 make the list; windows of two of them start at 0 and at 2.
  for c, t, number in ((0, 0, 0), (0, 1, 2), (1, 0, 2), (1, 1, 4)):
    np.testing.assert_allclose(depth[c, t], picture(number) / 1000, rtol=1e-6)
    np.testing.assert_allclose(video[c, t, :, :, 0], 10 * _columns(), atol=1)
    np.testing.assert_allclose(video[c, t, ..., 2], 40 * number, atol=1)
  np.testing.assert_array_equal(found.crop, [[0, 0, 1, 1]] * 2)
  assert not found.short


def _columns():
  return np.broadcast_to(np.arange(WIDTH), (HEIGHT, WIDTH))


def test_depth_is_the_nearest_measurement_and_never_a_mean(tmp_path):
  step = lambda number: np.where(picture(0) % 40 < 8, 1000, 3000).astype(
    np.uint16
  )
  folder = write(tmp_path, depth=step)
  _, depth, _ = read(folder, height=9, width=7)
  assert set(np.unique(depth)) == {np.float32(1), np.float32(3)}
  # Twice as large: each measurement four times.
  _, depth, _ = read(folder, height=2 * HEIGHT, width=2 * WIDTH)
  wanted = np.kron(step(0) / 1000, np.ones((2, 2)))
  np.testing.assert_allclose(depth[0, 0], wanted)


@pytest.mark.parametrize('shape', [(HEIGHT, WIDTH), (2 * HEIGHT, 2 * WIDTH)])
def test_both_are_cut_by_one_box_and_flipped_together(shape, tmp_path):
  folder = write(tmp_path, shape=shape)
  factor, seen = shape[0] // HEIGHT, set()
  for seed in range(12):
    video, depth, found = read(
      folder,
      entropy=(seed,),
      crop='random_resized',
      crop_scale=(0.4, 0.6),
      crop_aspect=(1.3, 1.4),
      flip=True,
    )
    seen.add(bool(found.flipped[0]))
    at = np.round(1000 * depth[0, 0]) % 2000 - 1000 % 2000
    column, row = at % 40, at // 40
    # Colour knows the column and the row that it comes from, in a finer grid
    # where it is larger.
    red, green = (
      video[0, 0, ..., i] / 10 + 0.5 / factor - 0.5 for i in range(2)
    )
    inner = np.s_[1:-1, 1:-1]
    assert np.abs(red - column)[inner].max() < 1.01
    assert np.abs(green - row)[inner].max() < 1.01
  assert seen == {True, False}


def test_what_was_not_measured_is_0(tmp_path):
  def holes(number):
    depth = np.full((HEIGHT, WIDTH), 2000, np.uint16)
    depth[0, :5] = (0, 65535, 99, 100, 60001)
    return depth

  _, depth, _ = read(write(tmp_path, depth=holes))
  np.testing.assert_allclose(depth[0, 0, 0, :6], [0, 0, 0, 0.1, 0, 2.0])
  wanted = spec(depth_units=5000.0, depth_range=(0.1, 100.0))
  stored = rgbd.read(media(tmp_path), wanted, (0,)).video
  _, depth = rgbd.split(stored, wanted)
  assert depth[0, 0, 0, 4] == np.float32(60001 / 5000)
  assert depth[0, 0, 0, 1] == 0  # 13 m in these units, and still nothing


def test_short_scenes_repeat_their_last_frame(tmp_path):
  video, _, found = read(write(tmp_path, frames=3), frames=3, stride=4)
  assert found.short
  np.testing.assert_array_equal(video[0, 0], video[0, 1])
  with pytest.raises(decode.VideoError, match='3 frames, wanted 5'):
    read(tmp_path, frames=3, min_frames=5)


def test_errors_name_the_file(tmp_path):
  folder = write(tmp_path / 'a')
  (folder / 'color/2.png').write_bytes(b'no picture')
  with pytest.raises(decode.VideoError, match=r'color/2\.png: cannot be open'):
    read(folder, sampling='spread')
  folder = write(tmp_path / 'b')
  Image.new('L', (WIDTH, HEIGHT)).save(folder / 'depth/2.png')
  with pytest.raises(decode.VideoError, match=r'depth/2\.png: .*16-bit grey'):
    read(folder, sampling='spread')
  folder = write(tmp_path / 'c', depth=lambda n: picture(n, 16, 12))
  with pytest.raises(decode.VideoError, match='12x16 does not match'):
    read(folder)


def test_units_without_a_clock():
  with pytest.raises(ValueError, match='depth_units is 1000'):
    spec(fps=5, stride=1)
  with pytest.raises(ValueError, match='depth_units is -1'):
    spec(depth_units=-1)
  assert spec().stored == (2, HEIGHT, WIDTH, 5)
  assert spec(depth_units=0).stored == (2, HEIGHT, WIDTH, 3)


@pytest.fixture
def config(tmp_path):
  for number in range(4):
    write(tmp_path / f's{number}')
  c = options.default()
  c.source, c.depth_units = str(tmp_path), 1000.0
  c.frames, c.stride, c.size, c.depth_range = 2, 2, (8, 8), (0.1, 60.0)
  c.decode_processes, c.max_bad_fraction = 2, 0.5
  return c


@pytest.mark.parametrize('isolate', [False, True])
def test_batches_carry_depth(isolate, config):
  config.isolate = isolate
  clips = pipeline.make(config, batch_size=4, seed=0)
  batch = next(clips.iterator())
  assert batch['depth'].shape == (4, *clips.shapes['depth']) == (4, 2, 8, 8)
  assert batch['depth'].dtype == np.float32
  assert batch['video'].shape == (4, *clips.shapes['video'])
  # Blue is the frame that a pixel comes from; so is depth.
  np.testing.assert_allclose(
    np.round(batch['video'][..., 2] / 40), (batch['depth'] - 1) // 2, atol=0
  )
  again = next(clips.iterator())
  np.testing.assert_array_equal(batch['depth'], again['depth'])
  clips.close()


def test_a_bad_frame_is_listed_and_its_scene_counts_for_nothing(
  config, tmp_path
):
  (tmp_path / 's1/depth/0.png').write_bytes(b'')
  config.isolate = False
  path = tmp_path / 'out'
  videos = pipeline.evaluation(config, batch_size=4, folder=str(path))
  (batch,) = videos
  np.testing.assert_array_equal(batch['weight'], [1, 0, 1, 1])
  assert (batch['depth'].reshape(4, -1).max(1) > 0).tolist() == [1, 0, 1, 1]
  assert videos.shapes['depth'] == (2, 8, 8)
  listed = json.loads((path / 'bad_files.jsonl').read_text())
  assert listed['file'] == 's1: color/0.png to color/5.png'
  assert 's1/depth/0.png: the file holds 0 bytes' in listed['detail']
