"""Micro-batches: what they share with one batch, and what they draw anew."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train import test_train_step, toy
from vssl_jax import methods, rngs
from vssl_jax.data.batch import Batch
from vssl_jax.methods import phase as phase_lib
from vssl_jax.train import freezing, optimizer, train_step

KEY, VIDEO, CLIPS, CLASSES = jax.random.key(3), (2, 16, 16, 3), 8, 3
QUIET = dict(drop_path=0.0, dropout=0.0, mixup=0.0, cutmix=0.0)
NOISY = dict(drop_path=0.5, dropout=0.5, mixup=0.8, cutmix=1.0)


ENCODERS = ['linear', pytest.param('vit', marks=pytest.mark.slow)]


class Linear(nn.Module):
  """An encoder of one product, which is quick to compile."""

  width: int = 8

  @nn.compact
  def __call__(self, video, deterministic=True):
    return nn.Dense(self.width)(video.reshape(len(video), 16, -1))


def _phase(encoder, **options):
  c = methods.default('supervised')
  c.vit.update(dict(patch=(2, 8, 8), dtype='float32'))
  small = dict(size='Ti', width=8, depth=2, num_heads=2, mlp_width=8)
  c.encoder.update(small)
  c.update(dict(classes=CLASSES, steps=4, head_scale=1.0) | options)
  (phase,) = methods.build(c, VIDEO, lambda _: None)
  if encoder == 'vit':
    return phase
  return dataclasses.replace(phase, encoder=Linear())


def _batch(same=False):
  rng = np.random.default_rng(0)
  video = rng.integers(0, 256, (CLIPS, *VIDEO), dtype=np.uint8)
  return Batch(
    video=video[:1].repeat(CLIPS, 0) if same else video,
    label=np.arange(CLIPS, dtype=np.int32) % CLASSES * (not same),
    substituted=np.zeros(CLIPS, bool),
    index=np.arange(CLIPS, dtype=np.int32),
    progress=np.float32(0),
  )


def _params(phase):
  clip = np.zeros((1, *VIDEO), np.uint8)
  return jax.jit(lambda: phase.init(KEY, clip))()


def _step(phase, micro, batch, number):
  """Returns the gradient of a train step: what SGD of rate 1 subtracts."""
  optim = optimizer.default()
  optim.update(dict(rule='sgd', b1=0.0, clip=0.0))
  params = _params(phase)
  labels = freezing.labels(params, ())
  tx = optimizer.make(
    optim, labels, lambda _: jnp.float32(1), lambda _: jnp.float32(0)
  )
  update = train_step.make_update(
    phase,
    tx,
    labels,
    key=KEY,
    start=0,
    num_examples=CLIPS,
    accumulate=micro,
  )
  guard = train_step.init_guard()
  state = train_step.TrainState(
    jnp.int32(number), params, tx.init(params), {}, {}, guard
  )
  after, metrics = jax.jit(update)(state, {}, batch)
  grads = jax.tree.map(lambda a, b: np.asarray(a - b), params, after.params)
  return float(metrics['loss']), grads


def _part(batch, m, micro):
  """The clips of micro-batch `m`: every `micro`-th one."""
  return jax.tree.map(lambda x: x[m::micro] if np.ndim(x) else x, batch)


def _gradient(phase):
  def loss(params, batch, number, micro_batch):
    rng = rngs.Rng(KEY, number, micro_batch)
    value, aux = phase.loss(params, {}, batch, rng)
    assert isinstance(aux, phase_lib.Aux)
    return value

  return jax.jit(jax.value_and_grad(loss))


def _close(found, wanted):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
    found,
    wanted,
  )


@pytest.mark.parametrize('encoder', ENCODERS)
def test_without_noise_the_gradient_is_that_of_the_whole_batch(encoder):
  phase, batch = _phase(encoder, **QUIET), _batch()
  whole, parts = (_step(phase, micro, batch, 5) for micro in (1, 4))
  _close(parts, whole)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise(toy.ToyPhase):
  """A loss whose slope is a number that is drawn for the batch."""

  def loss(self, params, teachers, batch, rng):
    slope = jax.random.uniform(rng.per_batch('noise'))
    return slope * jnp.sum(params['head']['bias']), phase_lib.Aux({})


@pytest.mark.parametrize('micro', [1, 2, 4])
def test_each_micro_batch_has_a_key_of_its_own(micro):
  phase, number = toy.phase(Noise), 5
  state, update = test_train_step._make_for(phase, micro, lr=1.0)
  state = dataclasses.replace(state, step=jnp.int32(number))
  after, _ = jax.jit(update)(state, {}, test_train_step._batch())
  key = rngs.Rng(jax.random.key(0), jnp.int32(number)).stream('noise')
  keys = [jax.random.fold_in(key, m) for m in range(micro)]
  drawn = [jax.random.uniform(k) for k in (keys if micro > 1 else [key])]
  assert len({float(x) for x in drawn}) == micro
  moved = state.params['head']['bias'] - after.params['head']['bias']
  np.testing.assert_allclose(moved, np.mean(drawn), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('encoder', ['linear', 'vit'])
def test_noise_is_drawn_anew_for_each_micro_batch(encoder):
  """The gradient is the mean of those of micro-batches with keys of their own.

  Clips are alike, so that the parts differ in what was drawn for them alone.
  """
  phase, batch, number = _phase(encoder, **NOISY), _batch(same=True), 5
  gradient, params = _gradient(phase), _params(phase)
  apart = [gradient(params, _part(batch, m, 2), number, m) for m in range(2)]
  mean = jax.tree.map(lambda a, b: (a + b) / 2, *apart)
  _close(_step(phase, 2, batch, number), mean)
  (first, _), (second, _) = apart
  assert abs(first - second) > 1e-3


def test_one_batch_draws_as_it_always_did():
  """The key of a step without micro-batches is that of the stream alone."""
  rng = rngs.Rng(KEY, jnp.int32(5))
  keys = [rng.per_batch('mix'), rng.stream('mix')]
  keys += [rngs.Rng(KEY, rng.step, m).per_batch('mix') for m in range(3)]
  data = [tuple(np.asarray(jax.random.key_data(k)).tolist()) for k in keys]
  assert data[0] == data[1] and len(set(data)) == 4
