"""KDHiera with its networks against numpy, and what must hold of any."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods import kdhiera_numpy as reference
from tests.methods import kdhiera_small as small
from tests.methods import pmd_numpy as vits
from tests.methods import pmd_small
from vssl_jax import losses, trees
from vssl_jax.masks import hiera_units

STAGES = [(f'stage_{i}', i, i, 0.25) for i in (1, 2, 3, 4)]
# The phase's knobs; (head, stage, layer, weight); arguments of the reference.
CASES = {
  'default': ({}, STAGES, {}),
  'knobs': (
    dict(
      feature_loss='smooth_l1',
      target_norm='none',
      head_pos=True,
      masks_per_clip=2,
      stages=(3, 3, 2, 4),
      layer_weights=(1.0, 0.0, 2.0, 1.0),
      image=dict(weight=0.5),
    ),
    [
      ('stage_3_layer_01', 3, 1, 0.25),
      ('stage_3_layer_02', 3, 2, 0.0),
      ('stage_2', 2, 3, 0.5),
      ('stage_4', 4, 4, 0.25),
    ],
    dict(loss='smooth_l1', norm='none', pos=True),
  ),
}


KINDS = ['default', pytest.param('knobs', marks=pytest.mark.slow)]


@functools.cache
def _case(kind):
  """Returns phase, parameters, teachers and batch.

  All but `real` have an encoder that says what its parameters hold.
  """
  (phase,) = small.build(**CASES.get(kind, CASES['default'])[0])
  params = small.params(phase)
  if kind != 'real':
    phase, params['encoder'] = small.speaking(phase)
  return phase, params, small.teachers(phase), small.batch()


@functools.cache
def _run(kind):
  """Returns a compiled call: values, and a gradient by all that enters."""
  phase, _, _, batch = _case(kind)

  @jax.jit
  def run(params, teachers, video, of):
    def values(params, teachers, video):
      given = small.with_targets(
        phase, teachers, dataclasses.replace(batch, video=video)
      )
      loss, aux = phase.loss(params, teachers, given, small.step())
      return (loss, {n: aux.metrics[n] for n in of[1]}), aux.metrics

    (loss, _), back, metrics = jax.vjp(
      values, params, teachers, video, has_aux=True
    )
    return loss, metrics, back(of)

  return run


@functools.cache
def _found(kind, term=''):
  """Returns loss, metrics, and gradients of the loss or of one of its terms."""
  _, params, teachers, batch = _case(kind)
  pairs = CASES.get(kind, CASES['default'])[1]
  names = [f'loss/{t}/{pair[0]}' for t in teachers for pair in pairs]
  of = jnp.float32(not term), {n: jnp.float32(n == term) for n in names}
  video = batch.video / np.float32(255)
  return _run(kind)(params, teachers, video, of)


@functools.cache
def _told(kind):
  """Returns {teacher: stream} and the class token's scores, in numpy."""
  _, _, teachers, batch = _case(kind)
  net, video = pmd_small.double(teachers), batch.video
  shared = (video, small.PATCH, small.HEADS)
  image, scores = reference.image_teacher(net['image'], *shared)
  table = vits.video_table(small.GRID, 16)
  clip = vits.stream(net['video'], *shared, table)
  return {'image': image, 'video': clip}, scores


@functools.cache
def _units(kind):
  """Returns the visible units of each mask, in numpy, and pooled scores."""
  phase, _, _, batch = _case(kind)
  t, h, w = small.UNITS
  found = []
  for spec in phase.masks:
    stream = f'mask/{spec.name}' if spec.name else 'mask'
    keys = small.step().per_example(stream, batch)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (t, h * w)))(keys)
    found.append(
      reference.chosen(_told(kind)[1], np.asarray(noise), 2, small.UNITS)
    )
  return found


def _wanted(kind, params):
  knobs, pairs, options = CASES[kind]
  shares = {'image': knobs.get('image', {}).get('weight', 1.0), 'video': 1.0}
  teachers = {n: (x, shares[n]) for n, x in _told(kind)[0].items()}
  views = []
  for units, _ in _units(kind):
    ends = params['encoder']['ends']
    taken = [
      np.stack([x[k] for x, k in zip(end, units, strict=True)]) for end in ends
    ]
    views.append((taken, units))
  return reference.whole(params, views, teachers, small.UNITS, pairs, **options)


@pytest.mark.parametrize('kind', KINDS)
def test_the_whole_loss_in_numpy(kind):
  """Scores, mask, layers, heads and distances; nothing else is logged."""
  loss, metrics, _ = _found(kind)
  params = pmd_small.double(_case(kind)[1])
  wanted, terms = _wanted(kind, params)
  np.testing.assert_allclose(loss, wanted, rtol=2e-5)
  for name, value in terms.items():
    np.testing.assert_allclose(metrics[name], value, rtol=2e-4, atol=2e-5)
  masks = {n for n in metrics if n.startswith('mask/')}
  assert metrics.keys() - masks == {*terms}
  kept = np.mean(
    [
      np.take_along_axis(p.reshape(len(p), -1), k, 1).sum(1) / p.sum((1, 2))
      for k, p in _units(kind)
    ]
  )
  np.testing.assert_allclose(metrics['mask/attention_kept'], kept, rtol=1e-4)
  share = _units(kind)[0][1]
  share = share / share.sum(-1, keepdims=True)
  even = -(share * np.log(share)).sum(-1).mean() / np.log(6)
  np.testing.assert_allclose(metrics['mask/entropy'], even, rtol=1e-4)


@pytest.mark.parametrize('kind', KINDS)
def test_gradients_in_numpy(kind):
  """By finite differences in float64, along random directions.

  Of every leaf of the heads, and of what the encoder made at each stage.
  """
  _, params, _, _ = _case(kind)
  _, _, (grads, _, _) = _found(kind)
  for seed, (name, grad) in enumerate(trees.named_leaves(grads)):
    idle = 'layer_02' in name or (kind == 'knobs' and name == 'encoder/ends/0')
    assert np.any(grad) != idle, name
    way = np.random.default_rng(seed).normal(size=grad.shape)

    def moved(size, name=name, way=way):
      there = trees.map_named(
        lambda n, x: x + size * way if n == name else x,
        pmd_small.double(params),
      )
      return _wanted(kind, there)[0]

    slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
    found = np.sum(np.asarray(grad, np.float64) * way)
    np.testing.assert_allclose(found, slope, rtol=2e-3, atol=2e-5, err_msg=name)


@pytest.mark.slow
def test_every_stage_has_a_gradient_from_its_own_term():
  """Invariant 2: it reaches its stage and all before it, and none behind."""
  for i in (1, 2, 3, 4):
    for teacher in ('image', 'video'):
      _, _, (grads, _, _) = _found('real', f'loss/{teacher}/stage_{i}')
      for block in range(4):
        leaves = grads['encoder'][f'block_{block:02d}']
        reached = any(np.any(x) for x in jax.tree.leaves(leaves))
        assert reached == (block < i), (i, block)
      for name, grad in trees.named_leaves(
        {n: x for n, x in grads.items() if n != 'encoder'}
      ):
        own = name.startswith(f'heads_{teacher}/stage_{i}')
        assert np.any(grad) == own, name


@pytest.mark.slow
def test_nothing_reaches_the_teachers():
  """Invariant 12, of the loss: nor what the masks were drawn by."""
  _, _, (_, to_teachers, _) = _found('real')
  assert set(to_teachers) == {'image', 'video'}
  for name, grad in trees.named_leaves(to_teachers):
    assert not np.any(grad), name


def test_hidden_pixels_have_no_gradient():
  """Invariant 1: exactly none; every visible unit has one."""
  _, _, (_, _, to_video) = _found('real')
  touched = np.any(losses.patchify(to_video, (2, 16, 16)), (2, 3))
  for row, seen in zip(touched, _units('real')[0][0], strict=True):
    assert set(np.flatnonzero(row)) == set(seen)


@pytest.mark.slow
def test_the_last_layer_alone_is_one_pair():
  """Invariant 3: distillation of the last layer, by the general code."""
  knobs = dict(layers=(4,))
  (phase,) = small.build(teachers=('image',), stages=(4,), image=knobs)
  _, params, teachers, batch = _case('real')
  params = {
    'encoder': params['encoder'],
    'heads_image': {
      n: x for n, x in params['heads_image'].items() if 'stage_4' in n
    },
  }
  shapes = jax.eval_shape(lambda: phase.init(pmd_small.KEY, small.clip()))
  assert not trees.difference(params, shapes)
  batch = dataclasses.replace(batch, video=batch.video / np.float32(255))
  run = jax.jit(
    lambda t: phase.loss(
      params, t, small.with_targets(phase, t, batch), small.step()
    )
  )
  loss, aux = run({'image': teachers['image']})
  assert set(phase.teachers) == {'image'}
  np.testing.assert_allclose(
    loss, _found('real')[1]['loss/image/stage_4'], rtol=1e-5
  )
  assert loss == aux.metrics['loss/image/stage_4']


@functools.cache
def _drawn(tube):
  """Returns a compiled call: clips and the image teacher -> visible units."""
  (phase,) = small.build(tube=tube)

  @jax.jit
  def run(teachers, video):
    batch = dataclasses.replace(small.batch(), video=video)
    mask = phase.draw_masks(teachers, batch, small.step())[''].mask
    return mask.visible, mask.masked

  return run


@pytest.mark.parametrize('tube', [False, True])
def test_the_mask_depends_on_the_image_teacher_alone(tube):
  """Invariant 8: on nothing of the student or the other teacher."""
  teachers, batch = _case('default')[2:]
  image = {'image': teachers['image']}  # no other is asked
  visible, masked = _drawn(tube)(image, batch.video)
  assert visible.shape == (2, 16) and masked.shape == (2, 32)
  if not tube:
    tokens = hiera_units.expand_units(
      jnp.int32(_units('default')[0][0]), small.UNITS
    )
    np.testing.assert_array_equal(visible, jnp.sort(tokens, 1))
  for frame in range(4):
    # Other pixels in every frame: what they change is drawn anew.
    video = batch.video.copy()
    video[:, frame] = np.random.default_rng(9).integers(
      0, 256, video[:, frame].shape
    )
    video[:, frame, 16:] = 255
    now = np.asarray(_drawn(tube)(image, video)[0]).reshape(2, 2, 8)
    changed = np.any(now != visible.reshape(2, 2, 8), axis=(0, 2))
    wanted = (np.arange(2) == frame // 2) & (frame % 2 == 0)
    if tube:
      wanted = np.full(2, wanted.any())
    np.testing.assert_array_equal(changed, wanted)


def test_targets_are_those_of_every_mask():
  """Neither step nor mask enters; a batch that carries them needs no more."""
  phase, params, teachers, batch = _case('default')
  made = jax.jit(lambda t: phase.targets(t, batch.video))(teachers)
  assert made.keys() == {
    'scores', *(f'{t}/{n}' for t in ('image', 'video') for n in (1, 2, 3, 4))
  }  # fmt: skip
  streams, scores = _told('default')
  for name, stream in streams.items():
    for n in (1, 2, 3, 4):
      found = made[f'{name}/{n}']
      np.testing.assert_allclose(found, stream[n], rtol=1e-4, atol=2e-5)
  pooled = reference.cells(scores, small.UNITS).mean(2).reshape(2, 2, 6)
  np.testing.assert_allclose(made['scores'], pooled, rtol=1e-4)
  carried = dataclasses.replace(batch, targets=made)
  loss, aux = jax.jit(lambda p, b: phase.loss(p, {}, b, small.step()))(
    params, carried
  )
  np.testing.assert_allclose(loss, _found('default')[0], rtol=1e-5)
  assert aux.metrics.keys() == _found('default')[1].keys()


@pytest.mark.slow
@pytest.mark.parametrize('rate', [0.0, 0.9])
def test_the_student_drops_paths(rate):
  """Another step with the same mask is another loss, and only by this."""
  (phase,) = small.build(drop_path=rate, selection='top', teachers=('image',))
  params, batch = small.params(phase), small.batch()
  made = jax.eval_shape(
    lambda t: phase.targets(t, batch.video), small.teachers(phase)
  )
  rng = np.random.default_rng(3)
  batch = dataclasses.replace(
    batch,
    targets={
      n: jnp.asarray(rng.random(x.shape, np.float32)) for n, x in made.items()
    },
  )

  @jax.jit
  def run(number):
    step = pmd_small.step(number)
    loss, aux = phase.loss(params, {}, batch, step)
    return loss, aux.metrics['mask/attention_kept']

  found = np.array([run(number) for number in range(3)])
  assert len(np.unique(found[:, 0])) == (3 if rate else 1)
  assert len(np.unique(found[:, 1])) == 1


def test_bounds_of_the_cosine():
  """Invariants 4, 5 and 15, of one token and its target."""
  rng = np.random.default_rng(0)
  x, y = jnp.asarray(rng.normal(size=(2, 3, 5, 8)), jnp.float32)
  norm = losses.TARGET_NORMS['ln']

  def distance(p, g):
    return 2 - 2 * losses.cosine(p, norm(g))

  np.testing.assert_allclose(distance(norm(y), y), 0, atol=1e-6)
  np.testing.assert_allclose(distance(-norm(y), y), 4, rtol=1e-6)
  assert np.all((distance(x, y) >= 0) & (distance(x, y) <= 4))
  np.testing.assert_allclose(distance(9 * x, y), distance(x, y), atol=1e-6)
  np.testing.assert_allclose(distance(x, y + 3), distance(x, y), atol=1e-5)
  one, other = jnp.eye(8)[:2]
  apart = losses.cosine(one[None, None], other[None, None])
  np.testing.assert_array_equal(2 - 2 * apart, 2)
  # A token of zeros has no direction, and no gradient that is not finite.
  grad = jax.grad(lambda p: jnp.sum(losses.cosine(p, y)))(jnp.zeros_like(x))
  assert np.isfinite(grad).all()
