import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vssl_jax.train import freezing, optimizer

H = optimizer.Horizon(100, 1000)


def _optim(**kwargs):
  optim = optimizer.default()
  optim.update(kwargs)
  return optim


def test_salt_schedule_in_numbers():
  optim = _optim(warmup=200)
  lr = optimizer.learning_rate(optim, H, 3072)
  np.testing.assert_allclose(lr(100), 2e-4, rtol=1e-6)
  np.testing.assert_allclose(lr(200), (2e-4 + 6.25e-4) / 2, rtol=1e-6)
  np.testing.assert_allclose(lr(300), 6.25e-4, rtol=1e-6)
  np.testing.assert_allclose(lr(700), (6.25e-4 + 1e-6) / 2, rtol=1e-5)
  np.testing.assert_allclose(lr(1100), 1e-6, rtol=1e-3)


def test_constant_schedule_cools_down_linearly():
  optim = _optim(schedule='constant', warmup=100, cooldown=200, lr_end=0.0)
  lr = optimizer.learning_rate(optim, H, 3072)
  np.testing.assert_allclose(lr(899), 6.25e-4, rtol=1e-6)
  np.testing.assert_allclose(lr(1000), 6.25e-4 / 2, rtol=1e-5)
  np.testing.assert_allclose(lr(1100), 0, atol=1e-9)


def test_learning_rate_scales_with_the_root_of_the_batch():
  lr = optimizer.learning_rate(_optim(warmup=0), H, 256)
  np.testing.assert_allclose(lr(100), 1.804e-4, rtol=1e-3)
  text = optimizer.describe_lr(_optim(), 256)
  assert text == 'lr = 0.000625 * (256/3072)^0.5 = 0.00018'
  linear = _optim(lr=1.5e-4, lr_batch=256, lr_power=1.0)
  assert optimizer.describe_lr(linear, 2048).endswith('= 0.0012')


def test_weight_decay_is_a_half_cosine():
  decay = optimizer.weight_decay(_optim(), H)
  np.testing.assert_allclose(
    [decay(100), decay(600), decay(1100)], [0.04, 0.22, 0.4], rtol=1e-5
  )


def test_warmup_as_long_as_the_phase_is_refused():
  with pytest.raises(ValueError, match='10000 steps in a phase'):
    optimizer.warmup_steps(_optim(warmup=10_000), H, 'x')
  assert optimizer.warmup_steps(_optim(), H) == 250
  assert optimizer.warmup_steps(_optim(), optimizer.Horizon(0, 240_000)) == (
    10_000
  )


def test_unknown_knobs_are_refused():
  with pytest.raises(ValueError, match="schedule: found 'nonsense'"):
    optimizer.learning_rate(_optim(schedule='nonsense'), H, 1)
  with pytest.raises(ValueError, match="clip_scope: found 'nonsense'"):
    zero = lambda s: jnp.float32(0)
    optimizer.make(_optim(clip_scope='nonsense'), {'a': 'train'}, zero, zero)
  with pytest.raises(ValueError, match="rule: found 'adam', wanted 'adamw'"):
    optimizer.make(_optim(rule='adam'), {'a': 'train'}, zero, zero)


def _grads(step):
  rng = np.random.default_rng(step)
  return {
    'encoder': {'kernel': rng.normal(size=(5, 3)).astype(np.float32)},
    'head': {'bias': rng.normal(size=(3,)).astype(np.float32)},
  }


def _run(optim, lr, wd, steps=5):
  params = jax.tree.map(jnp.asarray, _grads(100))
  labels = freezing.labels(params, ())
  tx = optimizer.make(
    optim, labels, lambda s: jnp.float32(lr), lambda s: jnp.float32(wd)
  )
  opt = tx.init(params)
  for step in range(steps):
    updates, opt = tx.update(_grads(step), opt, params, step=jnp.int32(step))
    params = optax.apply_updates(params, updates)
  return params


def test_adamw_against_numpy_with_joint_clipping():
  optim = _optim(clip=0.5)
  params = _run(optim, 0.1, 0.3)
  want, m, v = _grads(100), {}, {}
  leaves = [('encoder', 'kernel'), ('head', 'bias')]
  for t in range(1, 6):
    g = _grads(t - 1)
    norm = np.sqrt(sum(np.sum(g[a][b] ** 2) for a, b in leaves))
    for a, b in leaves:
      x = g[a][b] * min(1, 0.5 / norm)
      m[a] = 0.9 * m.get(a, 0) + 0.1 * x
      v[a] = 0.95 * v.get(a, 0) + 0.05 * x**2
      u = (m[a] / (1 - 0.9**t)) / (np.sqrt(v[a] / (1 - 0.95**t)) + 1e-8)
      decay = 0.3 * want[a][b] if b == 'kernel' else 0
      want[a][b] = want[a][b] - 0.1 * (u + decay)
  for a, b in leaves:
    np.testing.assert_allclose(params[a][b], want[a][b], rtol=2e-5, atol=1e-6)


def test_without_clipping_it_is_optax_adamw():
  params = _run(_optim(clip=0.0), 0.1, 0.3)
  tx = optax.adamw(
    0.1,
    0.9,
    0.95,
    1e-8,
    weight_decay=0.3,
    mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p),
  )
  want = jax.tree.map(jnp.asarray, _grads(100))
  opt = tx.init(want)
  for step in range(5):
    updates, opt = tx.update(_grads(step), opt, want)
    want = optax.apply_updates(want, updates)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, want
  )


def test_sgd_against_numpy():
  """Decay is in front of the momentum, as in torch."""
  params = _run(_optim(rule='sgd', clip=0.0), 0.1, 0.3)
  want = jax.tree.map(np.float64, _grads(100))
  for role, name, decay in (('encoder', 'kernel', 0.3), ('head', 'bias', 0.0)):
    x, speed = want[role][name], 0.0
    for t in range(5):
      speed = 0.9 * speed + _grads(t)[role][name] + decay * x
      x = x - 0.1 * speed
    np.testing.assert_allclose(params[role][name], x, rtol=1e-5, atol=1e-6)


def test_clipping_per_role_differs_from_joint():
  joint = _run(_optim(clip=1e-3), 0.1, 0.0, steps=3)
  apart = _run(_optim(clip=1e-3, clip_scope='per_role'), 0.1, 0.0, steps=3)
  # Joint clipping shrinks the small bias along with the large kernel; the
  # ratio of shrinking changes from step to step, so Adam sees other moments.
  assert not np.allclose(joint['head']['bias'], apart['head']['bias'])


def test_tokens_are_decayed_unless_told_otherwise():
  params = {
    'mask_token_0': jnp.ones((1, 3)),
    'norm': {'scale': jnp.ones((3,))},
    'positions': jnp.ones((2, 2, 2, 3)),
    'class_position': jnp.ones((1, 3)),
    'fc': {'kernel': jnp.ones((3, 3)), 'bias': jnp.ones((3,))},
  }
  on = optimizer.decayed(params, True)
  assert on == {
    'mask_token_0': True,
    'norm': {'scale': False},
    'positions': False,
    'class_position': False,
    'fc': {'kernel': True, 'bias': False},
  }
  assert not optimizer.decayed(params, False)['mask_token_0']
