import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssl_jax.evals import features
from vssl_jax.evals.probe import linear, train_heads
from vssl_jax.models import readout


def gaussians(n, seed, classes=3, tokens=2, gap=2.0, shuffle=False):
  """Classes along different axes, two tokens that each tell half."""
  rng = np.random.default_rng(seed)
  label = np.arange(n) % classes
  x = rng.normal(size=(n, tokens, 8))
  x[np.arange(n), label % tokens, label] += gap * tokens
  if shuffle:
    label = rng.permutation(label)
  return features.Table(
    x.astype(np.float32),
    label.astype(np.int32),
    np.arange(n, dtype=np.int32),
    np.zeros(n, np.int32),
  )


SETTINGS = train_heads.Settings(epochs=4, lrs=(3e-2, 1e-5), wds=(0.1, 0.01))
NETWORKS = {
  'linear': readout.Linear(3),
  'attentive': readout.Attentive(
    3, num_heads=2, self_blocks=1, dtype='float32'
  ),
}


def run(name, *, settings=SETTINGS, mesh=None, batch_size=32, **tables):
  tables = {'train': gaussians(300, 0), 'test': gaussians(150, 1)} | tables
  return train_heads.on_tables(
    NETWORKS[name],
    settings,
    **tables,
    batch_size=batch_size,
    key=jax.random.key(0),
    mesh=mesh,
  )


@pytest.mark.parametrize('name', NETWORKS)
def test_separable_classes_are_learned(name):
  found = run(name)
  assert found.total == 150
  summary = found.summary()
  assert summary['selected']['accuracy'] > 0.9
  low, high = summary['selected']['interval']
  assert low < summary['selected']['accuracy'] < high
  # The head that hardly learns is not the one chosen.
  assert found.pairs[found.selected][0] == 3e-2
  assert summary['max']['accuracy'] >= summary['selected']['accuracy']
  assert summary['heads'] == 4


def test_shuffled_labels_are_chance():
  found = run(
    'linear',
    train=gaussians(300, 0, shuffle=True, gap=0),
    test=gaussians(300, 1, gap=0),
  )
  assert abs(found.correct[found.selected] / found.total - 1 / 3) < 0.12


def test_held_out_videos_teach_nothing():
  """Wrong labels on the held-out videos change their score only."""
  train = gaussians(300, 0)
  out = train_heads.held_out(train.index, 0.1)
  wrong = features.Table(
    train.tokens,
    np.where(out, (train.label + 1) % 3, train.label).astype(np.int32),
    train.index,
    train.view,
  )
  right, other = run('linear'), run('linear', train=wrong)
  np.testing.assert_array_equal(right.correct, other.correct)
  assert right.held_total == other.held_total == out.sum()
  # The first two heads learned something.
  assert right.held[:2].min() > 0.9
  assert other.held[:2].max() < 0.1


def test_streamed_rows_leave_held_out_videos_out_too():
  """The same in the form that `run` uses: all rows pass by, some weigh 0."""
  train, test = gaussians(96, 0), gaussians(60, 1)
  out = train_heads.held_out(train.index, 0.1)

  def measure(tokens):
    rows = features.Table(tokens, train.label, train.index, train.view)
    return train_heads.measure(
      NETWORKS['linear'],
      SETTINGS,
      train_heads.Epochs(
        train=lambda epoch: rows.batches(32),
        steps=3,
        held=lambda: train.batches(32),
      ),
      test=lambda: test.batches(32),
      key=jax.random.key(0),
    )

  noise = np.random.default_rng(0).normal(size=train.tokens.shape)
  other = np.where(out[:, None, None], 100 * noise, train.tokens)
  found, changed = measure(train.tokens), measure(other.astype(np.float32))
  np.testing.assert_array_equal(found.held, changed.held)
  assert found.held_total == out.sum() > 0
  assert found.history[-1] == changed.history[-1]


def test_held_out_share_is_right_for_every_class_and_depends_on_number_only():
  index = np.arange(40_000)
  out = train_heads.held_out(index, 0.1)
  assert abs(out.mean() - 0.1) < 0.005
  for period in (2, 10, 34, 89):
    shares = [out[index % period == c].mean() for c in range(period)]
    assert min(shares) > 0.03
    assert max(shares) < 0.2
  np.testing.assert_array_equal(
    train_heads.held_out(index[777:], 0.1), out[777:]
  )
  assert not train_heads.held_out(index, 0.0).any()


@pytest.mark.slow
def test_devices_and_test_batches_change_nothing():
  mesh = jax.make_mesh(
    (2, 1),
    ('data', 'fsdp'),
    devices=jax.devices()[:2],
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
  )
  whole, split = run('attentive'), run('attentive', mesh=mesh)
  np.testing.assert_array_equal(whole.correct, split.correct)
  np.testing.assert_allclose(
    whole.history[-1]['loss'], split.history[-1]['loss'], atol=1e-5
  )
  for a, b in zip(whole.predictions, split.predictions, strict=True):
    np.testing.assert_array_equal(a, b)


def test_test_batch_size_changes_nothing():
  train, test = gaussians(64, 0), gaussians(30, 1, gap=0.3)

  def measure(size):
    return train_heads.measure(
      NETWORKS['attentive'],
      SETTINGS,
      train_heads.Epochs(train=lambda epoch: train.batches(32), steps=2),
      test=lambda: test.batches(size),
      key=jax.random.key(0),
    )

  four, eight = measure(4), measure(8)
  for a, b in zip(four.predictions, eight.predictions, strict=True):
    np.testing.assert_array_equal(a, b)
  assert four.history == eight.history
  assert four.total == 30


def test_a_single_head_is_trained_on_all_videos():
  """The labels of what would be held out matter to it."""
  train = gaussians(60, 0)
  out = train_heads.held_out(train.index, 0.3)
  wrong = features.Table(
    train.tokens,
    np.where(out, (train.label + 1) % 3, train.label).astype(np.int32),
    train.index,
    train.view,
  )
  one = train_heads.Settings(epochs=2, lrs=(3e-2,), wds=(0.1,), holdout=0.3)
  assert (one.held_out_fraction, SETTINGS.held_out_fraction) == (0.0, 0.1)
  right, other = (
    run('linear', settings=one, train=table, batch_size=60)
    for table in (train, wrong)
  )
  assert right.history[0]['loss'] != other.history[0]['loss']
  assert (right.selected, right.held_total, right.held) == (0, 0, None)
  assert right.summary()['selected'] == right.summary()['max']


def test_history_holds_one_entry_per_test():
  settings = train_heads.Settings(
    epochs=4, lrs=(1e-2,), wds=(0.1,), eval_every=2
  )
  found = run('linear', settings=settings)
  assert [entry['epoch'] for entry in found.history] == [2, 4]
  assert found.history[1]['loss'][0] < found.history[0]['loss'][0]


def test_a_table_smaller_than_the_batch_is_one_padded_batch():
  found = run('linear', train=gaussians(24, 0), batch_size=64)
  assert found.history[-1]['epoch'] == 4
  assert np.isfinite(found.history[-1]['loss']).all()


def test_no_gradient_reaches_the_encoder_and_its_parameters_stay():
  params = {'kernel': jnp.ones((3, 8))}
  before = jax.tree.map(np.asarray, params)
  rng = np.random.default_rng(0)
  batch = {
    'video': rng.integers(0, 256, (12, 2, 4, 4, 3), dtype=np.uint8),
    'label': np.arange(12) % 3,
    'index': np.arange(12),
  }

  def encode(video, params=params):
    mean = jnp.mean(jnp.asarray(video, jnp.float32), axis=(2, 3)) / 255
    return mean @ params['kernel']

  def through(params):
    rows = features.encode_batches(lambda video: encode(video, params), [batch])
    return sum(jnp.sum(r.tokens) for r in rows)

  np.testing.assert_array_equal(jax.grad(through)(params)['kernel'], 0)
  table = features.table(encode, [batch])
  linear.fit(table, table, classes=3, settings=SETTINGS)
  jax.tree.map(np.testing.assert_array_equal, before, params)


def test_unlabelled_test_videos_are_not_counted():
  test = gaussians(30, 1)
  test.label[:4] = -1
  assert run('linear', test=test).total == 26


def test_unknown_protocol_is_named():
  config = train_heads.default()
  config.protocol = 'attention'
  with pytest.raises(ValueError, match="found 'attention'"):
    train_heads.network(3, config, (2, 2, 2), 4)
