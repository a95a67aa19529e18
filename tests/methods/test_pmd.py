"""PMD with its networks against numpy, and MVD, its case of one phase."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods import pmd_numpy as reference
from tests.methods import pmd_small as small
from vssl_jax import config as config_lib
from vssl_jax import losses, trees
from vssl_jax.methods import distillation_teachers as distillation_teachers_lib
from vssl_jax.train import freezing, optimizer

CASES = {
  'pmd': ('mask_85', {}),
  'mvd': ('mask_90', small.MVD),
}


@functools.cache
def _case(kind):
  """Returns phase, parameters, teachers, memory and batch."""
  name, knobs = CASES[kind]
  phase = small.phase(small.build(**knobs), name)
  params = small.draw(small.shapes(phase))
  teachers = small.teachers(phase)
  rows = small.rows() if phase.memory_specs else {}
  return phase, params, teachers, rows, small.batch(rows=rows)


@functools.cache
def _program(kind):
  """Returns (params, step) -> loss, aux, gradients by all that enters."""
  phase, _, teachers, _, batch = _case(kind)
  given = {
    'video': batch.video / jnp.float32(255),
    'example_memory': batch.example_memory,
  }

  @jax.jit
  def run(params, teachers, given, number):
    def loss(params, teachers, given):
      whole = small.with_targets(
        phase, teachers, dataclasses.replace(batch, **given)
      )
      return phase.loss(params, teachers, whole, small.step(number))

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(
      params, teachers, given
    )

  return lambda params, number: run(params, teachers, given, number)


@functools.cache
def _found(kind):
  """Returns loss, aux, and gradients by the pixels too, of a step."""
  return _program(kind)(_case(kind)[1], 3)


@functools.cache
def _told(kind):
  """Returns the teachers' residual streams by the reference."""
  _, _, teachers, _, batch = _case(kind)
  video, (_, h, w) = np.asarray(batch.video), small.GRID
  shared = (video, small.PATCH, small.HEADS)
  params = small.double(teachers)
  image = reference.image_table((1, h, w), 24)
  clip = reference.video_table(small.GRID, 16)
  return {
    'image': reference.image_stream(params['image'], *shared, image),
    'video': reference.stream(params['video'], *shared, clip),
  }


def _wanted(kind, params, number=3):
  phase, _, teachers, rows, batch = _case(kind)
  params, teachers = small.double(params), small.double(teachers)
  (mask,) = small.masks(phase.masks, number)
  shared = (np.asarray(batch.video), small.PATCH, small.HEADS)
  features, predicted = reference.student(params, *shared, mask.visible)
  view = dict(visible=mask.visible, masked=mask.masked)
  view |= dict(features=features, predicted=predicted)
  if phase.previous_masks:
    (before,) = small.masks(phase.previous_masks, number)
    guide = reference.student(teachers['previous'], *shared, before.visible)
    view |= dict(guide=guide[1], before=before.masked)
  return reference.whole(
    [view],
    {n: params[f'align_{n}'] for n in phase.align},
    _told(kind),
    small.double(rows),
    np.asarray(batch.substituted),
    small.GRID,
    feature_loss=phase.feature_loss,
    lambda_df=phase.lambda_df,
  )


@pytest.mark.parametrize('kind', CASES)
def test_the_whole_loss_in_numpy(kind):
  """Invariant 1: MVD is the case of one phase and one term.

  The reference is float64. The package is not: losses and what decoders say
  are float32, and blocks refuse more. Rounding leaves 1.5e-7.
  """
  (loss, aux), _ = _found(kind)
  wanted, metrics, rows = _wanted(kind, _case(kind)[1])
  np.testing.assert_allclose(loss, wanted, rtol=1e-6)
  for name, value in metrics.items():
    np.testing.assert_allclose(
      aux.metrics[name], value, rtol=2e-6, err_msg=name
    )
  drawn = {n for n in aux.metrics if n.startswith('mask/')}
  assert aux.metrics.keys() - drawn == metrics.keys()
  assert aux.memory.keys() == rows.keys()
  for name, value in rows.items():
    np.testing.assert_allclose(aux.memory[name], value, rtol=5e-6)
  if kind == 'mvd':
    assert metrics.keys() == {
      f'{what}/{name}'
      for what in ('loss/base', 'target/std')
      for name in ('image', 'video')
    }
    terms = aux.metrics['loss/base/image'] + aux.metrics['loss/base/video']
    assert loss == terms and not rows


@pytest.mark.parametrize('kind', CASES)
def test_gradients_of_the_whole_loss_in_numpy(kind):
  """By finite differences in float64, of leaves along random directions."""
  _, params, _, _, _ = _case(kind)
  _, (grads, _, _) = _found(kind)
  for seed, (name, grad) in enumerate(trees.named_leaves(grads)):
    # What enters the last third of the student is not aligned, but decoded.
    assert np.any(grad), name
    if seed % 5 and 'block' in name:
      continue
    way = np.random.default_rng(seed).normal(size=grad.shape)

    def moved(size, name=name, way=way):
      there = trees.map_named(
        lambda n, x: x + size * way if n == name else x, small.double(params)
      )
      return _wanted(kind, there)[0]

    slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
    np.testing.assert_allclose(
      np.sum(np.asarray(grad, np.float64) * way),
      slope,
      rtol=2e-3,
      atol=2e-5,
      err_msg=name,
    )


def _adamw(params, moments, grads, count):
  """Returns what MVD's optimizer makes of them, in numpy."""
  rate, decay, b1, b2 = 1e-2, 0.05, 0.9, 0.95

  def one(p, m, v, g):
    m[...], v[...] = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    step = m / (1 - b1**count) / (np.sqrt(v / (1 - b2**count)) + 1e-8)
    return p - rate * (step + decay * p * (p.ndim > 1))

  return jax.tree.map(one, params, *moments, grads)


def test_mvd_step_for_step():
  """Invariant 1: three steps, each with another mask.

  The reference moves in float64 along the gradient at its own place, whose
  slope by finite differences that is, of every part.
  """
  _, c = config_lib.load('configs/mvd_k400.py:B')
  program, params = _program('mvd'), _case('mvd')[1]
  rate, decay = (lambda _, x=x: jnp.float32(x) for x in (1e-2, 0.05))
  tx = optimizer.make(c.optim, freezing.labels(params, ()), rate, decay)
  state, update = tx.init(params), jax.jit(tx.update)
  there = small.double(params)
  moments = [jax.tree.map(np.zeros_like, there) for _ in 'mv']
  for number in range(3):
    (loss, _), (grads, *_) = program(params, number)
    wanted = _wanted('mvd', there, number)[0]
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    rounded = jax.tree.map(jnp.float32, there)
    slopes = small.double(program(rounded, number)[1][0])
    for role in slopes:
      _check_slope(there, slopes, role, number)
    there = _adamw(there, moments, slopes, number + 1)
    updates, state = update(grads, state, params, step=jnp.int32(number))
    params = jax.tree.map(jnp.add, params, updates)
  for (name, x), y in zip(
    trees.named_leaves(params), jax.tree.leaves(there), strict=True
  ):
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-5, err_msg=name)


def _check_slope(there, slopes, role, seed):
  """Compares a gradient with the reference's change along random ways."""
  rng = np.random.default_rng([seed, *role.encode()])
  way = jax.tree.map(lambda x: rng.normal(size=x.shape), slopes[role])

  def moved(size):
    part = jax.tree.map(lambda x, w: x + size * w, there[role], way)
    return _wanted('mvd', {**there, role: part}, seed)[0]

  along = jax.tree.map(lambda g, w: np.sum(g * w), slopes[role], way)
  want, slope = (moved(1e-6) - moved(-1e-6)) / 2e-6, sum(jax.tree.leaves(along))
  np.testing.assert_allclose(slope, want, rtol=1e-4, atol=1e-6)


def test_nothing_reaches_the_teachers_or_the_memory():
  """Invariant 12, of the loss: nor what a student said before."""
  _, (_, to_teachers, to_given) = _found('pmd')
  assert set(to_teachers) == {'image', 'video', 'previous'}
  for name, grad in trees.named_leaves(to_teachers):
    assert not np.any(grad), name
  for name, grad in trees.named_leaves(to_given):
    assert np.any(grad) == (name == 'video'), name


def test_hidden_pixels_enter_as_targets_only():
  """Invariant 16: they have no gradient; every visible patch has one."""
  phase, *_ = _case('pmd')
  _, (_, _, given) = _found('pmd')
  touched = np.any(losses.patchify(given['video'], small.PATCH), (2, 3))
  (mask,) = small.masks(phase.masks)
  for row, seen in zip(touched, mask.visible, strict=True):
    assert set(np.flatnonzero(row)) == set(seen)


@functools.cache
def _says():
  """Returns what teachers and student say of a clip: compiled."""
  phase, params, teachers, *_ = _case('pmd')
  (mask,) = small.masks(phase.masks)
  mask = jax.tree.map(jnp.asarray, mask)

  @jax.jit
  def run(video):
    told = {n: distillation_teachers_lib.stream(phase, n, teachers[n], video)
            for n in ('image', 'video')}  # fmt: skip
    out = phase.student.apply({'params': params}, video, mask)
    return told, out

  return run


def test_layers_of_the_student_do_not_see_what_is_hidden():
  """Invariant 16 once more: other hidden pixels change no bit of z^n."""
  phase, *_, batch = _case('pmd')
  (mask,) = small.masks(phase.masks)
  video = np.array(batch.video)
  t, y, x = np.unravel_index(int(mask.masked[0, 0]), small.GRID)
  other = video.copy()
  other[0, 2 * t : 2 * t + 2, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] ^= 255
  (_, out), (_, again) = _says()(video), _says()(other)
  for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(again), strict=True):
    np.testing.assert_array_equal(a, b)
  t, y, x = np.unravel_index(int(mask.visible[0, 0]), small.GRID)
  other[0, 2 * t, 4 * y, 4 * x] ^= 255
  _, seen = _says()(other)
  assert all(np.any(a != b) for a, b in zip(out.features, seen.features))


def test_which_frames_a_teacher_sees():
  """Invariant 13: the image teacher the first of every tubelet, alone."""
  video = np.array(_case('pmd')[-1].video)
  told, _ = _says()(video)
  for name, wanted in _told('pmd').items():
    for found, want in zip(told[name], wanted, strict=True):
      np.testing.assert_allclose(found, want, rtol=1e-4, atol=2e-5)
  for frame in range(4):
    other = video.copy()
    other[:, frame] ^= 255
    moved, _ = _says()(other)
    changed = np.any(moved['image'][-1] != told['image'][-1], (0, 2))
    want = np.zeros(small.TOKENS, bool)
    if frame % 2 == 0:
      want[18 * frame : 18 * frame + 36] = True
    np.testing.assert_array_equal(changed, want)
    assert np.all(np.any(moved['video'][-1] != told['video'][-1], -1))


def test_targets_are_the_same_under_every_mask():
  """Invariant 13: mask and step do not enter."""
  phase, _, teachers, _, batch = _case('pmd')
  made = jax.jit(lambda: phase.targets(teachers, batch.video))()
  for name, layers in _told('pmd').items():
    np.testing.assert_allclose(made[name], layers[-1], rtol=1e-4, atol=2e-5)


@functools.cache
def _guided(previous_mask, drop_path):
  """Returns PSD's distance at the start of a phase, to its own copy."""
  phases = small.build(
    previous_mask=previous_mask,
    drop_path=drop_path,
    lambda_df=0.0,
    lambda_al=0.0,
    teachers=('video',),
  )
  phase = small.phase(phases, 'mask_80')
  params = small.draw(small.shapes(phase))
  teachers = small.teachers(phase) | {'previous': params}

  @jax.jit
  def run(number):
    batch = small.with_targets(phase, teachers, small.batch())
    return phase.loss(params, teachers, batch, small.step(number))[1]

  return run(3).metrics


@pytest.mark.slow
def test_a_student_agrees_with_itself_on_the_same_mask():
  """Invariant 4: a nested mask shows the guide more, drop path shakes."""
  assert _guided('same', 0.0)['loss/progressive'] == 0
  nested = _guided('nested', 0.0)
  assert nested['loss/progressive'] > 1e-3
  assert min(nested['pg/both_masked'], nested['pg/visible_to_previous']) > 0
  assert _guided('same', 0.5)['loss/progressive'] > 1e-3


def test_no_drop_path_in_teachers_and_guide():
  assert small.IMAGE.image.drop_path == small.VIDEO_MODEL.drop_path == 0.3
  for phase in small.build(drop_path=0.5):
    assert phase.teachers['image'].module.image.drop_path == 0
    assert phase.teachers['video'].module.drop_path == 0
    student = phase.student
    assert student.encoder.drop_path == 0.5
    assert {d.drop_path for d in student.decoder.values()} == {0.5}
    if 'previous' in phase.teachers:
      guide = phase.teachers['previous'].module
      assert guide.encoder.drop_path == 0
      assert {d.drop_path for d in guide.decoder.values()} == {0}


def test_predictions_at_other_positions_are_those_of_all():
  """The guide decodes every position and is read where it is wanted."""
  phase, params, *_, batch = _case('pmd')
  (mask,) = small.masks(phase.masks)
  mask = jax.tree.map(jnp.asarray, mask)
  wanted = np.random.default_rng(0).integers(0, small.TOKENS, (3, 5))

  @jax.jit
  def run(at):
    return phase.student.apply(
      {'params': params}, batch.video, mask, at=at
    ).predicted

  found = run(jnp.asarray(wanted, jnp.int32))
  shared = (np.asarray(batch.video), small.PATCH, small.HEADS)
  _, every = reference.student(small.double(params), *shared, mask.visible)
  for name, x in found.items():
    want = reference.at(every[name], wanted)
    np.testing.assert_allclose(x, want, rtol=1e-4, atol=2e-5)
