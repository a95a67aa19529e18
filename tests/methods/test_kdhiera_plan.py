"""KDHiera's phases, sizes and costs at full scale; Hiera-MAE as a case of it;
configs that are refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods import kdhiera_small as small
from tests.methods import pmd_numpy as vits
from tests.methods import pmd_small
from vssl_jax import losses, methods, trees
from vssl_jax.data import batch as batch_lib
from vssl_jax.masks import hiera_units
from vssl_jax.methods import kdhiera_config, masked_pixels
from vssl_jax.models import framewise, vit
from vssl_jax.models.hiera import encoder
from vssl_jax.utils import ranges
from vssl_jax.visualize import reconstructions

CLIP, UNITS = (16, 224, 224, 3), (8, 7, 7)
LAYERS = {'B': (3, 6, 9, 12), 'L': (6, 12, 18, 24)}


def _module(source):
  size, kind = source
  if kind == 'v':
    return vit.make(size, positions='sinusoid_1d', qkv_bias='qv')
  image = vit.make(
    size, patch=(1, 16, 16), positions='sincos_2d', class_token=True
  )
  return framewise.Framewise(image, 2)


MAE = dict(objective='pixels', units='random', teachers=(), depth=8)


@functools.cache
def _phases(size, **knobs):
  c = kdhiera_config.default()
  c.encoder.size = size
  layers = knobs.pop('layers', LAYERS[size])
  for name in ('image', 'video'):
    c[name].teacher, c[name].layers = size + name[0], layers
  c.decoder.depth = knobs.pop('depth', 2)
  c.update(knobs)
  return methods.build(c, CLIP, _module)


def test_the_phase():
  (phase,) = _phases('B')
  assert (phase.name, phase.carry) == ('distill', ())
  assert {n: str(t.source) for n, t in phase.teachers.items()} == {
    'image': 'Bi', 'video': 'Bv',
  }  # fmt: skip
  assert {t.dtype for t in phase.teachers.values()} == {'bfloat16'}
  assert phase.mask_teacher == 'image' and phase.compared == 'visible'
  assert [spec.counts(UNITS) for spec in phase.masks] == [(40, 352)]
  assert phase.encoder.q_pool == 2 and phase.encoder.unit_grid((1, *CLIP)) == (
    UNITS
  )
  for pairs in phase.pairs.values():
    assert pairs == tuple((f'stage_{i}', 3 * i, 0.25) for i in (1, 2, 3, 4))
  (low, text) = phase.alarms['mask/attention_kept']
  assert low == pytest.approx(1.1 * 40 / 392) and 'cls' in text


def test_parameters_of_the_heads():
  """Invariant 14: counted by hand for Hiera-B and a teacher of 768 channels."""
  (phase,) = _phases('B')
  clip = np.zeros((1, *CLIP), np.uint8)
  shapes = jax.eval_shape(lambda: phase.init(pmd_small.KEY, clip))
  assert {n: trees.count(x) for n, x in shapes.items()} == {
    'encoder': 50_783_424,
    'heads_image': 2_666_304,
    'heads_video': 2_666_304,
  }
  sizes = dict(stage_1=1_180_416, stage_2=590_592, stage_3=295_680,
               stage_4=590_592)  # fmt: skip
  for name, count in sizes.items():
    assert trees.count(shapes['heads_image'][name]) == count


@pytest.mark.parametrize(
  ('size', 'knobs', 'tera', 'trained'),
  [
    ('B', {}, 0.71, 0.065444),
    ('L', {}, 2.43, 0.250588),
    ('B', dict(objective='masked', depth=8, layers=(12,)), 1.43, None),
    ('L', dict(objective='masked', depth=8, layers=(24,)), 3.15, None),
    ('B', MAE, 0.4217, None),
    ('L', MAE, 0.5994, None),
  ],
)
def test_cost_of_a_step(size, knobs, tera, trained):
  """TFLOP per clip, by true token counts; teachers are most of it."""
  (phase,) = _phases(size, **knobs)
  cost = phase.cost(CLIP)
  assert cost.total / 1e12 == pytest.approx(tera, rel=0.005)
  if trained:
    assert cost.trained / 1e12 == pytest.approx(trained, rel=1e-4)
  frozen = {'B': 2 * 320.8e9, 'L': 2 * (492.4e9 + 596.8e9)}[size]
  wanted = 0.0 if knobs.get('teachers') == () else frozen
  assert cost.frozen == pytest.approx(wanted, rel=1e-3)


def test_several_masks_cost_the_teachers_once():
  one, three = (small.build(masks_per_clip=n)[0] for n in (1, 3))
  assert [s.name for s in three.masks] == ['1', '2', '3']
  costs = [phase.cost(small.VIDEO) for phase in (one, three)]
  assert costs[1].frozen == costs[0].frozen > 0
  assert costs[1].trained == pytest.approx(3 * costs[0].trained)


def test_teachers_from_nothing():
  """They are phases of the run, and have no class token to look through."""
  own = dict(
    image=dict(teacher='@image_teacher'), video=dict(teacher='@video_teacher')
  )
  image, video, last = small.build(scores='column_mean', **own)
  assert isinstance(image, masked_pixels.PixelPhase)
  assert (image.name, video.name) == ('image_teacher', 'video_teacher')
  assert last.teachers['image'].module.image.width == 16
  assert last.carry == ()
  with pytest.raises(ValueError, match="scores: found 'cls', and the image te"):
    small.build(**own)


def test_a_teacher_for_the_mask_alone():
  """Its layers are not followed; without scores nobody is asked."""
  (phase,) = small.build(teachers=('video',))
  assert set(phase.teachers) == {'image', 'video'} and {*phase.heads} == {
    'video'
  }
  (phase,) = small.build(teachers=('video',), scores='uniform')
  assert set(phase.teachers) == {'video'} and phase.mask_teacher == ''
  assert phase.masks[0].mode == 'uniform' and not phase.alarms
  (phase,) = small.build(units='random')
  assert phase.mask_teacher == '' and phase.masks[0].mode == 'random'
  assert not small.build(selection='low')[0].alarms


def test_weights_load_into_a_model_with_one_token_a_unit():
  """Invariant 11: no leaf is missing, none is left over, none has changed."""
  (phase,) = small.build()
  clip = small.clip()
  trees_of = [
    jax.eval_shape(phase.encoder.clone(q_pool=n).init, pmd_small.KEY, clip)
    for n in (2, 3)
  ]
  assert not trees.difference(*trees_of)


@functools.cache
def _mae():
  (phase,) = small.build(**small.MAE)
  params = small.params(phase)
  phase, params['encoder'] = small.speaking(phase)
  return phase, params, small.batch()


def test_hiera_mae_is_a_case():
  """Invariant 13: random units, pixels of a token's first frame, no teacher."""
  phase, params, batch = _mae()
  assert not phase.teachers and set(params) == {'encoder', 'heads_pixels'}
  assert phase.masks[0].counts(small.UNITS) == (4, 8)

  @jax.jit
  def run(params):
    rng = small.step()
    loss, aux = phase.loss(params, {}, batch, rng)
    mask, _ = phase.masks[0].draw(rng, batch, small.UNITS)
    ends = phase.encoder.apply(
      {'params': params['encoder']}, batch.video, mask.visible, features=True
    )
    head = {'params': params['heads_pixels']}
    predicted = phase.heads['pixels'].apply(head, ends, mask, small.UNITS)
    return (
      loss,
      aux.metrics,
      mask,
      predicted,
      phase.reconstruct(params, batch, rng)['']._replace(kind=0, every=0),
    )

  loss, metrics, mask, predicted, drawn = run(params)
  wanted = hiera_units.random_units(
    small.step().per_example('mask', batch), small.UNITS, 0.6
  )
  np.testing.assert_array_equal(mask.visible, wanted.visible)
  # Pixels of 8x8 patches, row by row, as the encoder sees them, normalised
  # over all their values.
  frames = np.float64(batch.video[:, ::2]) / 255
  raw = frames.reshape(2, 2, 4, 8, 6, 8, 3).transpose(0, 1, 2, 4, 3, 5, 6)
  raw = raw.reshape(2, 48, 64, 3)
  x = ((raw - vits.MEAN) / vits.STD).reshape(2, 48, 192)
  spread = np.sqrt(x.var(-1, ddof=1, keepdims=True) + 1e-6)
  middle = x.mean(-1, keepdims=True)
  x = (x - middle) / spread
  tokens = np.asarray(hiera_units.expand_units(mask.masked, small.UNITS))
  target = np.take_along_axis(x, tokens[..., None], 1)
  np.testing.assert_allclose(
    loss, np.mean((predicted - target) ** 2), rtol=1e-5
  )
  assert loss == metrics['loss/pixels/patch']
  # The picture has the same pixels, in the order of tokens.
  hidden = np.asarray(drawn.mask.masked)
  assert np.all(np.diff(hidden, axis=1) > 0)
  place = np.argsort(tokens, 1)[..., None]
  colours = np.take_along_axis(np.asarray(predicted), place, 1)
  colours = colours * np.take_along_axis(spread, hidden[..., None], 1)
  colours = colours + np.take_along_axis(middle, hidden[..., None], 1)
  colours = colours.reshape(2, 32, 64, 3) * vits.STD + vits.MEAN
  truth = np.take_along_axis(raw, hidden[..., None, None], 1)
  shown = reconstructions.restore(np.asarray(drawn.predicted), truth, 'patch')
  np.testing.assert_allclose(shown, colours, atol=1e-4)


@pytest.mark.slow
def test_masked_features_are_predicted_by_one_decoder_for_each_teacher():
  """Option b: channels of the head are those of the layers, side by side."""
  (phase,) = small.build(
    objective='masked',
    image=dict(layers=(2, 4)),
    video=dict(layers=(1, 4)),
    feature_loss='mse',
  )
  params, teachers = small.params(phase), small.teachers(phase)
  batch = small.batch()
  assert {n: h.out_width for n, h in phase.heads.items()} == {
    'image': 48, 'video': 32,
  }  # fmt: skip

  @jax.jit
  def run(params, teachers):
    rng = small.step()
    targets = phase.targets(teachers, batch.video)
    scores = targets['scores']
    mask, _ = phase.masks[0].draw(rng, batch, small.UNITS, scores)
    ends = phase.encoder.apply(
      {'params': params['encoder']}, batch.video, mask.visible, features=True
    )
    head = {'params': params['heads_image']}
    said = phase.heads['image'].apply(head, ends, mask, small.UNITS)
    given = dataclasses.replace(batch, targets=targets)
    return phase.loss(params, teachers, given, rng), targets, mask, said

  (loss, aux), targets, mask, said = run(params, teachers)
  tokens = hiera_units.expand_units(mask.masked, small.UNITS)
  norm = losses.TARGET_NORMS['ln']
  for i, layer in enumerate((2, 4)):
    x = jnp.take_along_axis(targets[f'image/{layer}'], tokens[..., None], 1)
    wanted = jnp.mean((said[..., 24 * i : 24 * i + 24] - norm(x)) ** 2)
    np.testing.assert_allclose(
      aux.metrics[f'loss/image/layer_{layer:02d}'], wanted, rtol=1e-5
    )
  terms = [x for n, x in aux.metrics.items() if n.startswith('loss/')]
  assert len(terms) == 4
  np.testing.assert_allclose(loss, sum(terms) / 2, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('scores', 'mask_teacher'),
  [('feature_norm', 'image'), ('column_mean', 'video')],
)
def test_other_scores(scores, mask_teacher):
  (phase,) = small.build(scores=scores, mask_teacher=mask_teacher)
  teachers = small.teachers(phase)
  video = small.batch().video

  @jax.jit
  def run(teachers):
    teacher = phase.teachers[mask_teacher]
    seen = teacher(teachers[mask_teacher], video, attention_to='column_mean')
    return phase.targets(teachers, video), seen[1]

  made, wanted = run(teachers)
  if scores == 'feature_norm':
    wanted = np.linalg.norm(made['image/4'], axis=-1)
  pooled = np.asarray(wanted).reshape(2, 2, 2, 2, 3, 2).mean((3, 5))
  np.testing.assert_allclose(made['scores'], pooled.reshape(2, 2, 6), rtol=1e-4)


@pytest.mark.slow
def test_a_whole_step_of_the_smallest_hiera():
  """Invariant 16: Hiera-T, 8 frames of 64x64, units (4, 2, 2), on a CPU."""
  c = small.config(mask_ratio=0.5)
  c.encoder.update(dict(size='T', channels=0, depths=(), num_heads=0))
  c.hiera.update(dict(kernel=(3, 7, 7), stride=(2, 4, 4), padding=(1, 3, 3)))
  c.vit.patch = (2, 16, 16)
  modules = {
    'images': small.IMAGE.clone(patch=(1, 16, 16)),
    'videos': small.VIDEO_MODEL.clone(patch=(2, 16, 16)),
  }
  video = (8, 64, 64, 3)
  (phase,) = methods.build(c, video, modules.__getitem__)
  assert phase.encoder.unit_grid((1, *video)) == (4, 2, 2)
  clips = np.random.default_rng(0).integers(0, 256, (2, *video), np.uint8)
  params = jax.jit(lambda: phase.init(pmd_small.KEY, clips[:1]))()
  teachers = {
    n: jax.jit(lambda t=t: t.module.init(pmd_small.KEY, clips[:1]))()['params']
    for n, t in phase.teachers.items()
  }
  batch = batch_lib.Batch(video=clips, index=np.arange(2))

  @jax.jit
  @jax.value_and_grad
  def run(params):
    given = small.with_targets(phase, teachers, batch)
    return phase.loss(params, teachers, given, small.step())[0]

  loss, grads = run(params)
  assert 0 < loss < 8
  for name, grad in trees.named_leaves(grads):
    assert np.isfinite(grad).all(), name
  tokens = jax.jit(lambda p: phase.encode(p, clips))(params)
  assert tokens.shape == (2, 64, 768)
  np.testing.assert_allclose(np.mean(tokens, -1), 0, atol=1e-4)
  np.testing.assert_allclose(np.std(tokens, -1), 1, rtol=1e-3)


@pytest.mark.parametrize(
  ('knobs', 'message'),
  [
    (dict(teachers=()), r'method.teachers: found \(\).* or method.objective'),
    (dict(teachers=('sound',)), 'method.teachers: found .*sound'),
    (dict(image=dict(teacher='')), "method.image.teacher: found ''; .*random"),
    (dict(image=dict(layers=(1, 2, 3, 5))), 'wanted some of 1 to 4, the teach'),
    (dict(image=dict(layers=())), r'method.image.layers: found \(\)'),
    (dict(image=dict(layers=(1, 1, 2, 3))), 'one of them twice'),
    (dict(stages=(1, 2)), r'method.stages: found \(1, 2\) for .*wanted one of'),
    (dict(stages=(1, 2, 3, 5)), 'method.stages: found .*5'),
    (dict(layer_weights=(1.0,)), r'method.layer_weights: found \(1.0,\)'),
    (dict(layer_weights=(0.0,) * 4), 'and not all 0'),
    (dict(image=dict(weight=-1.0)), r'method.image.weight: found -1.0'),
    (dict(encoder=dict(size='Q')), "method.encoder.size: found 'Q'"),
    (dict(units='random', tube=True), 'method.tube: found True'),
    (dict(hiera=dict(padding=(0, 0, 0))), r'padding=\(0, 0, 0\); wanted'),
    (dict(masks_per_clip=0), 'masks_per_clip: found 0, wanted an integer'),
    (dict(mask_ratio=0.1), 'mask_ratio 0.1 .*leaves 6 of 6'),
    *(
      ({knob: 'x'}, f"method.{knob}: found 'x', wanted one of")
      for knob, (_, span) in kdhiera_config.KEYS.flat()
      if isinstance(span, ranges.Choice) and '.' not in knob
    ),
  ],
)  # fmt: skip
def test_bad_configs_are_refused_by_name(knobs, message):
  with pytest.raises(ValueError, match=message):
    small.build(**knobs)


def test_a_hiera_cannot_teach():
  config = kdhiera_config.default()
  config.image.teacher, config.video.teacher = 'images', 'videos'
  teacher = encoder.make('T')
  for given in (
    framewise.Framewise(encoder.make('T', **encoder.IMAGE)),
    teacher,
  ):
    there = {'images': given, 'videos': teacher}
    with pytest.raises(ValueError, match='found a Hiera'):
      methods.build(config, CLIP, there.__getitem__)


def test_masks_by_chance_ask_no_teacher():
  (phase,) = small.build(selection='uniform', teachers=('video',))
  assert list(phase.teachers) == ['video'] and not phase.mask_teacher


@pytest.mark.parametrize(
  ('patch', 'message'),
  [
    ((2, 16, 16), "teacher 'video' gives 12 tokens"),
    # As many as the student has.
    ((2, 16, 4), r'48 tokens .*grid \(2, 2, 12\).* grid of \(2, 4, 6\) = 48'),
  ],
)
def test_a_teacher_of_another_grid_is_refused(patch, message):
  other = vit.make(
    dict(width=16, **small.SHAPE), patch=patch, positions='sinusoid_1d',
    qkv_bias='qv', dtype='float32',
  )  # fmt: skip
  c = small.config()
  modules = {'images': small.IMAGE, 'videos': other}
  (phase,) = methods.build(c, small.VIDEO, modules.__getitem__)
  shapes = jax.eval_shape(
    lambda: {
      n: t.module.init(pmd_small.KEY, small.clip())['params']
      for n, t in phase.teachers.items()
    }
  )
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda t: phase.targets(t, small.clip()), shapes)


def test_the_student_is_a_hiera():
  (phase,) = small.build()
  assert isinstance(phase.encoder, encoder.Hiera)
  assert phase.encoder.patch == small.PATCH
