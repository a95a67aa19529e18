"""The pages of the probes build the readouts that were published."""

import jax
import jax.numpy as jnp
import pytest

from vssl_jax import config as config_lib
from vssl_jax import encoder, trees
from vssl_jax.data import options as data_options
from vssl_jax.evals import clips
from vssl_jax.evals.depth import job
from vssl_jax.evals.probe import options, train_heads

GRID = (8, 14, 14)


def count(network, width=768):
  tokens = jax.ShapeDtypeStruct((1, 1568, width), jnp.float32)
  shapes = jax.eval_shape(network.init, jax.random.key(0), tokens, jnp.ones(1))
  return trees.count(shapes['params'])


@pytest.mark.parametrize(
  ('page', 'classes', 'wanted'),
  [
    ('probe_4ds.py', 174, 11_213_486),
    ('probe_4ds.py:ssv2', 174, 11_213_486),
    ('probe_4ds.py:k700', 700, 11_752_636),
    ('probe_ssv2.py', 174, 27_895_470),
    ('probe_k400.py', 400, 28_069_264),
  ],
)
def test_classifiers_have_the_published_size(page, classes, wanted):
  _, c = config_lib.load(f'configs/{page}')
  # Of an encoder such as the papers', whose stride the protocol replaces.
  c = clips.follow(c, encoder.Clip((16, 224, 224, 3), 3))
  clip = data_options.spec(c.data).shape
  assert clip == (16, 224, 224, 3)
  of_ssv2 = page in ('probe_4ds.py', 'probe_4ds.py:ssv2')
  assert c.data.stride == (2 if of_ssv2 else 4)
  network = options.network(classes, c.probe, GRID, clip[0])
  assert count(network) == wanted
  assert c.job == 'probe'
  assert not c.data.flip
  settings = train_heads.Settings.of(c.probe)
  assert len(settings.spec(network, 2000).pairs) == len(c.probe.lrs) * len(
    c.probe.wds
  )


@pytest.mark.parametrize('page', ['probe_ssv2.py', 'probe_k400.py'])
def test_pages_take_the_published_clips(page):
  """V-JEPA 2: a segment in each part; one view is 224 of 256 pixels."""
  for variant, part in (('', 1.0), (':fast', 0.875)):
    _, c = config_lib.load(f'configs/{page}{variant}')
    assert (c.data.sampling, c.data.crop_part) == ('parts', part)
    settings = train_heads.Settings.of(c.probe)
    assert settings.held_out_fraction == (0.0 if variant else 0.1)


def test_depth_has_the_published_size():
  _, c = config_lib.load('configs/depth_scannet.py')
  c = clips.follow(c, encoder.Clip((16, 224, 224, 3), 4))
  assert c.data.stride == 2
  clip = data_options.spec(c.data).shape
  network = job.network(c.probe, GRID, clip)
  assert count(network) == 17_587_840
  assert c.job == 'depth'
  assert c.data.depth_units == 1000
  settings = train_heads.Settings.of(c.probe)
  spec = settings.spec(network, 235)
  assert 39_000 < spec.steps < 41_000
  assert (spec.warmup, spec.decay, len(spec.pairs)) == (1000, 'matrices', 3)


@pytest.mark.parametrize(
  'page', ['probe_4ds.py', 'depth_scannet.py', 'depth_fast.py']
)
def test_pages_refuse_other_variants(page):
  with pytest.raises(ValueError, match=f'{page}: found :nonsense'):
    config_lib.load(f'configs/{page}:nonsense')


def test_settings_hold_what_the_config_says():
  c = options.default()
  c.warmup, c.decay, c.lrs = 7, 'matrices', (1.0, 2.0)
  found = train_heads.Settings.of(c)
  assert (found.warmup, found.decay, found.lrs) == (7, 'matrices', (1.0, 2.0))
  assert train_heads.Settings.of(options.default()) == train_heads.Settings()
