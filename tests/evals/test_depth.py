"""The job `depth` from frames to the report, with a tiny encoder."""

import copy
import json

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from PIL import Image

from vssl_jax import config as config_lib
from vssl_jax import encoder as encoder_lib
from vssl_jax import sharding
from vssl_jax.data import pipeline
from vssl_jax.data.tools import generated_rooms
from vssl_jax.evals.depth import job as job_lib
from vssl_jax.evals.depth import report
from vssl_jax.evals.probe import setup
from vssl_jax.models import vit

LOOK = generated_rooms.Look(height=16, width=16, frames=12)


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
  """Folders `train` and `test` of other rooms; one test frame is damaged."""
  folder = tmp_path_factory.mktemp('rooms')
  generated_rooms.write(folder / 'train', scenes=8, seed=0, look=LOOK)
  generated_rooms.write(folder / 'test', scenes=5, seed=1, look=LOOK)
  (folder / 'test/room_0004/depth/000003.png').write_bytes(b'')
  return folder


@pytest.fixture(scope='module')
def encoder():
  module = vit.Vit(
    width=16,
    depth=2,
    num_heads=2,
    mlp_width=32,
    patch=(2, 8, 8),
    positions='sinusoid_1d',
    dtype='float32',
  )
  shape = (4, 16, 16, 3)
  video = np.zeros((1, *shape), np.uint8)
  params = jax.jit(module.init)(jax.random.key(0), video)['params']
  return encoder_lib.Encoder(module, params, 'tiny', shape)


def config_of(scenes, workdir, **probe):
  c = config_lib.default()
  c.job, c.workdir = 'depth', str(workdir)
  c.data.frames, c.data.stride, c.data.size = 4, 1, (16, 16)
  c.data.depth_units, c.data.stretch = 1000.0, 6
  c.data.isolate, c.data.decode_processes = False, 1
  c.data.max_bad_fraction = 0.3
  c.probe.train = (str(scenes / 'train'),)
  c.probe.test = (str(scenes / 'test'),)
  c.probe.batch_size = c.probe.test_batch_size = 8
  c.probe.width, c.probe.num_heads, c.probe.dtype = 16, 2, 'float32'
  c.probe.lrs, c.probe.wds, c.probe.decay = (1e-2, 1e-5), (1e-4,), 'matrices'
  c.probe.epochs, c.probe.clips, c.probe.holdout = 8, 2, 0.3
  c.probe.pictures, c.probe.augment = 2, False
  for name, value in probe.items():
    c.probe[name] = value
  return c


CASES = {
  'features kept': {},
  'new crops, absolute error': {'augment': True, 'loss': 'l1', 'clips': 1},
}


@pytest.mark.parametrize(
  'name',
  [
    pytest.param('features kept', marks=pytest.mark.slow),
    'new crops, absolute error',
  ],
)
def test_depth_is_learned_and_reported(
  name, scenes, encoder, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(encoder_lib, 'load', lambda source: encoder)
  before = jax.tree.map(np.asarray, encoder.params)
  c = config_of(scenes, tmp_path, **CASES[name])
  c.encoder = 'tiny'
  assert job_lib.run(c) == 0
  found = json.loads((tmp_path / 'report.json').read_text())
  results = found['results']
  losses = np.asarray([entry['loss'] for entry in found['history']])
  assert losses[-1, 0] < 0.7 * losses[0, 0]
  # The rate that learns is the one that is chosen, without the test clips.
  assert results['selected']['lr'] == results['best']['lr'] == 1e-2
  assert results['selected']['abs_rel'] < 0.7
  for row in ('selected', 'best', 'mean'):
    assert 0 <= results[row]['delta_1'] <= 1
    assert 0 < results[row]['align_median']['rmse'] < 2
  assert found['tap'] == 'after block 2 of 2, final norm, in float32'
  assert (found['test']['examples'], found['test']['unreadable']) == (10, 1)
  assert found['train']['examples'] == 16
  text = capsys.readouterr().out
  for wanted in (
    '(tapped after block 2 of 2, final norm, in float32)',
    f'{results["selected"]["abs_rel"]:.4f}',
    '10 examples of',
    '1 unreadable',
    'do not hold for other rooms',
  ):
    assert wanted in text
  pictures = sorted(tmp_path.glob('depth_*.png'))
  assert [p.name for p in pictures] == ['depth_000000.png', 'depth_000009.png']
  assert np.asarray(Image.open(pictures[0])).std() > 20
  jax.tree.map(np.testing.assert_array_equal, before, encoder.params)


@pytest.fixture(scope='module')
def measured(scenes, encoder, tmp_path_factory):
  """A config and the report of a single head that was hardly trained."""
  folder = tmp_path_factory.mktemp('measured')
  c = config_of(scenes, folder, epochs=1, holdout=0.0, lrs=(1e-3,))
  return c, job_lib.evaluate(c, encoder)


def test_the_baseline_and_the_pixels_are_counted_as_numpy_does(
  scenes, measured
):
  (c, found), truth = measured, {}
  for split in ('train', 'test'):
    data = c.data.to_dict() | {'source': str(scenes / split)}
    batches = list(pipeline.evaluation(data, batch_size=8, segments=2))
    rows = {
      k: np.concatenate([b[k] for b in batches]) for k in ('depth', 'weight')
    }
    truth[split] = rows['depth'][rows['weight'] > 0].astype(np.float64)
  count = (truth['train'] > 0).sum(0)
  mean = truth['train'].sum(0) / count
  valid = truth['test'] > 0
  p, g = np.broadcast_to(mean, valid.shape)[valid], truth['test'][valid]
  results = found['results']
  assert results['pixels'] == valid.sum()
  np.testing.assert_allclose(
    results['mean']['abs_rel'], np.mean(np.abs(p - g) / g), rtol=1e-5
  )
  np.testing.assert_allclose(
    results['mean']['rmse'], np.sqrt(np.mean((p - g) ** 2)), rtol=1e-5
  )
  # One head is not chosen; a rate of its own says which.
  assert results['selected'] == results['best']


def test_figures_do_not_depend_on_the_batches(encoder, measured):
  c, found = measured
  c = copy.deepcopy(c)
  c.probe.test_batch_size = 16
  other = job_lib.evaluate(c, encoder)
  for name in ('best', 'mean'):
    np.testing.assert_allclose(
      _numbers(other['results'][name]),
      _numbers(found['results'][name]),
      rtol=1e-5,
    )


def _numbers(row):
  return [row[k] for k in report.KEYS] + [
    row['align_median'][k] for k in report.KEYS
  ]


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'segments': 2}, r'probe\.segments: found 2'),
    ({'loss': 'huber'}, "found 'huber', wanted one of"),
    ({'batch_size': 9}, 'multiple of the 8 devices'),
    ({'patch': (2, 5, 8)}, 'must be a multiple of the patch'),
  ],
)
def test_wrong_knobs_are_named(change, message, scenes, encoder, tmp_path):
  with pytest.raises(ValueError, match=message):
    job_lib.evaluate(config_of(scenes, tmp_path, **change), encoder)


def test_depth_needs_units_and_an_encoder(scenes, encoder, tmp_path):
  c = config_of(scenes, tmp_path)
  with pytest.raises(ValueError, match=r'config\.encoder is empty'):
    job_lib.evaluate(c)
  c.data.depth_units = 0.0
  with pytest.raises(ValueError, match=r'data\.depth_units is 0'):
    job_lib.evaluate(c, encoder)


def test_the_tap_is_said_in_blocks():
  module = vit.Vit(width=16, depth=24, num_heads=2)
  assert setup.tap(module, 0.95) == 'after block 21 of 24 (0.95)'
  assert setup.tap(module, 0.0) == 'after block 24 of 24, final norm'
  plain = vit.Vit(width=16, depth=24, num_heads=2, final_norm=False)
  assert setup.tap(plain, 0.0) == 'after block 24 of 24'


class Halved(vit.Vit):
  """An encoder whose last blocks belong to a decoder."""

  decoder_blocks: int = 4


def test_blocks_that_decode_are_not_tapped():
  module = Halved(width=16, depth=12, num_heads=2)
  wanted = 'after block 8 of 12, before those that decode'
  assert setup.tap(module, 0.0) == wanted
  assert setup.tap(module, 0.5) == 'after block 4 of 12 (0.5)'


def test_views_that_vote_alone_have_numbers_of_their_own():
  batch = {
    'view': np.repeat([0, 1], 4).astype(np.int32),
    'segment': np.tile(np.arange(4), 2).astype(np.int32),
  }
  (same,) = setup.number_views([batch], 4, 1)
  assert same is batch
  (found,) = setup.number_views([batch], 2, 2)
  np.testing.assert_array_equal(found['view'], [0, 0, 1, 1, 2, 2, 3, 3])
  (found,) = setup.number_views([batch], 1, 4)
  np.testing.assert_array_equal(found['view'], np.arange(8))


@pytest.fixture
def one_device(monkeypatch):
  """The mesh of a laptop. Eight devices on two cores wait for each other."""
  mesh = jax.make_mesh(
    (1, 1),
    ('data', 'fsdp'),
    axis_types=(AxisType.Auto,) * 2,
    devices=jax.devices()[:1],
  )
  monkeypatch.setattr(sharding, 'make_mesh', lambda **kwargs: mesh)


def untrained(c):
  module = vit.Vit(
    width=64, depth=1, num_heads=2, patch=(2, 8, 8), dtype='float32'
  )
  shape = (c.data.frames, *c.data.size, 3)
  params = module.init(jax.random.key(0), np.zeros((1, *shape), np.uint8))
  return encoder_lib.Encoder(module, params['params'], 'untrained', shape)


@pytest.mark.slow
def test_later_frames_of_known_rooms_are_read_better_than_guessed(
  tmp_path, one_device
):
  generated_rooms.write(tmp_path / 'rooms', scenes=20, seed=0)
  _, c = config_lib.load('configs/depth_fast.py')
  c.workdir = str(tmp_path)
  c.data.frames, c.data.size, c.data.stride = 8, (48, 48), 1
  c.data.isolate = False
  c.probe.train = c.probe.test = (str(tmp_path / 'rooms'),)
  c.probe.train_where, c.probe.test_where = 'frames=0-14', 'frames=16-23'
  found = job_lib.evaluate(c, untrained(c))['results']
  assert found['selected']['rmse'] < 0.8 * found['mean']['rmse']
  assert found['selected']['abs_rel'] < 0.8 * found['mean']['abs_rel']
  assert found['selected']['delta_1'] > found['mean']['delta_1'] + 0.03


@pytest.mark.slow
def test_depth_of_a_real_room_is_read(video_data, tmp_path, one_device):
  """One room: frames of the same pass, apart in time. Nothing general."""
  _, c = config_lib.load('configs/depth_fast.py')
  c.workdir = str(tmp_path)
  c.data.frames, c.data.size, c.data.stride = 8, (64, 64), 2
  room = str(video_data / 'rgbd_7scenes' / 'redkitchen_a')
  c.probe.train = c.probe.test = (room,)
  c.probe.train_where, c.probe.test_where = 'frames=0-699', 'frames=860-999'
  found = job_lib.evaluate(c, untrained(c))
  results = found['results']
  # Some 11 % of the pixels of this room hold no depth.
  pixels = 8 * 64 * 64 * 4 * found['test']['examples']
  assert 0.8 < results['pixels'] / pixels < 1
  # The mean of this room reads .186; frames that were trained on are read with
  # a loss far below its spread, others no better than that without a trained
  # encoder.
  assert results['selected']['abs_rel'] < 0.22
  assert found['history'][-1]['loss'][0] < 0.5 * results['mean']['rmse'] ** 2
