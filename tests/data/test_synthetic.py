import csv
import hashlib

import av
import numpy as np
import pytest

from vssl_jax.data.tools import synthetic

PLAIN = {
  'background': 0.0,
  'texture': 0.0,
  'shake': 0.0,
  'shapes': 1,
  'radius': (5.0, 7.0),
}
CLASSES = len(synthetic.MOTIONS)


def decode(file):
  with av.open(str(file)) as container:
    frames = container.decode(video=0)
    return np.stack([frame.to_ndarray(format='rgb24') for frame in frames])


def rows_of(folder):
  with (folder / 'labels.csv').open(newline='') as file:
    return list(csv.DictReader(file))


def digest(folder):
  total = hashlib.sha256()
  for row in rows_of(folder):
    total.update(row['path'].encode() + decode(folder / row['path']).tobytes())
  return total.hexdigest()


def grey(videos):
  return np.asarray(videos, np.float32).mean(-1)


def clips(count, split, **scene):
  scene = synthetic.Scene(**scene)
  labels = np.arange(count) % CLASSES
  videos = [
    synthetic.clip(synthetic.MOTIONS[label], scene, 0, split, index)
    for index, label in enumerate(labels)
  ]
  return np.stack(videos), labels


def places(video):
  """Where the one shape is, [T, 2] in radians of the wrapped world."""
  waves = np.fft.fft2(grey(video) - grey(video).min())
  return np.angle(np.stack([waves[:, 0, -1], waves[:, -1, 0]], -1))


def steps(video):
  """Its displacement from frame to frame, [T-1, 2] pixels."""
  turned = np.diff(places(video), axis=0)
  wrapped = (turned + np.pi) % (2 * np.pi) - np.pi
  return wrapped * video.shape[1] / (2 * np.pi)


def tilts(video):
  """Angle of the long axis in each frame, radians modulo pi."""
  size = video.shape[1]
  angles = []
  for frame, place in zip(grey(video), places(video), strict=True):
    shift = size // 2 - np.round(place * size / (2 * np.pi)).astype(int)
    mass = np.roll(frame - frame.min(), shift[::-1], (0, 1))
    y, x = np.mgrid[:size, :size].astype(float)
    x, y = (a - (mass * a).sum() / mass.sum() for a in (x, y))
    xx, yy, xy = ((mass * a).sum() for a in (x * x, y * y, x * y))
    angles.append(np.arctan2(2 * xy, xx - yy) / 2)
  return np.array(angles)


def test_same_seed_same_files_other_seed_other_files(tmp_path):
  for name, seed in (('a', 3), ('b', 3), ('c', 4)):
    synthetic.write(tmp_path / name, clips=12, seed=seed, size=16, frames=4)
  assert digest(tmp_path / 'a') == digest(tmp_path / 'b')
  assert digest(tmp_path / 'a') != digest(tmp_path / 'c')


def test_label_list_folders_and_balance(tmp_path):
  labels = synthetic.write(
    tmp_path, clips={'train': 30, 'test': 20}, size=16, frames=4, fps=5
  )
  assert labels == tmp_path / 'labels.csv'
  rows = rows_of(tmp_path)
  assert list(rows[0]) == ['path', 'label', 'split']
  for split, each in (('train', 3), ('test', 2)):
    found = [row['label'] for row in rows if row['split'] == split]
    assert {m: found.count(m) for m in found} == dict.fromkeys(
      synthetic.MOTIONS, each
    )
  for row in rows:
    split, motion, _ = row['path'].split('/')
    assert (split, motion) == (row['split'], row['label'])
  with av.open(str(tmp_path / rows[0]['path'])) as container:
    assert container.streams.video[0].average_rate == 5
    assert container.streams.video[0].codec_context.name == 'h264'


def test_splits_share_no_clip():
  scene = synthetic.Scene()
  train, test = (
    synthetic.clip('right', scene, 0, split, 0) for split in ('train', 'test')
  )
  assert np.abs(grey(train) - grey(test)).mean() > 5


def test_files_keep_what_was_drawn(tmp_path):
  synthetic.write(tmp_path, clips=CLASSES, seed=1)
  for index, row in enumerate(rows_of(tmp_path)):
    drawn = synthetic.clip(row['label'], synthetic.Scene(), 1, 'train', index)
    found = decode(tmp_path / row['path'])
    assert found.shape == (8, 32, 32, 3)
    assert np.abs(grey(found) - grey(drawn)).mean() < 2  # Of 255.


def one_frame_accuracy(train, test):
  """Of a linear classifier of the pixels of one frame."""
  (x, y), (x_test, y_test) = train, test
  x, x_test = (a.reshape(len(a), -1) for a in (x, x_test))
  mean, scale = x.mean(0), x.std(0) + 1
  x, x_test = (x - mean) / scale, (x_test - mean) / scale
  gram = x @ x.T + 1e3 * np.eye(len(x))
  weights = x.T @ np.linalg.solve(gram, np.eye(CLASSES)[y] - 1 / CLASSES)
  return np.mean((x_test @ weights).argmax(1) == y_test)


@pytest.mark.slow
def test_no_single_frame_gives_the_class_away():
  train, labels = clips(1000, 'train')
  test, answers = clips(600, 'test')
  limit = 1 / CLASSES + 4 * np.sqrt(0.09 / 600)
  for frame in (0, 4, 7):
    accuracy = one_frame_accuracy(
      (grey(train)[:, frame], labels), (grey(test)[:, frame], answers)
    )
    assert accuracy < limit, f'frame {frame}'
  # The same classifier does see a class that stands a little to one side.
  ramp = np.linspace(-12, 12, 32)
  train, test = (
    grey(v)[:, 0] + ramp * (a == 0)[:, None, None]
    for v, a in ((train, labels), (test, answers))
  )
  assert one_frame_accuracy((train, labels), (test, answers)) > limit


@pytest.mark.parametrize(
  ('motion', 'direction'),
  [('right', (1, 0)), ('left', (-1, 0)), ('down', (0, 1)), ('up', (0, -1))],
)
def test_straight_paths(motion, direction):
  scene = synthetic.Scene(speed=(2.0, 2.0), **PLAIN)
  for index in range(5):
    moved = steps(synthetic.clip(motion, scene, 0, 'train', index))
    np.testing.assert_allclose(moved, [np.multiply(2, direction)] * 7, atol=0.2)


@pytest.mark.parametrize(
  ('motion', 'sign'), [('clockwise', 1), ('anticlockwise', -1)]
)
def test_turning_on_the_spot(motion, sign):
  scene = synthetic.Scene(turn=(20.0, 20.0), **PLAIN)
  for index in range(5):
    video = synthetic.clip(motion, scene, 0, 'train', index)
    np.testing.assert_allclose(steps(video), 0, atol=0.3)
    turned = np.diff(tilts(video))
    turned = (turned + np.pi / 2) % np.pi - np.pi / 2
    np.testing.assert_allclose(np.rad2deg(turned), sign * 20, atol=6)


@pytest.mark.parametrize(
  ('motion', 'sign'), [('orbit_clockwise', 1), ('orbit_anticlockwise', -1)]
)
def test_orbits_bend_one_way_at_constant_speed(motion, sign):
  scene = synthetic.Scene(speed=(3.0, 3.0), period=(8.0, 8.0), **PLAIN)
  chord = 2 * 3.0 / (2 * np.pi / 8) * np.sin(np.pi / 8)
  for index in range(5):
    moved = steps(synthetic.clip(motion, scene, 0, 'train', index))
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), chord, atol=0.3)
    a, b = moved[:-1], moved[1:]
    bend = np.arcsin((a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]) / chord**2)
    np.testing.assert_allclose(np.rad2deg(bend), sign * 45, atol=12)


@pytest.mark.parametrize(('motion', 'axis'), [('sway', 0), ('bob', 1)])
def test_swings_stay_on_their_axis_and_come_back(motion, axis):
  scene = synthetic.Scene(frames=9, period=(8.0, 8.0), **PLAIN)
  for index in range(5):
    moved = steps(synthetic.clip(motion, scene, 0, 'train', index))
    np.testing.assert_allclose(moved[:, 1 - axis], 0, atol=0.2)
    np.testing.assert_allclose(moved[:, axis].sum(), 0, atol=0.3)
    assert np.abs(moved[:, axis]).sum() > 8


def test_shake_moves_the_background_and_flicker_the_brightness():
  look = {'background': 0.2, 'contrast': (0.0, 0.0), 'texture': 0.0}
  still = synthetic.clip(
    'right', synthetic.Scene(shake=0.0, shapes=0, **look), 0, 'train', 0
  )
  assert (still == still[0]).all()
  shaken = synthetic.clip(
    'right', synthetic.Scene(shake=1.0, shapes=0, **look), 0, 'train', 0
  )
  assert np.abs(np.diff(grey(shaken), axis=0)).mean() > 2
  lit = synthetic.clip(
    'right',
    synthetic.Scene(shake=0.0, shapes=0, flicker=0.05, **look),
    0,
    'train',
    0,
  )
  change = np.diff(grey(lit), axis=0)
  assert np.abs(change).mean() > 2
  assert change.std((1, 2)).max() < 1


def test_all_shapes_share_the_motion():
  scene = synthetic.Scene(speed=(2.0, 2.0), **{**PLAIN, 'shapes': 3})
  video = grey(synthetic.clip('right', scene, 0, 'train', 0))
  # Two pixels a frame: every frame is the first, moved; all three are there.
  for number, frame in enumerate(video):
    moved = np.roll(video[0], 2 * number, axis=1)
    np.testing.assert_allclose(frame, moved, atol=1)
  still = synthetic.Scene(**{**PLAIN, 'shapes': 0, 'distractors': 2})
  video = synthetic.clip('right', still, 0, 'train', 0)
  assert (video == video[0]).all()
  assert video.std() > 5


def test_polarity():
  for polarity, signs in (('bright', {1}), ('dark', {-1}), ('both', {1, -1})):
    scene = synthetic.Scene(polarity=polarity, **PLAIN)
    found = set()
    for index in range(20):
      frame = grey(synthetic.clip('up', scene, 0, 'train', index))[0]
      far = frame - np.median(frame)
      found.add(int(np.sign(far.flat[np.abs(far).argmax()])))
    assert found == signs


def test_an_unfinished_folder_is_made_again(tmp_path):
  make = {'clips': 10, 'size': 16, 'frames': 4}
  synthetic.write(tmp_path, **make)
  before = digest(tmp_path)
  stray = tmp_path / 'train' / 'right' / 'stray.mp4'
  stray.write_bytes(b'half')
  (tmp_path / rows_of(tmp_path)[3]['path']).write_bytes(b'half')
  (tmp_path / 'labels.csv').unlink()
  with pytest.raises(ValueError, match=r'holds train/right/stray\.mp4, which'):
    synthetic.write(tmp_path, **make)
  stray.rename(tmp_path.with_name('mine.mp4'))  # never removed for the user
  synthetic.write(tmp_path, **make)
  assert digest(tmp_path) == before


def test_a_recipe_that_is_corrupt_is_named(tmp_path):
  make = {'clips': 10, 'size': 16, 'frames': 4}
  synthetic.write(tmp_path, **make)
  for content in ('', '{"version": ', '\0\0'):
    (tmp_path / 'recipe.json').write_text(content)
    with pytest.raises(ValueError, match=r'recipe\.json is corrupt'):
      synthetic.write(tmp_path, **make)


def test_a_finished_folder_is_left_alone(tmp_path):
  make = {'clips': 10, 'size': 16, 'frames': 4}
  synthetic.write(tmp_path, **make)
  file = tmp_path / rows_of(tmp_path)[0]['path']
  file.write_bytes(b'mine')
  synthetic.write(tmp_path, **make)
  assert file.read_bytes() == b'mine'


def test_another_recipe_or_other_files_are_refused(tmp_path):
  synthetic.write(tmp_path / 'a', clips=2, size=16, frames=4)
  with pytest.raises(ValueError, match='frames=4, wanted 5'):
    synthetic.write(tmp_path / 'a', clips=2, size=16, frames=5)
  (tmp_path / 'b').mkdir()
  (tmp_path / 'b' / 'letter.txt').write_text('keep me')
  with pytest.raises(ValueError, match='not generated here'):
    synthetic.write(tmp_path / 'b', clips=2, size=16, frames=4)
  assert (tmp_path / 'b' / 'letter.txt').read_text() == 'keep me'


def test_wrong_scenes_are_refused():
  with pytest.raises(ValueError, match='size=31'):
    synthetic.Scene(size=31)
  with pytest.raises(ValueError, match="polarity='grey'"):
    synthetic.Scene(polarity='grey')
  with pytest.raises(ValueError, match=r"'zigzag'.*right"):
    synthetic.path('zigzag', synthetic.Scene(), np.random.default_rng(0))
