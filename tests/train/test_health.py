import json
import pathlib
import types

import ml_collections
import numpy as np
import pytest

from tests.train import toy
from vssl_jax import sharding
from vssl_jax.data import pipeline
from vssl_jax.methods import phase as phase_lib
from vssl_jax.train import health, loop
from vssl_jax.utils import metrics

# All but the parameters is carried over: the encoder is another one.
FRESH = ('opt', 'example_memory')


def _panel(features, labels=None):
  return health.panel(features, np.ones(len(features)), labels)


def test_figures_of_known_features():
  rng = np.random.default_rng(0)
  spread = rng.normal(size=(256, 16)).astype(np.float32)
  values = _panel(spread)
  np.testing.assert_allclose(values['health/feature_std'], 1, atol=0.05)
  assert values['health/rankme'] > 15
  assert abs(values['health/cosine']) < 0.05
  line = rng.normal(size=(256, 1)) * np.ones((1, 16))
  values = _panel(line.astype(np.float32) + 3)
  np.testing.assert_allclose(values['health/rankme'], 1, atol=0.1)
  assert values['health/cosine'] > 0.9


def test_neighbours_vote_where_there_are_labels():
  rng = np.random.default_rng(0)
  labels = np.tile([0, 1], 64)
  features = rng.normal(size=(128, 8)).astype(np.float32)
  features[:, 0] += 20 * labels - 10
  assert _panel(features, labels)['health/knn'] == 1
  assert 'health/knn' not in _panel(features)
  assert 'health/knn' not in _panel(features, labels - 1)


@pytest.mark.parametrize(('factor', 'alarms'), [(1.0, 0), (0.2, 0), (0.05, 1)])
def test_the_alarm_names_what_collapsed(factor, alarms):
  rng = np.random.default_rng(0)
  before = _panel(rng.normal(size=(64, 8)).astype(np.float32))
  after = dict(before)
  after['health/token_variance'] *= factor
  found = health.collapsed(after, before)
  assert len(found) == alarms
  if alarms:
    assert 'health/token_variance fell to 0.05, from 1' in found[0]


def test_constant_features_raise_it():
  rng = np.random.default_rng(0)
  before = _panel(rng.normal(size=(64, 8)).astype(np.float32))
  constant = np.ones((64, 8), np.float32) + 1e-6 * rng.normal(size=(64, 8))
  assert health.collapsed(_panel(constant.astype(np.float32)), before)


@pytest.mark.slow
def test_a_run_logs_the_panel(tiny):
  tiny.health.update(dict(every=4.0, clips=32))
  assert loop.train(tiny) == 0
  text = (pathlib.Path(tiny.workdir) / 'metrics.jsonl').read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  looked = [x for x in lines if 'health/rankme' in x]
  # Early in each phase, and every four steps.
  assert [x['step'] for x in looked] == [1, 4, 7, 8, 12]
  assert all(0 <= x['health/knn'] <= 1 for x in looked)
  assert all(x['health/feature_std'] > 0 for x in looked)
  # The student of step 7 was drawn anew: it did not come from the teacher.
  followed = [x['step'] for x in looked if 'drift/block_00' in x]
  assert followed == [4, 8, 12]


def test_drift_is_the_relative_change_of_a_block():
  mesh = sharding.make_mesh(1, -1)
  kernel = np.arange(1, 13, dtype=np.float32).reshape(3, 4)

  def params(scale):
    blocks = {f'block_{i:02d}': {'fc1': {'kernel': kernel}} for i in range(2)}
    blocks['block_01'] = {'fc1': {'kernel': scale * kernel}}
    return {'encoder': blocks | {'embed': {'kernel': kernel}}}

  before = health.sample(params(1.0), mesh)
  assert set(before) == {'block_00', 'block_01'}
  found = health.drift(before, health.sample(params(1.25), mesh))
  assert found['drift/block_00'] == 0
  np.testing.assert_allclose(found['drift/block_01'], 0.25 / 1.25, rtol=1e-6)
  rms = 1.25 * np.sqrt(np.mean(np.square(kernel)))
  np.testing.assert_allclose(found['norm/block_01'], rms, rtol=1e-6)
  assert 'drift/block_00' not in health.drift({}, before)


def test_blocks_of_another_shape_are_not_compared():
  """A matrix that grew, one that came and one that went, beside one that fits.

  What fits is another block's: of one block all is compared or nothing.
  """
  one, two = np.ones(4, np.float32), np.ones(8, np.float32)
  before = {
    'block_00': {'a': one, 'b': one},
    'block_01': {'a': one},
    'block_02': {'a': one, 'b': one},
    'block_03': {'a': 2 * one},
  }
  now = {
    'block_00': {'a': one, 'b': two},
    'block_01': {'a': one, 'b': one},
    'block_02': {'a': one},
    'block_03': {'a': one},
  }
  found = health.drift(before, now)
  assert [n for n in found if n.startswith('drift/')] == ['drift/block_03']
  assert found['drift/block_03'] == 1 and len(found) == 5


def test_a_large_matrix_is_sampled_evenly():
  count = 4 * health.SAMPLED
  kernel = np.arange(count, dtype=np.float32).reshape(2, -1)
  params = {'encoder': {'block_00': {'kernel': kernel}}}
  found = health.sample(params, sharding.make_mesh(1, -1))['block_00']
  np.testing.assert_array_equal(found['kernel'], np.arange(0, count, 4))


def _looks(tmp_path, monkeypatch, spreads, carried):
  """Returns warnings by step of a panel that sees planted features.

  Args:
    spreads: step -> (phase, how far features spread).
    carried: phase -> what it carries over.
  """
  phases = tuple(
    toy.phase(name=n, carry=parts, steps=4) for n, parts in carried.items()
  )
  config = ml_collections.ConfigDict(dict(every=1.0, clips=32))
  run = types.SimpleNamespace(
    phases=phases,
    mesh=sharding.make_mesh(1, -1),
    workdir=tmp_path,
    logger=metrics.Logger(tmp_path, tensorboard=False),
  )
  clips = object.__new__(pipeline.Clips)  # not read: figures are planted
  panel, found = health.Panel(config, clips, 12), {}
  state = types.SimpleNamespace(params={'encoder': {}})
  for done, (name, spread) in spreads.items():
    seen = dict.fromkeys(health.WATCHED, spread)
    monkeypatch.setattr(panel, '_measure', lambda *_, seen=seen: seen)
    span = types.SimpleNamespace(
      phase=next(p for p in phases if p.name == name)
    )
    found[done] = panel.look(run, span, state, done)
  run.logger.close()
  return [done for done, lines in found.items() if lines]


def test_a_fall_in_a_later_phase_of_one_encoder_is_seen(tmp_path, monkeypatch):
  """Where a layer locks, what came before is what to compare with."""
  spreads = {2: ('a', 1.0), 4: ('a', 0.9), 6: ('b', 0.05), 10: ('c', 0.04)}
  carried = {'a': FRESH, 'b': phase_lib.CARRY, 'c': phase_lib.CARRY}
  assert _looks(tmp_path, monkeypatch, spreads, carried) == [6, 10]


def test_another_encoder_is_compared_with_itself(tmp_path, monkeypatch):
  spreads = {2: ('a', 1.0), 6: ('b', 0.05), 8: ('b', 0.04), 10: ('c', 0.004)}
  carried = {'a': FRESH, 'b': FRESH, 'c': phase_lib.CARRY}
  assert _looks(tmp_path, monkeypatch, spreads, carried) == [10]


def test_a_run_that_goes_on_knows_what_its_encoder_was(tmp_path, monkeypatch):
  carried = {'a': FRESH, 'b': phase_lib.CARRY}
  _looks(tmp_path, monkeypatch, {2: ('a', 1.0)}, carried)
  later = {6: ('b', 0.05), 8: ('b', 0.2)}
  assert _looks(tmp_path, monkeypatch, later, carried) == [6]
