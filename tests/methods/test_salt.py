import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssl_jax import losses, methods, rngs, trees
from vssl_jax.data import batch as batch_lib
from vssl_jax.masks import sampling, specs
from vssl_jax.methods import phase as phase_lib
from vssl_jax.methods import salt_config
from vssl_jax.models import predictor, vit

VIDEO = (4, 32, 32, 3)
GRID = (2, 4, 4)
VIT = dict(width=24, depth=2, num_heads=2, patch=(2, 8, 8), dtype='float32')
SPECS = specs.parse('short:8/12+long:4/20')


def _config(**sections):
  config = salt_config.default()
  config.vit.update(patch=(2, 8, 8), dtype='float32')
  small = dict(size='Ti', width=24, depth=2, num_heads=2, mlp_width=48)
  for name in ('pixel_teacher', 'latent_student'):
    config[name].encoder.update(small)
    config[name].masks = 'short:8/12+long:4/20'
    config[name].steps = 5
  head = dict(width=24, depth=1, num_heads=2)
  config.pixel_teacher.decoder.update(head)
  config.latent_student.predictor.update(head)
  for name, values in sections.items():
    section = config[name] if name != 'top' else config
    section.update(values)
  return config


def _build(**sections):
  def resolve(source):
    raise AssertionError(f'{source} is not outside')

  return methods.build(_config(**sections), VIDEO, resolve)


def _batch(size=3):
  rng = np.random.default_rng(0)
  return batch_lib.Batch(
    video=rng.integers(0, 255, (size, *VIDEO), dtype=np.uint8),
    index=np.arange(size, dtype=np.int32),
    progress=np.float32(0),
  )


def _rng(step=0):
  return rngs.Rng(jax.random.key(7), jnp.int32(step))


def _init(phase):
  init = jax.jit(lambda video: phase.init(jax.random.key(1), video))
  return init(_batch().video)


def _with_targets(phase, teachers, batch):
  """Returns the batch with the outputs of the teachers, as in a train step."""
  targets = phase.targets(teachers, batch.video)
  return dataclasses.replace(batch, targets=targets)


def _loss(phase):
  """(params, teachers, batch, step) -> loss and aux, compiled as a whole."""

  @jax.jit
  def loss(params, teachers, batch, step=0):
    batch = _with_targets(phase, teachers, batch)
    return phase.loss(params, teachers, batch, _rng(step))

  return loss


def _run(phase, teachers=None, params=None):
  params = _init(phase) if params is None else params
  return _loss(phase)(params, teachers or {}, _batch())


def test_pixel_loss_is_the_mean_over_masks_of_the_mean_squared_error():
  phase = _build()[0]
  batch = _batch()
  params = _init(phase)
  loss, aux = _run(phase, params=params)
  terms = []
  pixels = batch.video.astype(np.float64) / 255
  patches = pixels.reshape(3, 2, 2, 4, 8, 4, 8, 3)
  patches = patches.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(3, 32, 128, 3)
  patches = (patches - patches.mean(2, keepdims=True)) / (
    patches.std(2, ddof=1, keepdims=True) + 1e-6
  )
  target = patches.reshape(3, 32, 384)
  for token, spec in enumerate(SPECS):
    mask, _ = spec.draw(_rng(), batch, GRID)
    z = jax.jit(phase.encoder.apply)(
      {'params': params['encoder']}, batch.video, mask.visible
    )
    p = jax.jit(phase.decoder.apply, static_argnums=(3, 4))(
      {'params': params['decoder']}, z, mask, GRID, token
    )
    want = np.take_along_axis(target, np.asarray(mask.masked)[..., None], 1)
    terms.append(np.mean((np.asarray(p) - want) ** 2))
    np.testing.assert_allclose(
      aux.metrics[f'loss/pixel/{spec.name}'], terms[-1], rtol=1e-4
    )
  np.testing.assert_allclose(loss, np.mean(terms), rtol=1e-4)


SHAPE = (3, 32, 24)


class Fixed(nn.Module):
  """Stands for the teacher: the same tokens whatever the clip."""

  patch: tuple = (2, 8, 8)

  @nn.compact
  def __call__(self, video):
    return self.param('values', nn.initializers.ones, SHAPE)


class Oracle(nn.Module):
  """Stands for the predictor: returns the masked rows of its values."""

  @nn.compact
  def __call__(self, tokens, mask, grid, token=0):
    values = self.param('values', nn.initializers.zeros, SHAPE)
    return sampling.gather(values, mask.masked)


def _with_teacher(phase, module):
  teacher = dataclasses.replace(
    phase.teachers['target'], module=module, dtype='float32'
  )
  return dataclasses.replace(phase, teachers={'target': teacher})


def _latent(values, target, **kwargs):
  """The latent loss with fixed predictions and a fixed teacher."""
  phase = _with_teacher(_build(latent_student=kwargs)[1], Fixed())
  params = _init(phase)
  params = dict(params, predictor={'values': jnp.asarray(values)})
  phase = dataclasses.replace(phase, predictor=Oracle())
  teachers = {'target': {'values': jnp.asarray(target)}}
  return _loss(phase)(params, teachers, _batch())


def test_latent_loss_in_numpy():
  rng = np.random.default_rng(0)
  p = rng.normal(size=(3, 32, 24)).astype(np.float32)
  t = (5 * rng.normal(size=(3, 32, 24)) + 3).astype(np.float32)
  loss, aux = _latent(p, jnp.asarray(t))
  norm = (t - t.mean(-1, keepdims=True)) / np.sqrt(
    t.var(-1, keepdims=True) + 1e-6
  )
  terms = []
  for spec in SPECS:
    mask, _ = spec.draw(_rng(), _batch(), GRID)
    index = np.asarray(mask.masked)[..., None]
    difference = np.take_along_axis(p - norm, index, 1)
    terms.append(np.abs(difference).mean())
  # Equal weight for both masks although they hide 12 and 20 tokens.
  np.testing.assert_allclose(loss, np.mean(terms), rtol=1e-5)
  np.testing.assert_allclose(aux.metrics['target/std'], t.std(), rtol=1e-4)


def test_a_perfect_prediction_costs_nothing_and_zeros_cost_0_8():
  rng = np.random.default_rng(1)
  t = jnp.asarray(rng.normal(size=(3, 32, 24)), jnp.float32)
  perfect = losses.layer_norm0(t)
  assert _latent(perfect, t)[0] < 1e-6
  dead, _ = _latent(jnp.zeros_like(t), t)
  np.testing.assert_allclose(dead, np.sqrt(2 / np.pi), atol=0.03)
  raw, _ = _latent(t, t, target_norm='none')
  assert raw == 0


@pytest.mark.parametrize('scale', [0.1, 100.0])
def test_the_target_norm_takes_the_teachers_scale_away(scale):
  rng = np.random.default_rng(1)
  t = jnp.asarray(rng.normal(size=(3, 32, 24)), jnp.float32)
  p = jnp.asarray(rng.normal(size=(3, 32, 24)), jnp.float32)
  base_loss, _ = _latent(p, t)
  np.testing.assert_allclose(_latent(p, scale * t)[0], base_loss, rtol=1e-3)


def test_the_teacher_runs_once_for_all_masks():
  calls = []

  class Counted(Fixed):
    @nn.compact
    def __call__(self, video):
      calls.append(video.shape)
      return self.param('values', nn.initializers.ones, SHAPE)

  phase = _with_teacher(_build()[1], Counted())
  _run(phase, {'target': {'values': jnp.ones(SHAPE)}})
  assert calls == [(3, *VIDEO)]  # once, and on the whole clip


def _student(**kwargs):
  phase = _build(latent_student=kwargs)[1]
  video = _batch().video
  init = jax.jit(phase.teachers['target'].module.init)
  teacher = init(jax.random.key(9), video)
  return phase, {'target': teacher['params']}


def test_no_gradient_reaches_the_teacher():
  phase, teachers = _student(teacher_dtype='float32')
  params = _init(phase)
  loss = _loss(phase)
  grads = jax.jit(jax.grad(lambda t: loss(params, t, _batch())[0]))(teachers)
  assert all(not np.any(g) for g in jax.tree.leaves(grads))
  # And the loss does depend on it.
  moved = jax.tree.map(lambda x: x + 0.1, teachers)
  a = loss(params, teachers, _batch())[0]
  assert loss(params, moved, _batch())[0] != a


def test_masked_pixels_reach_the_loss_only_through_the_target():
  """With constant targets, hidden pixels have exactly no gradient."""
  phase, _ = _student()
  spec = phase.masks[0]
  phase = dataclasses.replace(_with_teacher(phase, Fixed()), masks=(spec,))
  teachers = {'target': {'values': jnp.ones(SHAPE)}}
  params = _init(phase)
  # Nothing is learned from a predictor that starts at zero output.
  params = jax.tree.map(lambda x: x + 0.01, params)

  def loss(video):
    batch = dataclasses.replace(_batch(), video=video)
    batch = _with_targets(phase, teachers, batch)
    return phase.loss(params, teachers, batch, _rng())[0]

  grad = np.asarray(
    jax.jit(jax.grad(loss))(_batch().video.astype(np.float32) / 255)
  )
  patches = np.asarray(losses.patchify(jnp.asarray(grad), (2, 8, 8)))
  touched = np.abs(patches).sum((2, 3)) > 0
  mask, _ = spec.draw(_rng(), _batch(), GRID)
  for row, visible in zip(touched, np.asarray(mask.visible), strict=True):
    assert set(np.flatnonzero(row)) == set(visible.tolist())


@pytest.mark.slow
def test_every_parameter_gets_a_gradient():
  student, teachers = _student()
  for phase in (_build()[0], student):
    params = _init(phase)
    params = jax.tree.map(lambda x: x + 0.01, params)
    loss = _loss(phase)
    grads = jax.jit(
      jax.grad(lambda p, loss=loss: loss(p, teachers, _batch())[0])
    )(params)
    for name, g in trees.named_leaves(grads):
      assert np.any(g), name


@pytest.mark.slow
def test_mask_tokens_are_shared_or_one_per_mask():
  for count in (1, 2):
    phase, teachers = _student(mask_tokens=count)
    params = _init(phase)
    tokens = [n for n in params['predictor'] if n.startswith('mask_token')]
    assert len(tokens) == count
    loss, _ = _loss(phase)(params, teachers, _batch())
    assert np.isfinite(loss)


@pytest.mark.slow
def test_the_loss_depends_on_seed_step_and_clip_only():
  phase, teachers = _student()
  batch = _batch(4)
  params = _init(phase)

  loss = _loss(phase)

  def at(batch, step=0):
    return float(loss(params, teachers, batch, step)[0])

  order = np.array([2, 0, 3, 1])
  shuffled = dataclasses.replace(
    batch, video=batch.video[order], index=batch.index[order]
  )
  np.testing.assert_allclose(at(shuffled), at(batch), rtol=1e-5)
  assert at(batch) == at(batch)
  assert abs(at(batch, 1) - at(batch)) > 1e-6
  other = dataclasses.replace(batch, index=batch.index + 100)
  assert abs(at(other) - at(batch)) > 1e-6


@pytest.mark.slow
def test_student_and_teacher_of_other_sizes():
  phase, _ = _student(
    encoder=dict(size='Ti', width=48, depth=1, num_heads=3, mlp_width=48)
  )
  video = _batch().video
  teacher = phase.teachers['target'].module
  assert (teacher.width, phase.encoder.width) == (24, 48)
  teachers = {'target': teacher.init(jax.random.key(0), video)['params']}
  params = _init(phase)
  assert params['predictor']['head']['kernel'].shape == (24, 24)
  assert np.isfinite(_run(phase, teachers, params=params)[0])


def test_a_teacher_on_another_grid_is_an_error_with_both_grids():
  phase, _ = _student()
  module = vit.make({**VIT, 'patch': (2, 16, 16)})
  phase = _with_teacher(phase, module)
  video = _batch().video
  teachers = {'target': module.init(jax.random.key(0), video)['params']}
  with pytest.raises(ValueError, match=r'8 tokens .* grid of \(2, 4, 4\) = 32'):
    _run(phase, teachers)


def test_chained_students_and_plans():
  first, second, third = _build(
    top=dict(phases=('pixel_teacher', 'latent_student', 'latent_student_2'))
  )
  for phase, before in ((second, first), (third, second)):
    source = phase_lib.FromPhase(before.name)
    assert phase.teachers['target'].source == source
  assert third.teachers['target'].module == second.encoder
  assert not second.carry
  names = ['pixel_teacher', 'latent_student', 'latent_student_2']
  assert [p.name for p in (first, second, third)] == names
  assert [p.steps for p in (first, second, third)] == [5, 5, 5]


def test_vjepa_is_a_student_of_its_own_average():
  (phase,) = _build(
    top=dict(phases=('latent_student',)),
    latent_student=dict(teacher='@ema/encoder', ema=(0.9, 1.0)),
  )
  assert phase.ema == {'encoder': phase_lib.Ema('encoder', (0.9, 1.0))}
  assert phase.teachers['target'].module.width == phase.encoder.width


@pytest.mark.parametrize(
  ('sections', 'message'),
  [
    (
      dict(top=dict(phases=('pixel_techer',))),
      r"phases: found \('pixel_techer',\), wanted .* each one of \('pixel_tea",
    ),
    (dict(top=dict(phases=())), 'method.phases is empty'),
    (
      dict(top=dict(phases=('latent_student',))),
      "latent_student.teacher: found '@pixel_teacher'",
    ),
    (dict(latent_student=dict(teacher='')), 'needs a source'),
    (dict(pixel_teacher=dict(steps=0)), 'of at least 1'),
    (dict(pixel_teacher=dict(masks='shrt')), "nearest is 'short"),
    (
      dict(pixel_teacher=dict(decoder=dict(kind='cnn'))),
      "decoder.kind: found 'cnn'",
    ),
    (dict(pixel_teacher=dict(pixel_loss='l3')), "pixel_loss: found 'l3'"),
    (dict(latent_student=dict(latent_loss='l3')), "latent_loss: found 'l3'"),
    (dict(latent_student=dict(target_norm='x')), "target_norm: found 'x'"),
    (dict(pixel_teacher=dict(pixel_norm='x')), "pixel_norm: found 'x'"),
    (dict(latent_student=dict(ema=(2.0, 1.0), teacher='@ema/e')), 'ema: found'),
  ],
)
def test_bad_configs_are_refused_by_name(sections, message):
  with pytest.raises(ValueError, match=message):
    _build(**sections)


def test_videomae_by_knobs():
  (phase,) = _build(
    top=dict(phases=('pixel_teacher',)),
    pixel_teacher=dict(
      masks='tube:0.75',
      mask_tokens=1,
      decoder=dict(kind='videomae', width=24, depth=1, num_heads=2),
    ),
    vit=dict(positions='sinusoid_1d', qkv_bias='qv', init='videomae'),
  )
  assert isinstance(phase.masks[0], specs.Tube)
  loss, aux = _run(phase)
  assert np.isfinite(loss)
  assert aux.metrics['mask/tube/visible_tokens'] == 8


def test_encode_is_the_encoder_with_its_final_norm():
  phase = _build()[1]
  video = _batch().video
  params = _init(phase)
  tokens = phase.encode(params, video)
  assert tokens.shape == (3, 32, 24)
  np.testing.assert_allclose(np.mean(tokens, -1), 0, atol=1e-5)
  assert isinstance(phase.predictor, predictor.Predictor)
