import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vssl_jax.evals.probe import head_grid
from vssl_jax.models import readout

RNG = np.random.default_rng(0)
LRS = (5e-3, 3e-3, 1e-3, 3e-4, 1e-4)
WDS = (0.8, 0.4, 0.1, 0.01)


def spec_of(network, lrs=LRS, wds=WDS, **kwargs):
  return head_grid.Spec(network, lrs, wds, **{'steps': 3, **kwargs})


def rows(batches=3, n=6, width=8):
  for _ in range(batches):
    tokens = RNG.normal(size=(n, 4, width)).astype(np.float32)
    label = RNG.integers(0, 3, size=n).astype(np.int32)
    yield jnp.asarray(tokens), jnp.asarray(label), jnp.ones(n)


def train(spec, batches, key=0):
  state = head_grid.init(spec, jax.random.key(key), batches[0][0])
  for batch in batches:
    state, loss = head_grid.update(spec, state, *batch)
  return state, loss


NETWORKS = {
  'attentive': readout.Attentive(
    3, num_heads=2, self_blocks=1, dtype='float32'
  ),
  'linear': readout.Linear(3),
}


@pytest.mark.parametrize(
  'name', ['linear', pytest.param('attentive', marks=pytest.mark.slow)]
)
def test_twenty_heads_at_once_are_twenty_heads_apart(name):
  network, batches = NETWORKS[name], list(rows())
  spec = spec_of(network)
  together, loss = train(spec, batches)
  assert loss.shape == (20,)
  first = head_grid.init(spec, jax.random.key(0), batches[0][0])

  def objective(p, s, tokens, label, weight):
    logits, new = network.apply(
      {'params': p, **s}, tokens, weight, True, mutable=list(s)
    )
    each = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    return each.mean(), dict(new)

  gradient = jax.jit(jax.grad(objective, has_aux=True))
  # Three of them, trained by optax, that know nothing of each other.
  for i in (0, 7, 19):
    lr, wd = spec.pairs[i]
    params, stats = jax.tree.map(lambda x, i=i: x[i], first[1:3])
    # Steps count from 1, as in V-JEPA's evaluation, and those of optax from 0.
    cosine = optax.cosine_decay_schedule(lr, 3)
    tx = optax.adamw(
      lambda count, cosine=cosine: cosine(count + 1),
      *(0.9, 0.999, 1e-8),
      weight_decay=wd,
    )
    opt = tx.init(params)
    for batch in batches:
      grads, stats = gradient(params, stats, *batch)
      steps, opt = tx.update(grads, opt, params)
      params = optax.apply_updates(params, steps)
    mine = jax.tree.map(lambda x, i=i: x[i], together.params)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), mine, params
    )


@pytest.mark.slow
def test_warmup_and_decay_of_matrices_alone_are_those_of_optax():
  network, batches = NETWORKS['attentive'], list(rows(5))
  spec = spec_of(network, (1e-2,), (0.5,), steps=5, warmup=2, decay='matrices')
  params = head_grid.init(spec, jax.random.key(0), batches[0][0]).params
  params = jax.tree.map(lambda x: x[0], params)
  tx = optax.adamw(
    optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 5),
    0.9,
    0.999,
    1e-8,
    weight_decay=0.5,
    mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree),
  )
  opt = tx.init(params)

  def objective(p, tokens, label, weight):
    logits = network.apply({'params': p}, tokens, weight)
    return head_grid.cross_entropy(logits, label, weight)

  gradient = jax.jit(jax.grad(objective))
  for batch in batches:
    steps, opt = tx.update(gradient(params, *batch), opt, params)
    params = optax.apply_updates(params, steps)
  found, _ = train(spec, batches)
  mine = jax.tree.map(lambda x: x[0], found.params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), mine, params
  )
  plain, _ = train(dataclasses.replace(spec, decay='all'), batches)
  bias = lambda state: np.asarray(state.params['head']['bias'])
  assert np.abs(bias(plain) - bias(found)).max() > 1e-5


def test_heads_drop_different_values():
  network = readout.CrossAttention(
    3, (2, 2, 1), 2, width=8, num_heads=2, dropout=0.5, dtype='float32'
  )
  spec = spec_of(network, (1e-3,), (0.0, 0.0))
  (batch,) = rows(1)
  state = head_grid.init(spec, jax.random.key(0), batch[0])
  # The same head twice, so that only what is dropped can tell them apart.
  same = jax.tree.map(lambda x: jnp.stack([x[0], x[0]]), state.params)
  losses = []
  for key in (1, 1, 2):
    begin = jax.tree.map(jnp.copy, state._replace(params=same))
    _, loss = head_grid.update(spec, begin, *batch, jax.random.key(key))
    losses.append(loss)
  np.testing.assert_array_equal(losses[0], losses[1])
  assert losses[0][0] != losses[0][1]
  assert losses[0][0] != losses[2][0]


def test_heads_start_apart_and_move():
  spec = spec_of(NETWORKS['linear'], (1e-3,), (0.0, 0.0))
  batches = list(rows())
  start = head_grid.init(spec, jax.random.key(0), batches[0][0])
  kernel = np.asarray(start.params['head']['kernel'])
  assert (kernel[0] != kernel[1]).all()
  end, _ = train(spec, batches)
  moved = np.abs(end.params['head']['kernel'] - kernel)
  assert (moved > 0).all()
  assert moved.max() < 4e-3


@pytest.mark.parametrize(
  'name', ['linear', pytest.param('attentive', marks=pytest.mark.slow)]
)
def test_groups_change_nothing(name):
  batches = list(rows())
  whole = train(spec_of(NETWORKS[name]), batches)
  spec = spec_of(NETWORKS[name], groups=5)
  parts = train(spec, batches)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, parts
  )
  np.testing.assert_allclose(
    head_grid.predict(spec, parts[0], batches[0][0]),
    head_grid.predict(
      dataclasses.replace(spec, groups=1), whole[0], batches[0][0]
    ),
    atol=1e-6,
  )


def test_padding_and_unlabelled_rows_teach_nothing():
  spec = spec_of(NETWORKS['linear'], (1e-3,), (0.1,))
  (batch,) = rows(1)
  tokens, label, weight = batch
  short = [(tokens[:4], label[:4], weight[:4])]
  padded = [(tokens, label, weight.at[4:].set(0))]
  unknown = [(tokens, label.at[4:].set(-1), weight)]
  wanted, _ = train(spec, short)
  for batches in (padded, unknown):
    found, _ = train(spec, batches)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), wanted, found
    )
  other, _ = train(spec, [batch])
  assert (
    np.asarray(other.params['head']['kernel'])
    != np.asarray(wanted.params['head']['kernel'])
  ).any()


def test_predictions_are_probabilities_per_row_and_head():
  spec = spec_of(NETWORKS['linear'])
  (batch,) = rows(1)
  state, _ = train(spec, [batch])
  found = head_grid.predict(spec, state, batch[0])
  assert found.shape == (6, 20, 3)
  np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)


def test_impossible_specs_are_refused():
  with pytest.raises(ValueError, match='divisor of the 20 heads'):
    spec_of(NETWORKS['linear'], groups=3)
  with pytest.raises(ValueError, match='0 training steps'):
    spec_of(NETWORKS['linear'], steps=0)
  with pytest.raises(ValueError, match=r'probe\.warmup: found 3'):
    spec_of(NETWORKS['linear'], warmup=3)
  with pytest.raises(ValueError, match=r"probe\.decay: found 'none'"):
    spec_of(NETWORKS['linear'], decay='none')


@pytest.mark.slow
def test_groups_need_less_memory():
  """Beside the heads themselves, about a share of it."""
  network = readout.Attentive(50, num_heads=4, dtype='float32')
  scratch, copies = [], []
  for groups in (1, 5):
    spec = head_grid.Spec(network, (1e-3,) * 5, (0.1, 0.2), 10, groups)
    tokens = jax.ShapeDtypeStruct((8, 16, 64), jnp.float32)
    state = jax.eval_shape(
      lambda t, s=spec: head_grid.init(s, jax.random.key(0), t), tokens
    )
    held, numbers = tuple(state[1:]), jax.ShapeDtypeStruct((10,), jnp.float32)
    whole = (held, (numbers,) * 2 + (state.step.update(shape=(10,)),))
    one = jax.eval_shape(
      lambda x, s=spec: head_grid._group(s, jnp.int32(0), x), whole
    )
    rows = (jax.ShapeDtypeStruct((8,), d) for d in (jnp.int32, jnp.float32))
    lowered = head_grid.step.lower(spec, *one, state.step, tokens, *rows)
    scratch.append(lowered.compile().memory_analysis().temp_size_in_bytes)
    put = head_grid._put.lower(spec, state.step, held, one[0]).compile()
    copies.append(put.memory_analysis().temp_size_in_bytes)
  assert scratch[1] < 0.3 * scratch[0]
  assert max(copies) < 0.01 * scratch[0]  # put where they lie
