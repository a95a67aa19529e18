"""Any number of channels: mean and deviation, networks, targets, refusals."""

import jax
import numpy as np
import pytest

import vssl_jax
from tests.train import small_runs
from vssl_jax import config as config_lib
from vssl_jax import encoder as encoder_lib
from vssl_jax import main, methods
from vssl_jax.data import options
from vssl_jax.data.clips import augment
from vssl_jax.data.tools import synthetic
from vssl_jax.models import vit
from vssl_jax.train import loop
from vssl_jax.utils import colours


@pytest.mark.parametrize(
  ('channels', 'mean', 'std', 'right'),
  [
    (3, (), (), (colours.IMAGENET_MEAN, colours.IMAGENET_STD)),
    (1, (), (), ((0.449,), (0.226,))),
    (3, (0.5,), (0.25,), ((0.5,) * 3, (0.25,) * 3)),
    (1, (0.5,), (), ((0.5,), (0.226,))),
    (4, (0.1, 0.2, 0.3, 0.4), (0.5,), ((0.1, 0.2, 0.3, 0.4), (0.5,) * 4)),
  ],
)
def test_mean_and_deviation_by_channel(channels, mean, std, right):
  assert tuple(colours.of(channels, mean, std)) == right


@pytest.mark.parametrize(
  ('channels', 'mean', 'message'),
  [
    (3, (0.5, 0.5), r'data.mean: found \(0.5, 0.5\) for clips of 3 channels'),
    (1, (0.5,) * 3, r'data.mean: .* of 1 channels.*--config.data.mean'),
    (4, (), r'data.mean: found \(\) for clips of 4 channels'),
  ],
)
def test_another_number_of_values_is_refused(channels, mean, message):
  with pytest.raises(ValueError, match=message):
    colours.of(channels, mean)


PAGES = ('salt_single_gpu.py', 'vjepa2.py', 'videomae_k400.py:B')
PAGES += ('layerlock_single_gpu.py', 'pmd_single_gpu.py:self')
PAGES += ('kdhiera_single_gpu.py:self', 'hiera_mae_k400.py', 'demo.py')


def _none(source):
  raise AssertionError(f'{source} is looked for')


@pytest.mark.slow
@pytest.mark.parametrize('page', PAGES)
def test_all_networks_of_a_page_follow_its_channels(page):
  _, c = config_lib.load(f'configs/{page}')
  c.data.channels, c.data.mean, c.data.std = 1, (0.4,), (0.3,)
  shape = options.spec(c.data).shape
  for phase in methods.build(
    c.method, shape, _none, options.colours_of(c.data)
  ):
    network = getattr(phase.encoder, 'image', phase.encoder)
    network = getattr(network, 'encoder', network)  # MVD's student
    assert (network.mean, network.std) == ((0.4,), (0.3,))
    video = jax.ShapeDtypeStruct((1, *shape), np.uint8)
    params = jax.eval_shape(
      lambda video, phase=phase: phase.init(jax.random.key(0), video),
      video,
    )
    kernels = [
      x.shape for x in jax.tree.leaves(params['encoder']) if x.ndim >= 4
    ]
    assert all(shape[-2] == 1 for shape in kernels if len(shape) == 5)


def test_a_teacher_of_other_channels_is_refused():
  _, c = config_lib.load('configs/pmd_single_gpu.py')
  c.data.channels = 1
  outside = vit.make('B', patch=(2, 16, 16))
  with pytest.raises(
    ValueError, match=r'found clips of 1 channels, wanted 3.*data.channels=3'
  ):
    methods.build(
      c.method,
      options.spec(c.data).shape,
      lambda source: outside,
      options.colours_of(c.data),
    )


def test_an_erased_box_has_the_colours_of_the_clips():
  clip = np.zeros((4, 64, 64, 1), np.uint8)
  augment.erase(clip, 1.0, np.random.default_rng(0), (0.6,), (0.05,))
  box = clip[clip > 0] / 255  # 0.6 is 12 deviations from 0
  assert box.size > 300
  np.testing.assert_allclose(box.mean(), 0.6, atol=0.01)
  np.testing.assert_allclose(box.std(), 0.05, atol=0.01)


@pytest.fixture(scope='module')
def encoder():
  module = vit.make('S', patch=(2, 8, 8), dtype='float32', depth=1)
  params = module.init(jax.random.key(0), np.zeros((1, 2, 16, 16, 3)))
  return encoder_lib.Encoder(module, params['params'], 'small', (2, 16, 16, 3))


@pytest.mark.slow
@pytest.mark.parametrize(
  ('video', 'message'),
  [
    (np.full((2, 16, 16, 3), 200.0, np.float32), r'200.*divide .* by 255'),
    (np.full((2, 16, 16, 3), -1.0, np.float32), r'values from -1 .*\[0, 1\]'),
    (np.full((2, 16, 16, 3), np.nan, np.float32), r'nan.*\[0, 1\]'),
    (np.zeros((2, 16, 16, 1), np.uint8), r'\(2, 16, 16, 1\), wanted .*W, 3\]'),
    (np.zeros((2, 16, 16, 4), np.uint8), r'\(2, 16, 16, 4\), wanted .*W, 3\]'),
    (np.zeros((2, 3, 16, 16), np.uint8), r'channels come last'),
    (np.zeros((16, 16, 3), np.uint8), r'\(16, 16, 3\), wanted .*T, H, W'),
    (np.zeros((0, 2, 16, 16, 3), np.uint8), r'\(0, 2, 16, 16, 3\), wanted'),
    (np.zeros((2, 16, 16, 3), np.int64), r'int64 .*wanted uint8'),
  ],
)
def test_clips_that_an_encoder_cannot_read(encoder, video, message):
  with pytest.raises(ValueError, match=message) as error:
    encoder(video)
  assert '\n' not in str(error.value)


def test_bytes_and_floats_are_the_same_clip(encoder):
  video = np.random.default_rng(0).integers(0, 256, (1, 2, 16, 16, 3), np.uint8)
  floats = video.astype(np.float32) / 255
  np.testing.assert_allclose(encoder(video), encoder(floats), atol=1e-5)


@pytest.mark.slow
def test_grey_videos_are_trained_on_and_measured(tmp_path, capsys):
  """Encoder, targets and probe see one channel; another count is refused."""
  synthetic.write(
    tmp_path / 'clips', clips={'train': 16, 'test': 8}, size=32, frames=8
  )
  config = small_runs.tiny_config(
    tmp_path / 'clips' / 'train', tmp_path / 'run'
  )
  config.data.channels = 1
  assert loop.train(config) == 0
  encoder = vssl_jax.load(str(tmp_path / 'run'))
  assert encoder.video == (4, 16, 16, 1)
  assert encoder(np.zeros((1, 4, 16, 16, 1), np.uint8)).shape == (1, 8, 16)
  probe = [
    '--config=configs/probe_fast.py:knn',
    f'--config.encoder={tmp_path / "run"}',
    f'--config.workdir={tmp_path / "probe"}',
    f'--config.probe.train={tmp_path / "clips" / "train"}',
    f'--config.probe.test={tmp_path / "clips" / "test"}',
    '--config.probe.ks=(1,)',
    '--config.data.workers=0',
    '--config.data.isolate=False',
  ]
  assert main.main(probe) == 0
  assert '4x16x16' in capsys.readouterr().out
  assert main.main([*probe, '--config.data.channels=3']) != 0
  assert 'data.channels: found 3, wanted 1' in capsys.readouterr().err
