"""The image MAE that a run trains first: its loss and gradient in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssl_jax import losses, methods, rngs
from vssl_jax.data import batch as batch_lib
from vssl_jax.masks import tubelets
from vssl_jax.methods import distillation_teachers
from vssl_jax.utils import colours

VIDEO, SIDE, RNG = (4, 16, 16, 3), 8, rngs.Rng(jax.random.key(0), jnp.int32(3))


def _phase(norm):
  c = methods.default('pmd')
  c.vit.update(dict(patch=(2, SIDE, SIDE), dtype='float32'))
  section = c.image_teacher
  section.encoder.update(
    dict(size='Ti', width=16, depth=1, num_heads=2, mlp_width=16)
  )
  section.decoder.update(dict(width=16, depth=1, num_heads=2))
  section.update(dict(masks='frames:0.5', pixel_norm=norm))
  return distillation_teachers.image_teacher(
    'image_teacher', c, VIDEO, colours.of(3)
  )


def _batch():
  """Clips with colours of their own, so that means of channels differ."""
  rng = np.random.default_rng(0)
  tint = rng.uniform(0, 150, (2, 1, 1, 1, 3))
  video = (tint + rng.uniform(0, 100, (2, *VIDEO))).astype(np.uint8)
  return batch_lib.Batch(video=jnp.asarray(video), index=jnp.arange(2))


def _targets(video, norm):
  """MAE: normalised images, patches of 8 x 8, (patch - mean) / deviation."""
  mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
  frames = (np.asarray(video, np.float64)[:, ::2] / 255 - mean) / std
  out = []
  for clip in frames:
    for frame in clip:
      for y in range(0, 16, SIDE):
        for x in range(0, 16, SIDE):
          patch = frame[y : y + SIDE, x : x + SIDE].reshape(-1)
          if norm == 'patch':
            patch = patch - patch.mean()
            patch /= np.sqrt((patch**2).sum() / (patch.size - 1) + 1e-6)
          out.append(patch)
  return np.stack(out).reshape(2, 8, -1)


@pytest.mark.slow
@pytest.mark.parametrize('norm', ['patch', 'none'])
def test_the_image_teacher_predicts_what_it_sees(norm):
  """A decoder that gives its last bias whatever it sees: loss and gradient."""
  phase, batch = _phase(norm), _batch()
  params = jax.eval_shape(
    lambda v: phase.init(jax.random.key(1), v), batch.video
  )
  params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params)
  bias = np.random.default_rng(1).normal(size=3 * SIDE**2).astype(np.float32)

  def loss(bias):
    decoder = dict(params['decoder'])
    decoder['head'] = dict(decoder['head'], bias=bias)
    given = dict(params, decoder=decoder)
    return phase.loss(given, {}, batch, RNG)[0]

  found, slope = jax.jit(jax.value_and_grad(loss))(bias)
  (spec,) = phase.masks
  mask, _ = spec.draw(RNG, batch, (2, 2, 2))
  targets = _targets(batch.video, norm)
  hidden = np.stack([t[i] for t, i in zip(targets, mask.masked, strict=True)])
  apart = bias - hidden
  np.testing.assert_allclose(found, np.mean(apart**2), rtol=1e-5)
  wanted = 2 * apart.sum((0, 1)) / apart.size
  np.testing.assert_allclose(slope, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('norm', ['patch', 'none', 'patch_channel'])
def test_pictures_of_what_is_predicted_are_in_the_colours_of_the_clip(norm):
  """A perfect prediction is drawn as the targets of the raw frames."""
  phase, batch = _phase(norm), _batch()
  (spec,) = phase.masks
  mask, _ = spec.draw(RNG, batch, (2, 2, 2))
  own = phase._pixel_targets(batch.video)
  perfect = jnp.take_along_axis(own, mask.masked[:, :, None], axis=1)
  with pytest.MonkeyPatch.context() as patch:
    given = [(spec, mask, {}, perfect)]
    patch.setattr(type(phase), '_predicted', lambda *_, **__: given)
    shown = phase.reconstruct({}, batch, RNG)[spec.name]
  raw = losses.pixel_targets(
    tubelets.to_unit(batch.video[:, ::2]), (1, SIDE, SIDE), norm
  )
  wanted = jnp.take_along_axis(raw, mask.masked[:, :, None], axis=1)
  np.testing.assert_allclose(shown.predicted, wanted, atol=2e-5)
  assert (shown.every, shown.kind) == (2, norm)
