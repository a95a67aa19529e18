"""RandAugment and random erasing against their definitions, and as promised."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from vssl_jax import config as config_lib
from vssl_jax.data import options, pipeline
from vssl_jax.data.clips import augment, clip_spec

POLICY = 'rand-m7-n4-mstd0.5-inc1'
RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (12, 10, 3), dtype=np.uint8)


def run(name, pixels, strength):
  picture = augment.OPERATIONS[name][0](Image.fromarray(pixels), strength)
  return np.asarray(picture).astype(int)


def luma(pixels):
  """ITU-R 601-2, rounded."""
  return np.round(pixels.astype(float) @ [0.299, 0.587, 0.114])


def blend(degenerate, pixels, factor):
  mixed = degenerate + factor * (pixels.astype(float) - degenerate)
  return np.clip(mixed, 0, 255)


def contrast(pixels, x):
  return blend(np.floor(luma(pixels).mean() + 0.5), pixels, x)


def sharpness(pixels, x):
  """Away from a weighted mean of neighbours; the border stays."""
  smooth = pixels.astype(float)
  kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
  inside = sum(
    kernel[i, j] * pixels[i : i + 10, j : j + 8].astype(float)
    for i in range(3)
    for j in range(3)
  )
  smooth[1:-1, 1:-1] = inside
  return blend(smooth, pixels, x)


def auto_contrast(pixels, _):
  low, high = pixels.min((0, 1)), pixels.max((0, 1))
  return (pixels - low.astype(float)) * 255 / (high - low.astype(float))


def equalize(pixels, _):
  """Each value goes to the share of values below it, as in Pillow's manual."""
  out = np.empty(pixels.shape)
  for channel in range(3):
    counts = np.bincount(pixels[..., channel].ravel(), minlength=256)
    step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
    below = np.cumsum(counts) - counts
    table = np.minimum((step // 2 + below) // step, 255)
    out[..., channel] = table[pixels[..., channel]]
  return out


LARGE = RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)
VALUES = {
  'auto_contrast': (auto_contrast, 0, np.clip(COLOURS, 60, 200), 1),
  'equalize': (equalize, 0, LARGE // 2, 0),
  'invert': (lambda p, _: 255 - p.astype(int), 0, COLOURS, 0),
  'posterize': (lambda p, n: p >> (8 - n) << (8 - n), 2, COLOURS, 0),
  'solarize': (
    lambda p, n: np.where(p < n, p, 255 - p.astype(int)),
    77,
    COLOURS,
    0,
  ),
  'solarize_add': (
    lambda p, n: np.where(p < 128, np.minimum(p.astype(int) + n, 255), p),
    77,
    COLOURS,
    0,
  ),
  'brightness': (lambda p, x: blend(0.0, p, x), 1.63, COLOURS, 1),
  'color': (lambda p, x: blend(luma(p)[..., None], p, x), 0.37, COLOURS, 1),
  'contrast': (contrast, 1.63, COLOURS, 1),
  'sharpness': (sharpness, 0.37, COLOURS, 1.5),  # rounded twice
}


@pytest.mark.parametrize('name', VALUES)
def test_operations_on_values(name):
  definition, strength, pixels, off = VALUES[name]
  found, wanted = run(name, pixels, strength), definition(pixels, strength)
  assert np.abs(found - wanted).max() <= off
  assert np.abs(found - pixels.astype(int)).max() > 5


def turned(degrees):
  """Where the pixel (x, y) of a picture turned counter-clockwise comes from."""
  c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))

  def where(x, y):
    x, y = x - 31.5, y - 23.5
    return c * x - s * y + 31.5, s * x + c * y + 23.5

  return where


PLACES = {
  'rotate': (turned(21.0), 21.0),
  # Pixels are squares: the middle of the first is at 0.5.
  'shear_x': (lambda x, y: (x + 0.21 * (y + 0.5), y), 0.21),
  'shear_y': (lambda x, y: (x, y - 0.21 * (x + 0.5)), -0.21),
  'translate_x': (lambda x, y: (x + 0.315 * 64, y), 0.315),
  'translate_y': (lambda x, y: (x, y - 0.315 * 48), -0.315),
}


@pytest.mark.parametrize('slopes', [(3.5, 0.0), (0.0, 4.5)])
@pytest.mark.parametrize('name', PLACES)
def test_operations_on_places(name, slopes):
  """On a plane of grey, which a bicubic kernel reproduces."""

  def plane(x, y):
    return 10 + slopes[0] * x + slopes[1] * y

  where, strength = PLACES[name]
  y, x = np.mgrid[:48, :64].astype(float)
  pixels = np.round(plane(x, y)).astype(np.uint8)[..., None]
  found = run(name, np.repeat(pixels, 3, -1), strength)[..., 0]
  u, v = where(x, y)
  inside = (u >= 3) & (u <= 60) & (v >= 3) & (v <= 44)
  assert 0.3 < inside.mean() < 0.95
  off = (found - plane(u, v))[inside]  # rounded twice, the second time down
  assert np.abs(off).max() <= 2 and abs(off.mean()) < 1
  outside = (u < -1) | (u > 64) | (v < -1) | (v > 48)
  assert outside.any()
  assert (found[outside] == augment.GREY).all()


# By hand: level 7 of 10 of the published ranges, and the top.
STRENGTHS = {
  'rotate': (21.0, 30.0),
  'posterize': (2, 0),
  'solarize': (77, 0),
  'solarize_add': (77, 110),
  'color': (1.63, 1.9),
  'contrast': (1.63, 1.9),
  'brightness': (1.63, 1.9),
  'sharpness': (1.63, 1.9),
  'shear_x': (0.21, 0.3),
  'shear_y': (0.21, 0.3),
  'translate_x': (0.315, 0.45),
  'translate_y': (0.315, 0.45),
}


def test_strengths():
  assert len(augment.OPERATIONS) == 15
  for name, wanted in STRENGTHS.items():
    strength = augment.OPERATIONS[name][1]
    found = [strength(level, 1) for level in (7.0, 10.0)]
    np.testing.assert_allclose(found, wanted)
    other = strength(7.0, -1)
    signed = name.startswith(('rotate', 'shear', 'translate'))
    enhancing = name in ('color', 'contrast', 'brightness', 'sharpness')
    mirrored = {(True, False): -found[0], (False, True): 2 - found[0]}
    assert other == pytest.approx(mirrored.get((signed, enhancing), found[0]))


def test_what_is_drawn():
  """Fifteen operations alike, half of four carried out, levels as asked."""
  rng = np.random.default_rng(0)
  drawn = [augment.draw(augment.Policy(), rng) for _ in range(3000)]
  counts = np.bincount([len(x) for x in drawn], minlength=5) / 3000
  np.testing.assert_allclose(counts, np.array([1, 4, 6, 4, 1]) / 16, atol=0.03)
  names = [name for x in drawn for name, _ in x]
  shares = [names.count(name) / len(names) for name in augment.OPERATIONS]
  np.testing.assert_allclose(shares, 1 / 15, atol=0.015)
  angles = np.array([s for x in drawn for n, s in x if n == 'rotate'])
  levels = np.abs(angles) / 3
  assert abs(levels.mean() - 7) < 0.1 and abs(levels.std() - 0.5) < 0.07
  assert abs((angles > 0).mean() - 0.5) < 0.1
  strong = augment.Policy(level=10.0, count=1, spread=3.0)
  drawn = [augment.draw(strong, rng) for _ in range(500)]
  angles = [abs(s) for x in drawn for n, s in x if n == 'rotate']
  assert max(angles) == 30.0


def test_all_frames_are_changed_alike():
  still = np.repeat(COLOURS[None], 5, 0)
  changed = 0
  for seed in range(20):
    video = still.copy()
    augment.clips(video[None], POLICY, 0.0, [seed])
    assert (video == video[:1]).all()
    changed += not np.array_equal(video, still)
  assert changed >= 15
  grey = np.ascontiguousarray(still[..., :1])
  for seed in range(20):  # every operation bears one channel
    augment.clips(grey[None], 'rand-m7-n4-inc1', 0.25, [seed])
  two = np.stack([still, still])
  augment.clips(two, POLICY, 1.0, [3])
  assert not np.array_equal(two[0], two[1])  # clips each in their own way


def test_one_box_of_noise_is_erased():
  areas, boxes = [], 0
  for seed in range(300):
    video = np.full((3, 40, 60, 3), 7, np.uint8)
    augment.clips(video[None], '', 0.25, [seed])
    rows, columns = np.nonzero((video != 7).any((0, 3)))
    if not len(rows):
      continue
    boxes += 1
    box = video[
      :, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1
    ]
    areas.append(box.shape[1] * box.shape[2] / 2400)
    assert (box != 7).mean() > 0.95  # in every frame, the whole box
    assert not np.array_equal(box[0], box[1])
    if len(areas) == 1 or areas[-1] == max(areas):
      largest = box
  assert 0.18 < boxes / 300 < 0.32
  assert 0.015 < min(areas) < 0.06 < 0.28 < max(areas) < 0.35
  # Clipped to what a pixel can be, so a little nearer to the middle.
  mean = largest.mean((0, 1, 2)) / 255
  np.testing.assert_allclose(mean, (0.485, 0.456, 0.406), atol=0.03)
  assert (np.abs(largest.std((0, 1, 2)) / 255 - 0.225) < 0.03).all()
  video = np.full((3, 40, 60, 3), 7, np.uint8)
  augment.erase(video, 0.0, np.random.default_rng(0))
  assert (video == 7).all()


@pytest.mark.parametrize(
  'text',
  ['randaugment', 'rand-m7', 'rand-m7-n4', 'rand-m11-n4-inc1',
   'rand-m7-n0-inc1', 'rand-m7-n4-inc0', 'rand-m7-n4-w1-inc1',
   'rand-m7-m7-n4-inc1', 'auto-m7-n4-inc1'],
)  # fmt: skip
def test_other_policies_are_refused(text):
  with pytest.raises(ValueError, match=r'data\.auto_augment'):
    clip_spec.Spec(auto_augment=text)
  with pytest.raises(ValueError, match=r'data\.erase is 25'):
    clip_spec.Spec(erase=25)
  with pytest.raises(ValueError, match='depth_units'):
    clip_spec.Spec(erase=0.25, depth_units=1000.0)
  assert augment.parse(POLICY) == augment.Policy(7.0, 4, 0.5)


def batches(config, *, processes=1, start=0, steps=3):
  """The batches of some steps, put together from those of processes."""
  parts = []
  for process in range(processes):
    clips = pipeline.make(
      config, batch_size=8, seed=5, process_index=process,
      process_count=processes,
    )  # fmt: skip
    stream = clips.iterator(start)
    parts.append([np.array(next(stream)['video']) for _ in range(steps)])
    stream.close()
    clips.close()
  return [np.concatenate(row) for row in zip(*parts, strict=True)]


def digests(found):
  return [hashlib.sha256(x.tobytes()).hexdigest() for x in found]


def test_a_function_of_seed_and_step_alone(data_config):
  plain = batches(data_config)
  data_config.auto_augment, data_config.erase = POLICY, 0.25
  reference = batches(data_config)
  assert not set(digests(plain)) & set(digests(reference))
  wanted = digests(reference)
  assert digests(batches(data_config, processes=2)) == wanted
  assert digests(batches(data_config, start=1, steps=2)) == wanted[1:]
  data_config.workers, data_config.isolate = 2, True
  assert digests(batches(data_config)) == wanted


def test_nothing_else_moves(data_config):
  """Same videos, same boxes; and testing is left alone."""
  rows = []
  for policy, erase in (('', 0.0), (POLICY, 1.0)):
    data_config.auto_augment, data_config.erase = policy, erase
    clips = pipeline.make(data_config, batch_size=8, seed=5)
    rows.append(next(clips.iterator()))
    clips.close()
  for name in ('index', 'crop', 'label'):
    np.testing.assert_array_equal(rows[0][name], rows[1][name])
  assert not np.array_equal(rows[0]['video'], rows[1]['video'])
  rows = []
  for policy, erase in (('', 0.0), (POLICY, 1.0)):
    data_config.auto_augment, data_config.erase = policy, erase
    videos = pipeline.evaluation(data_config, batch_size=8)
    rows.append(next(iter(videos))['video'])
    videos.close()
  np.testing.assert_array_equal(*rows)


def test_off_unless_asked_for():
  config = options.default()
  assert (config.auto_augment, config.erase) == ('', 0.0)
  config.auto_augment, config.erase = POLICY, 0.25
  spec = options.spec(config)
  assert (spec.auto_augment, spec.erase) == (POLICY, 0.25)


@pytest.mark.parametrize('page', ['probe_ssv2.py', 'probe_k400.py'])
def test_the_published_probes_use_it(page):
  _, config = config_lib.load(f'configs/{page}')
  assert (config.data.auto_augment, config.data.erase) == (POLICY, 0.25)
  assert config.data.crop_scale == (0.08, 1.0) and not config.data.flip
