"""The job `probe` on one process and on two: the same report."""

import json

import jax
import numpy as np
import pytest

from tests.train import test_processes
from vssl_jax import config as config_lib
from vssl_jax import weights
from vssl_jax.data.tools import synthetic
from vssl_jax.models import vit

SHAPE = (4, 16, 16, 3)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """An encoder and videos, one of which cannot be read."""
  folder = tmp_path_factory.mktemp('two')
  module = vit.Vit(12, 1, 2, 24, patch=(2, 8, 8), dtype='float32')
  shapes = jax.eval_shape(
    module.init, jax.random.key(0), np.zeros((1, *SHAPE), np.uint8)
  )
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: 0.3 * rng.standard_normal(x.shape).astype(np.float32),
    shapes['params'],
  )
  weights.export(module, params, folder / 'encoder', video=SHAPE)
  synthetic.write(
    folder / 'clips', clips={'train': 45, 'test': 21}, size=16, frames=4
  )
  bad = next((folder / 'clips' / 'test').glob('*/*.mp4'))
  bad.write_bytes(b'this is no video')
  return folder


CASES = {
  'kept': {'augment': False, 'epochs': 3},
  'streamed': {'segments': 2, 'views': 3, 'epochs': 2},
}


def config_of(folder, workdir, case):
  c = config_lib.default()
  c.job, c.workdir = 'probe', str(workdir)
  c.encoder = str(folder / 'encoder')
  c.data.frames, c.data.stride, c.data.size = 4, 1, (16, 16)
  c.data.isolate, c.data.decode_processes = False, 1
  c.data.max_bad_fraction = 0.2
  c.data.auto_augment, c.data.erase = 'rand-m7-n4-mstd0.5-inc1', 0.25
  c.probe.train = (str(folder / 'clips' / 'train'),)
  c.probe.test = (str(folder / 'clips' / 'test'),)
  c.probe.batch_size = c.probe.test_batch_size = 8
  c.probe.protocol = 'linear'
  c.probe.lrs, c.probe.wds = (3e-2, 3e-3), (0.01,)
  c.probe.holdout = 0.2
  c.probe.update(CASES[case])
  return c


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_two_processes_measure_what_one_does(folder, tmp_path, case):
  reports = {}
  for count in (1, 2):
    workdir = tmp_path / str(count)
    config = config_of(folder, workdir, case)
    place = tmp_path / f'page{count}'
    if count == 1:
      started = [test_processes._start(place, config)]
    else:
      started = test_processes._pair(place, config)
    test_processes._finish(*started)
    reports[count] = json.loads((workdir / 'report.json').read_text())
  one, two = reports[1], reports[2]
  assert one['test']['evaluated'] == 20 and one['test']['missing'] == 1
  for name in ('results', 'test', 'train', 'held_out', 'median', 'heads'):
    assert one.get(name) == two.get(name), name
  for a, b in zip(one.get('history', ()), two.get('history', ()), strict=True):
    np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-5)
    assert a['accuracy'] == b['accuracy']
