"""Training with labels: its loss in numpy, and what training switches on."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from vssl_jax import methods, rngs
from vssl_jax.data import batch as batch_lib
from vssl_jax.methods import mixup, supervised_config
from vssl_jax.models import classifier

VIDEO, CLASSES = (2, 8, 8, 3), 5
MIXES = {
  'labels': mixup.Mix(mixup=0.0, cutmix=0.0, smoothing=0.0),
  'smooth': mixup.Mix(mixup=0.0, cutmix=0.0, smoothing=0.1),
  'mixup': mixup.Mix(cutmix=0.0, smoothing=0.1),
  'cutmix': mixup.Mix(mixup=0.0, smoothing=0.1),
}
# Clips 0 and 5, 1 and 4, 2 and 3 are partners.
LABEL, UNKNOWN = np.array([0, 3, 1, 2, 2, 4]), np.array([0, 3, 1, -1, 2, 4])
NONE, SECOND = np.zeros(6, bool), np.arange(6) == 1
CASES = [
  # Label, substituted, the clips that count: alone, and when they are mixed.
  (LABEL, NONE, [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]),
  (UNKNOWN, NONE, [0, 1, 2, 4, 5], [0, 1, 4, 5]),
  (UNKNOWN, SECOND, [0, 2, 4, 5], [0, 5]),
  (LABEL, ~NONE, [], []),
]


class Pixels(nn.Module):
  """An encoder whose tokens are pixels."""

  def __call__(self, video, deterministic):
    return video.reshape(len(video), -1, 3)


class Linear(classifier.Classifier):
  """One product of all tokens."""

  @nn.compact
  def __call__(self, tokens, deterministic=True):
    x = tokens.reshape(len(tokens), -1)
    return x @ self.param('kernel', nn.initializers.normal(0.3), KERNEL)


KERNEL = (int(np.prod(VIDEO)), CLASSES)
KEY = jax.random.key(2)


def build(**knobs):
  """Returns the phase."""
  c = supervised_config.default()
  c.update(dict(steps=4, classes=CLASSES, head_scale=1.0))
  c.update(dict(drop_path=0.0, dropout=0.0, mixup=0.0, cutmix=0.0))
  c.vit.update(dict(patch=(2, 4, 4), dtype='float32'))
  small = dict(size='Ti', width=16, depth=2, num_heads=2, mlp_width=32)
  c.encoder.update(small)
  c.update(knobs)
  (phase,) = methods.build(c, VIDEO, {}.__getitem__)
  return phase


def batch(label=LABEL, substituted=NONE):
  shape = (6, *VIDEO)
  video = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
  given = batch_lib.Batch(
    video=video, index=np.arange(6), label=label, substituted=substituted
  )
  return jax.tree.map(jnp.asarray, given)


def mixed(given, drawn, smoothing):
  """Returns clips as rows of pixels, and targets: in numpy."""
  share, fade, (top, left, bottom, right) = map(np.asarray, drawn)
  video = np.asarray(given.video, np.float64) / 255
  cut = video.copy()
  cut[:, :, top:bottom, left:right] = video[::-1, :, top:bottom, left:right]
  hot = np.eye(CLASSES)[np.maximum(given.label, 0)]
  hot = (1 - smoothing) * hot + smoothing / CLASSES
  pixels = fade * cut + (1 - fade) * video[::-1]
  return pixels.reshape(6, -1), share * hot + (1 - share) * hot[::-1]


def cross_entropy(logits, target, kept):
  """Returns the mean over some clips, and its gradient by the logits."""
  log = scipy.special.log_softmax(logits, axis=1)
  each = -(target * log).sum(1)
  slope = np.exp(log) - target  # targets sum to 1
  weight = kept / max(kept.sum(), 1)
  return weight @ each, slope * weight[:, None]


@pytest.mark.parametrize('mix', MIXES)
def test_loss_and_gradient_in_numpy(mix):
  """A clip without a label, or of another video, is out, with its partner."""
  phase = dataclasses.replace(
    build(), encoder=Pixels(), head=Linear(CLASSES), mix=MIXES[mix]
  )
  rng = rngs.Rng(KEY, jnp.int32(6))
  drawn = mixup.draw(phase.mix, rng.stream('mix'), *VIDEO[1:3])
  assert mix in ('labels', 'smooth') or 0.1 < drawn.share < 0.9
  kernel = np.random.default_rng(1).normal(size=KERNEL) / 5

  @jax.jit
  def run(kernel, given):
    def loss(kernel):
      params = {'encoder': {}, 'head': {'kernel': kernel}}
      return phase.loss(params, {}, given, rng)

    return jax.value_and_grad(loss, has_aux=True)(kernel)

  for label, substituted, alone, both in CASES:
    clips = alone if mix in ('labels', 'smooth') else both
    given, kept = batch(label, substituted), np.isin(np.arange(6), clips)
    (found, aux), grad = run(jnp.float32(kernel), given)
    pixels, target = mixed(given, drawn, phase.mix.smoothing)
    logits = pixels @ kernel
    wanted, slope = cross_entropy(logits, target, kept)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_allclose(grad, pixels.T @ slope, rtol=1e-4, atol=1e-6)
    right = kept @ (logits.argmax(1) == target.argmax(1)) / max(kept.sum(), 1)
    np.testing.assert_allclose(aux.metrics['accuracy/mixed'], right, rtol=1e-6)
    assert aux.metrics['mix/share'] == drawn.share


@functools.cache
def _start():
  return jax.jit(lambda: build().init(KEY, batch().video))()


@pytest.mark.parametrize(
  ('knobs', 'differs'),
  [({}, False), ({'drop_path': 0.5}, True), ({'dropout': 0.5}, True)],
)
def test_dropout_is_on_in_training(knobs, differs):
  """Drop path of the encoder, dropout of the head: drawn anew every step."""
  phase, params = build(**knobs), _start()

  @jax.jit
  def loss(step):
    return phase.loss(params, {}, batch(), rngs.Rng(KEY, step))[0]

  first, again, other = (loss(jnp.int32(i)) for i in (1, 1, 2))
  assert first == again
  assert (abs(first - other) > 1e-4) == differs
