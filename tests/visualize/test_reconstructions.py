import jax.numpy as jnp
import numpy as np
import pytest

from vssl_jax import losses
from vssl_jax.masks import sampling
from vssl_jax.utils import image_grid
from vssl_jax.visualize import reconstructions

PATCH = (2, 4, 4)
SHAPE = (2, 4, 8, 8, 3)  # a grid of 2 x 2 x 2


@pytest.fixture
def clips():
  rng = np.random.default_rng(0)
  # No GREY and no DARK among them, so that a hidden pixel cannot pass.
  return rng.integers(150, 256, SHAPE, dtype=np.uint8)


@pytest.fixture
def mask():
  visible = jnp.asarray([[0, 5], [3, 6]], jnp.int32)
  masked = jnp.asarray([[1, 2, 7], [0, 1, 2]], jnp.int32)
  return sampling.Mask(visible, masked)


def _box(token):
  """Slices of a token's pixels, by hand."""
  t, y, x = token // 4, token // 2 % 2, token % 2
  return np.s_[2 * t : 2 * t + 2, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]


def test_hidden_patches_are_grey_and_visible_ones_keep_their_pixels(
  clips, mask
):
  seen = reconstructions.masked(clips, mask, PATCH)
  for i in range(2):
    for token in range(8):
      found = seen[i][_box(token)]
      if token in mask.visible[i]:
        np.testing.assert_array_equal(found, clips[i][_box(token)])
      elif token in mask.masked[i]:
        assert (found == reconstructions.GREY).all()
      else:
        assert (found == reconstructions.DARK).all()


def test_join_undoes_cut_and_cut_agrees_with_the_loss(clips):
  patches = reconstructions.cut(clips, PATCH)
  np.testing.assert_array_equal(
    reconstructions.join(patches, PATCH, SHAPE), clips
  )
  np.testing.assert_array_equal(
    patches, losses.patchify(jnp.asarray(clips, jnp.float32), PATCH)
  )


@pytest.mark.parametrize('kind', sorted(losses.PIXEL_NORMS))
def test_a_perfect_prediction_is_the_input(clips, mask, kind):
  clips[0, :2, :4, 4:] = 77  # flat: the deviation is 0
  video = jnp.asarray(clips, jnp.float32) / 255
  target = losses.pixel_targets(video, PATCH, kind)
  predicted = np.asarray(sampling.gather(target, mask.masked))
  made = reconstructions.reconstructed(clips, mask, predicted, kind, PATCH)
  seen = reconstructions.masked(clips, mask, PATCH)
  for i in range(2):
    for token in range(8):
      known = token in mask.visible[i] or token in mask.masked[i]
      wanted = clips if known else seen
      np.testing.assert_array_equal(
        made[i][_box(token)], wanted[i][_box(token)], err_msg=f'{i}, {token}'
      )


def test_a_wrong_prediction_shows(clips, mask):
  zeros = np.zeros((2, 3, 2 * 4 * 4 * 3), np.float32)
  made = reconstructions.reconstructed(clips, mask, zeros, 'none', PATCH)
  assert (made[0][_box(7)] == 0).all()


def test_an_unknown_normalisation_is_an_error(clips, mask):
  zeros = np.zeros((2, 3, 2 * 4 * 4 * 3), np.float32)
  with pytest.raises(ValueError, match="'dct', wanted one of"):
    reconstructions.reconstructed(clips, mask, zeros, 'dct', PATCH)


def test_grey_clips_have_three_channels(clips):
  assert image_grid.rgb(clips[..., :1]).shape == clips.shape


def test_patches_are_as_bright_as_their_scores(clips):
  scores = np.float32([[0, 2, 4, 1, 3, 3, 0, 0], [0] * 8])
  found = reconstructions.lit(clips, scores, PATCH)
  wanted = [0, 0.5, 1, 0.25, 1, 1, 0, 0]  # over the highest of a time step
  for token, light in enumerate(wanted):
    box = clips[0][_box(token)]
    np.testing.assert_allclose(found[0][_box(token)], light * box, atol=0.51)
  assert not found[1].any()
