"""Colours of image processors, as other codes write them beside weights."""

import json

import numpy as np
import pytest

from tests.weights import test_published as published
from vssl_jax import weights
from vssl_jax.utils import colours
from vssl_jax.weights.readers import tensors

MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
GIVEN = {'image_mean': MEAN, 'image_std': STD}


@pytest.fixture
def folder(tmp_path):
  """Weights whose config says nothing of colours."""
  published.published_files(tmp_path)
  path = tmp_path / 'config.json'
  config = json.loads(path.read_text())
  path.write_text(
    json.dumps({k: x for k, x in config.items() if k not in GIVEN})
  )
  (tmp_path / 'preprocessor_config.json').unlink()
  assert weights.describe(tmp_path).mean == colours.IMAGENET_MEAN
  return tmp_path


@pytest.mark.parametrize(
  ('name', 'config'),
  [
    ('preprocessor_config.json', GIVEN),
    ('video_preprocessor_config.json', GIVEN),
    ('processor_config.json', {'image_processor': GIVEN}),
    ('processor_config.json', {'video_processor': GIVEN, 'image_mean': None}),
    ('config.json', {'pretrained_cfg': {'mean': MEAN, 'std': STD}}),
    ('preprocessor_config.json', GIVEN | {'rescale_factor': 1 / 255}),
    ('preprocessor_config.json', GIVEN | {'rescale_factor': 1 / 127.5}),
    (
      'preprocessor_config.json',
      {'image_mean': [123.7] * 3, 'image_std': [58.4] * 3, 'do_rescale': False},
    ),
    ('preprocessor_config.json', GIVEN | {'do_normalize': False}),
  ],
)
def test_pixels_are_normalised_as_the_processor_does(folder, name, config):
  path = folder / name
  before = json.loads(path.read_text()) if path.exists() else {}
  path.write_text(json.dumps(before | config))
  found = weights.describe(folder)
  pixels = np.arange(0, 256, 51)[:, None].astype(np.float64)
  given = config if config.get('image_mean') else GIVEN
  wanted = pixels * (
    config.get('rescale_factor', 1 / 255)
    if config.get('do_rescale', True)
    else 1
  )
  if config.get('do_normalize', True):
    wanted = (wanted - given['image_mean']) / given['image_std']
  ours = (pixels / 255 - found.mean) / found.std
  np.testing.assert_allclose(ours, np.broadcast_to(wanted, ours.shape))


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    ({'image_mean': [123.7] * 3, 'image_std': [58.4] * 3}, 'divide them by'),
    ({'image_mean': MEAN, 'image_std': [0.0] * 3}, r'image_std \[0.0, 0.0'),
    ({'image_mean': MEAN, 'image_std': [0.4, -0.5, 0.6]}, 'at least 0.005 of'),
    (GIVEN | {'do_rescale': False}, 'pixels from 0 to 255.*correct do_rescale'),
    ({'image_mean': MEAN}, 'image_std None, wanted a value of each per chan'),
    ({'image_mean': MEAN, 'image_std': [0.4]}, r'image_std \[0.4\], wanted a'),
    ({'image_mean': [0.5], 'image_std': [0.5]}, r'channels, wanted 1 as of im'),
    (GIVEN | {'do_rescale': 'no'}, "do_rescale is 'no', wanted true or false"),
    (GIVEN | {'rescale_factor': 0}, 'rescale_factor is 0, wanted a number abo'),
  ],
)  # fmt: skip
def test_colours_that_cannot_be(folder, config, message):
  (folder / 'preprocessor_config.json').write_text(json.dumps(config))
  with pytest.raises(tensors.WeightsError, match=message) as caught:
    weights.describe(folder)
  assert str(folder) in str(caught.value)
