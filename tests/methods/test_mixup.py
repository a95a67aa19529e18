import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssl_jax.methods import mixup

RNG = np.random.default_rng(0)
VIDEO = RNG.integers(0, 256, (6, 2, 10, 14, 3), dtype=np.uint8)
LABEL = np.array([0, 3, 1, 2, 2, 4], np.int32)


def drawn(share, fade=1.0, box=(0, 0, 0, 0)):
  return mixup.Drawn(
    jnp.float32(share), jnp.float32(fade), jnp.array(box, jnp.int32)
  )


def by_hand(kind, share, box):
  """Clip by clip, pixel by pixel, in floats of 0 to 255."""
  out = np.zeros(VIDEO.shape)
  target = np.zeros((6, 5))
  for i in range(6):
    j = 5 - i
    for y in range(10):
      for x in range(14):
        if kind == 'mixup':
          pixel = share * VIDEO[i, :, y, x] + (1 - share) * VIDEO[j, :, y, x]
        else:
          cut = box[0] <= y < box[2] and box[1] <= x < box[3]
          pixel = VIDEO[j if cut else i, :, y, x]
        out[i, :, y, x] = pixel
    for label, part in ((LABEL[i], share), (LABEL[j], 1 - share)):
      target[i] += part * 0.1 / 5
      target[i, label] += part * 0.9
  return out / 255, target


@pytest.mark.parametrize('kind', ['mixup', 'cutmix'])
def test_clips_and_targets_by_hand(kind):
  box, share = (0, 0, 0, 0), 0.3
  if kind == 'cutmix':
    box = (2, 5, 9, 14)
    share = 1 - 7 * 9 / 140
  given = drawn(share, share if kind == 'mixup' else 1.0, box)
  video, target = by_hand(kind, share, box)
  np.testing.assert_allclose(
    mixup.blend(jnp.asarray(VIDEO), given), video, atol=1e-6
  )
  found = mixup.targets(jnp.asarray(LABEL), 5, 0.1, given)
  np.testing.assert_allclose(found, target, atol=1e-6)
  np.testing.assert_allclose(np.sum(found, axis=1), 1, atol=1e-6)


def test_the_box_is_that_of_cutmix():
  """rand_bbox of the paper's code, in numpy."""
  for share in (0.0, 0.2, 0.5, 0.93, 1.0):
    side = np.sqrt(np.float32(1 - share))
    half_h, half_w = int(10 * side) // 2, int(14 * side) // 2
    for y in range(10):
      for x in range(14):
        wanted = [
          *np.clip([y - half_h], 0, 10),
          *np.clip([x - half_w], 0, 14),
          *np.clip([y + half_h], 0, 10),
          *np.clip([x + half_w], 0, 14),
        ]
        if y in (0, 4, 9) and x in (0, 7, 13):
          found = mixup._box(
            jnp.float32(share), jnp.int32(y), jnp.int32(x), 10, 14
          )
          np.testing.assert_array_equal(found, wanted)


def many(mix, count=2000):
  keys = jax.random.split(jax.random.key(0), count)
  return jax.vmap(lambda key: mixup.draw(mix, key, 10, 14))(keys)


def test_what_is_drawn_has_the_right_frequencies():
  found = jax.tree.map(np.asarray, many(mixup.Mix()))
  area = (found.box[:, 2] - found.box[:, 0]) * (
    found.box[:, 3] - found.box[:, 1]
  )
  cut = (area > 0) | (found.fade != found.share)
  assert abs(cut.mean() - 0.5) < 0.04
  np.testing.assert_allclose(found.share[cut], 1 - area[cut] / 140, atol=1e-6)
  np.testing.assert_array_equal(found.fade[cut], 1)
  mixed = ~cut
  np.testing.assert_array_equal(found.fade[mixed], found.share[mixed])
  # Beta(.8, .8): mean 1/2, variance 1 / (4 * 2.6).
  assert abs(found.share[mixed].mean() - 0.5) < 0.03
  assert abs(found.share[mixed].var() - 1 / 10.4) < 0.01
  # Different in every step.
  assert len(np.unique(found.share)) > 1000


@pytest.mark.parametrize(
  ('fields', 'mixed', 'cut'),
  [
    ({'mixup': 0.0, 'cutmix': 0.0}, 0.0, 0.0),
    ({'probability': 0.0}, 0.0, 0.0),
    ({'cutmix': 0.0}, 1.0, 0.0),
    ({'mixup': 0.0}, 0.0, 1.0),
    ({'probability': 0.4, 'cutmix': 0.0}, 0.4, 0.0),
  ],
)
def test_what_is_off_is_not_drawn(fields, mixed, cut):
  found = jax.tree.map(np.asarray, many(mixup.Mix(**fields), 500))
  assert abs((found.fade < 1).mean() - mixed) < 0.07
  # A small share may leave a box without a pixel.
  boxes = (found.box[:, 2:] > found.box[:, :2]).all(axis=1).mean()
  assert 0.8 * cut <= boxes <= cut
  if not mixed and not cut:
    same = mixup.blend(jnp.asarray(VIDEO), jax.tree.map(lambda x: x[0], found))
    np.testing.assert_allclose(same, VIDEO / 255.0, atol=1e-7)


def test_clips_beside_an_unknown_class_are_left_out():
  label = jnp.array([0, -1, 2, 3, 4, 1])
  for share, wanted in ((0.5, [1, 0, 1, 1, 0, 1]), (1.0, [1, 0, 1, 1, 1, 1])):
    drawn = mixup.Drawn(jnp.float32(share), jnp.float32(share), jnp.zeros(4))
    np.testing.assert_array_equal(mixup.known(label, drawn), wanted)


@pytest.mark.parametrize('name', ['mixup', 'switch', 'smoothing'])
def test_wrong_knobs_are_named(name):
  with pytest.raises(ValueError, match=rf'method\.{name}: found -1'):
    mixup.Mix(**{name: -1.0})
