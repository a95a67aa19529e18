import numpy as np

from vssl_jax.visualize import palette


def _tokens(seed=0):
  return np.random.default_rng(seed).normal(size=(16, 6)).astype(np.float32)


def test_identical_frames_have_identical_colours():
  """One basis and one scale: the rest of the clip does not matter."""
  frame, other = _tokens(0), 5 * _tokens(1)
  clip = palette.of_clip(
    np.concatenate([frame, other, frame]), (3, 4, 4), (2, 8, 8)
  )
  assert clip.shape == (6, 32, 32, 3)
  np.testing.assert_array_equal(clip[0], clip[4])
  np.testing.assert_array_equal(clip[0], clip[1])
  assert (clip[0] != clip[2]).any()
  assert len(np.unique(clip[0].reshape(-1, 3), axis=0)) > 8


def test_a_token_has_its_colour_in_every_frame():
  """A basis or a scale per frame would see the frames' other tokens."""
  frames = np.stack([_tokens(0), 5 * _tokens(1), _tokens(2)])
  frames[:, :4] = frames[0, :4]
  clip = palette.of_clip(frames.reshape(48, 6), (3, 4, 4), (1, 2, 2))
  row = clip[:, :2]  # the first four tokens
  np.testing.assert_array_equal(row[0], row[1])
  np.testing.assert_array_equal(row[0], row[2])
  assert (clip[0, 2:] != clip[1, 2:]).any()


def test_the_largest_component_is_red():
  x = np.zeros((50, 8), np.float32)
  x[:, 5] = np.arange(50)
  x[:, 2] = np.tile([0, 1], 25)
  found = palette.of_tokens(x)
  assert (np.diff(found[:, 0].astype(int)) >= 0).all()
  assert found[0, 0] == 0 and found[-1, 0] == 255
  green = found[:, 1].astype(int)
  assert np.abs(np.diff(green)).min() > 200
  assert (found[:, 2] == 128).all()  # nothing is left


def test_features_that_do_not_vary_are_grey():
  found = palette.of_tokens(np.full((9, 4), 3.3, np.float32))
  assert (found == 128).all()


def test_fewer_than_three_channels():
  found = palette.of_tokens(_tokens()[:, :2])
  assert (found[:, 2] == 128).all() and found[:, :2].std() > 10
