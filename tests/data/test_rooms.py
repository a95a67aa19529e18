"""Generated rooms: the depth in the files is the depth of the geometry."""

import numpy as np
from PIL import Image

from vssl_jax.data import options, pipeline
from vssl_jax.data.tools import generated_rooms

LOOK = generated_rooms.Look(height=24, width=32, frames=5, missing=0.1)


def test_the_middle_of_a_room_in_hand_numbers():
  half = np.asarray([2.0, 1.25, 3.0])
  toward = np.asarray([[[0, 0, 1], [1, 0, 1], [0, -1, 0.1]]], float)
  reach, surface = generated_rooms.walls(np.zeros(3), toward, half)
  # The wall ahead at 3 m; the right one, met at 2 m ahead; the ceiling.
  np.testing.assert_allclose(reach[0], [3, 2, 1.25])
  np.testing.assert_array_equal(surface[0], [5, 1, 2])
  near = generated_rooms.ball(np.zeros(3), toward, np.asarray([0, 0, 2.0]), 0.5)
  np.testing.assert_allclose(near[0], [1.5, np.inf, np.inf])
  behind = generated_rooms.ball(
    np.zeros(3), toward, np.asarray([0, 0, -2.0]), 0.5
  )
  assert np.isinf(behind).all()


def test_rays_have_the_angles_of_the_lens():
  found = generated_rooms.rays(
    generated_rooms.Look(height=2, width=4, focal=0.5)
  )
  np.testing.assert_allclose(found[0, :, 0], [-0.75, -0.25, 0.25, 0.75])
  np.testing.assert_allclose(found[:, 0, 1], [-0.25, 0.25])
  assert (found[..., 2] == 1).all()


def test_frames_agree_with_each_other_through_depth():
  """A pixel carried into the next frame by its depth finds that depth there."""
  look = generated_rooms.Look(
    height=48, width=64, frames=2, balls=0, missing=0.0, turn=0.0, speed=0.1
  )
  for seed in range(3):
    state = np.random.default_rng(seed)
    _, depth = generated_rooms.render(look, state)
    first, second = depth / 1000
    points = generated_rooms.rays(look) * first[..., None]
    best = np.inf
    # The step is not told: some step of this length explains all pixels.
    for angle in np.linspace(0, 2 * np.pi, 72, endpoint=False):
      for up in np.linspace(-0.1, 0.1, 21):
        flat = np.sqrt(max(0.1**2 - up**2, 0))
        step = np.asarray([flat * np.sin(angle), up, flat * np.cos(angle)])
        x, y, z = np.moveaxis(points - step, -1, 0)
        focal = look.focal * look.width
        column = np.floor(focal * x / z + look.width / 2).astype(int)
        row = np.floor(focal * y / z + look.height / 2).astype(int)
        inside = (column >= 0) & (column < 64) & (row >= 0) & (row < 48)
        off = np.abs(second[row[inside], column[inside]] - z[inside])
        best = min(best, np.median(off))
    assert best < 0.012, seed


def test_rooms_are_read_as_they_were_drawn(tmp_path):
  generated_rooms.write(tmp_path, scenes=2, seed=3, look=LOOK)
  video, depth = generated_rooms.render(LOOK, np.random.default_rng([3, 1]))
  config = options.default()
  config.source, config.depth_units = (
    str(tmp_path),
    float(generated_rooms.UNITS),
  )
  config.frames, config.stride, config.size = 5, 1, (24, 32)
  config.isolate, config.decode_processes = False, 1
  (batch,) = pipeline.evaluation(config, batch_size=2)
  np.testing.assert_allclose(batch['depth'][1], depth / 1000, rtol=1e-6)
  np.testing.assert_allclose(batch['video'][1], video, atol=1)
  assert 0.05 < (batch['depth'] == 0).mean() < 0.15
  assert batch['depth'][batch['depth'] > 0].min() > 0.3
  assert (batch['depth'][0] != batch['depth'][1]).mean() > 0.8


def test_the_program_writes_rooms_to_train_and_others_to_test(tmp_path, capsys):
  generated_rooms.main([f'--out={tmp_path}', '--train=2', '--test=1'])
  assert '2 + 1 rooms' in capsys.readouterr().out
  names = ['train/room_0000', 'train/room_0001', 'test/room_0000']
  pictures = [
    np.asarray(Image.open(tmp_path / name / 'depth/000000.png'))
    for name in names
  ]
  assert pictures[0].dtype == np.uint16
  assert (pictures[0] != pictures[2]).any()
  assert (pictures[0] != pictures[1]).any()
