import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train import toy
from vssl_jax import sharding, trees
from vssl_jax.data.batch import Batch
from vssl_jax.methods import phase as phase_lib
from vssl_jax.train import freezing, optimizer, train_step

VIDEO, EXAMPLES = (2, 4, 4, 3), 16


def _arrays(seed=0, size=8):
  rng = np.random.default_rng(seed)
  return {
    'video': rng.integers(0, 255, (size, *VIDEO), dtype=np.uint8),
    'index': rng.permutation(EXAMPLES)[:size].astype(np.int32),
    'progress': np.float32(0),
  }


def _batch(seed=0, **targets):
  return Batch(**_arrays(seed), targets=targets)


def _make(phase=None, rows=None, lr=0.1, **kwargs):
  phase = dataclasses.replace(phase or toy.phase(), memory_specs=rows or {})
  optim = optimizer.default()
  optim.clip = 0.0
  key = jax.random.key(0)
  video = jax.ShapeDtypeStruct((1, *VIDEO), jnp.uint8)
  shapes = jax.eval_shape(phase.init, key, video)
  labels = freezing.labels(shapes, phase.frozen)
  tx = optimizer.make(
    optim, labels, lambda s: jnp.float32(lr), lambda s: jnp.float32(0.0)
  )
  state = train_step.init_state(phase, tx, key, VIDEO, EXAMPLES)
  update = train_step.make_update(
    phase,
    tx,
    labels,
    key=key,
    start=0,
    num_examples=EXAMPLES,
    **kwargs,
  )
  return state, jax.jit(update)


def test_schedules_count_steps_from_1():
  """Gradients of 1, and a learning rate that is the number of the step."""

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Slope(toy.ToyPhase):
    def loss(self, params, teachers, batch, rng):
      total = sum(jnp.sum(x) for x in jax.tree.leaves(params))
      return total, phase_lib.Aux({})

  state, update = _make_for(toy.phase(Slope), lr=None)
  for number in (1, 2):
    before, (state, _) = state, update(state, {}, _batch())
    for old, new in zip(
      jax.tree.leaves(before.params), jax.tree.leaves(state.params), strict=True
    ):
      np.testing.assert_allclose(old - new, number, rtol=1e-5)


def _same(a, b):
  return jax.tree.all(
    jax.tree.map(
      lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b
    )
  )


def test_loss_falls_and_steps_are_counted():
  state, update = _make()
  first = update(state, {}, _batch())[1]['loss']
  for _ in range(30):
    state, values = update(state, {}, _batch())
  assert values['loss'] < 0.05 * first
  assert state.step == 30


def _own_rows(shape):
  """A value of its own for every cell."""
  return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize('micro', [2, 4])
def test_accumulation_gives_the_step_of_the_whole_batch(micro):
  rows = {'seen': phase_lib.MemorySpec((2,), window=5)}
  state, whole = _make(rows=rows)
  _, parts = _make(rows=rows, accumulate=micro)
  kept = jax.tree.map(lambda x: x + _own_rows(x.shape), state.example_memory)
  state = dataclasses.replace(state, example_memory=kept)
  a, va = whole(state, {}, _batch())
  b, vb = parts(state, {}, _batch())
  for name, x in trees.named_leaves((a, va)):
    y = dict(trees.named_leaves((b, vb)))[name]
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_step_that_is_not_finite_keeps_every_bit(bad):
  rows = {'seen': phase_lib.MemorySpec((), window=1)}
  phase = toy.phase(ema={'slow': phase_lib.Ema('encoder', (0.5, 0.5))})
  state, update = _make(phase, rows)
  ones = np.ones(8, np.float32)
  state, _ = update(state, {}, _batch(weight=ones))
  after, values = update(state, {}, _batch(weight=ones * bad))
  for part in ('params', 'opt', 'ema', 'example_memory'):
    assert _same(getattr(state, part), getattr(after, part)), part
  assert after.step == 2
  assert (after.guard['skipped'], after.guard['streak']) == (1, 1)
  assert not np.isfinite(values['loss'])
  again, _ = update(after, {}, _batch(weight=ones))
  assert (again.guard['skipped'], again.guard['streak']) == (1, 0)
  assert not _same(again.params, after.params)


def test_a_spike_is_reported_and_skipped_if_asked():
  ones = np.ones(8, np.float32)
  for factor, taken in ((0.0, True), (5.0, False)):
    rows = {'seen': phase_lib.MemorySpec(())}
    state, update = _make(lr=1e-4, skip_spike=factor, rows=rows)
    for _ in range(5):
      state, _ = update(state, {}, _batch(weight=ones))
    after, values = update(state, {}, _batch(weight=ones * 100))
    assert values['spike'] > 10
    assert _same(state.params, after.params) != taken
    assert _same(state.example_memory, after.example_memory) != taken
    assert after.guard['skipped'] == (0 if taken else 1)


def test_ema_hand_numbers():
  phase = toy.phase(
    steps=100, ema={'e': phase_lib.Ema('encoder', (0.998, 1.0))}
  )
  ema = {'e': {'w': jnp.float32(1.0)}}
  for done, m in ((0, 0.998), (50, 0.999), (100, 1.0)):
    out = train_step._average(
      phase, ema, {'encoder': {'w': jnp.float32(2.0)}}, jnp.int32(done)
    )
    np.testing.assert_allclose(out['e']['w'], m + 2 * (1 - m), rtol=1e-6)
  phase = toy.phase(ema={'e': phase_lib.Ema('encoder', (0.9, 0.9))})
  out = train_step._average(
    phase, ema, {'encoder': {'w': jnp.float32(2.0)}}, jnp.int32(3)
  )
  np.testing.assert_allclose(out['e']['w'], 1.1, rtol=1e-6)


def test_ema_of_momentum_0_is_the_parameters():
  phase = toy.phase(ema={'e': phase_lib.Ema('encoder', (0.0, 0.0))})
  state, update = _make(phase)
  for i in range(3):
    state, _ = update(state, {}, _batch(i))
    assert _same(state.ema['e'], state.params['encoder'])


def test_ema_teacher_of_momentum_1_is_a_frozen_teacher():
  def run(source, ema, momentum=(1.0, 1.0)):
    teacher = phase_lib.Teacher(toy.Mean(), source, dtype='float32')
    kept = {'encoder': phase_lib.Ema('encoder', momentum)} if ema else {}
    phase = toy.phase(name='two', teachers={'t': teacher}, ema=kept)
    before = toy.phase(name='before')
    assert phase_lib.check((before, phase))[1] is phase
    state, update = _make_for(phase)
    teachers = (
      {} if ema else {'t': jax.tree.map(jnp.copy, state.params['encoder'])}
    )
    losses = []
    for i in range(5):
      state, values = update(state, teachers, _batch(i))
      losses.append(float(values['loss']))
    return losses

  frozen = run(phase_lib.FromPhase('before'), False)
  average = phase_lib.FromEma('encoder')
  assert run(average, True) == frozen
  assert run(average, True, (0.5, 0.5)) != frozen


def _make_for(phase, micro=1, lr=0.1):
  """Returns a state and its step: AdamW, or SGD if `lr` is not .1.

  Without `lr` the learning rate is the number of the step.
  """
  optim = optimizer.default()
  if lr != 0.1:
    optim.update(dict(rule='sgd', b1=0.0, clip=0.0))
  key = jax.random.key(0)
  video = jax.ShapeDtypeStruct((1, *VIDEO), jnp.uint8)
  shapes = jax.eval_shape(phase.init, key, video)
  labels = freezing.labels(shapes, ())
  tx = optimizer.make(
    optim,
    labels,
    lambda s: jnp.float32(s if lr is None else lr),
    lambda s: jnp.float32(0.0),
  )
  state = train_step.init_state(phase, tx, key, VIDEO, EXAMPLES)
  return state, jax.jit(
    train_step.make_update(
      phase,
      tx,
      labels,
      key=key,
      start=0,
      num_examples=EXAMPLES,
      accumulate=micro,
    )
  )


def test_the_first_leaf_that_is_not_finite_is_named():
  params = {'a': {'w': jnp.ones(3)}, 'b': {'w': jnp.array([1, jnp.inf])}}
  assert train_step.first_nonfinite(params) == 'b/w'
  assert train_step.first_nonfinite({'a': params['a']}) == ''


def test_a_sharded_step_gives_the_same_numbers():
  state, update = _make()
  mesh = sharding.make_mesh(2, -1)
  with jax.set_mesh(mesh):
    at = sharding.shardings(state, mesh)
    other = jax.device_put(state, at)
    _, phase_update = _make()
    sharded = train_step.jit_update(phase_update, other, {}, mesh)
    for i in range(3):
      state, a = update(state, {}, _batch(i))
      batch = Batch(**sharding.put_batch(_arrays(i), mesh))
      other, b = sharded(other, {}, batch)
      np.testing.assert_allclose(a['loss'], b['loss'], rtol=1e-5)
