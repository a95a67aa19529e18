"""PMD's terms against numpy, its hand numbers, and what each knob changes.

Student and teachers say what a test gives them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods import pmd_numpy as reference
from tests.methods import pmd_small as small
from vssl_jax import losses, trees
from vssl_jax.methods import pmd_terms

FIELDS = set(reference.KNOBS)


class Case:
  """A phase's loss on given predictions, beside the reference's."""

  def __init__(self, name='mask_85', **knobs):
    self.knobs = {k: v for k, v in knobs.items() if k in FIELDS}
    self.real = small.phase(small.build(depth=6, **knobs), name)
    self.phase = small.speaking(self.real)
    self.params = small.said(self.phase, 1) | small.maps(self.phase, 2)
    self.told = small.told(self.phase, 3)
    self.rows = {}
    for name, spec in self.phase.memory_specs.items():
      self.rows[name] = small.rows(cells=spec.shape[0])[name]

  def loss(self, params, told, batch, number=3):
    # Operation by operation: each is compiled once for all knobs.
    batch = small.with_targets(self.phase, told, batch)
    return self.phase.loss(params, told, batch, small.step(number))

  def batch(self, **fields):
    return small.batch(rows=self.rows, **fields)

  def found(self, number=3, **fields):
    """Returns loss, metrics without those of masks, and rows."""
    batch = self.batch(**fields)
    loss, aux = self.loss(self.params, self.told, batch, number)
    metrics = {k: v for k, v in aux.metrics.items() if 'mask/' not in k[:5]}
    return loss, metrics, aux.memory

  def wanted(self, number=3, **fields):
    return self.reference(self.params, number, **fields)

  def reference(self, params, number=3, **fields):
    batch = self.batch(**fields)
    drawn = small.masks(self.phase.masks, number)
    before = small.masks(self.phase.previous_masks, number)
    params, told = small.double(params), small.double(self.told)
    views = []
    for i, (visible, masked) in enumerate(drawn):
      names = self.phase.student.decoder
      view = dict(visible=visible, masked=masked)
      view['predicted'] = {n: params[n] for n in names}
      view['features'] = [reference.at(x, visible) for x in params['features']]
      if before:
        view['guide'] = {n: told['previous'][n] for n in names}
        view['before'] = before[i].masked
      views.append(view)
    return reference.whole(
      views,
      {n: params[f'align_{n}'] for n in self.phase.align},
      {n: list(told[n]['layers']) for n in names},
      small.double(self.rows),
      np.asarray(batch.substituted),
      small.GRID,
      **self.knobs,
    )

  def check(self, **fields):
    """Compares both, and returns what was found."""
    (loss, metrics, rows), (out, told, new) = (
      self.found(**fields),
      self.wanted(**fields),
    )
    np.testing.assert_allclose(loss, out, rtol=1e-5)
    assert metrics.keys() == told.keys()
    for name, value in told.items():
      np.testing.assert_allclose(
        metrics[name], value, rtol=2e-5, atol=1e-7, err_msg=name
      )
    assert rows.keys() == new.keys()
    for name, value in new.items():
      np.testing.assert_allclose(rows[name], value, rtol=1e-5)
    return loss, metrics, rows


@functools.cache
def _default():
  case = Case()
  return case.check()


BASE = {'loss/base/image', 'loss/base/video'}
HARD = {'loss/difficulty/image', 'loss/difficulty/video'}
WEIGHTS = {f'dare/{x}/{n}' for x in ('entropy', 'max_weight')
           for n in ('image', 'video')}  # fmt: skip
ALIGNED = {'loss/alignment/image', 'loss/alignment/video'}
FILLED = {'example_memory/filled/image', 'example_memory/filled/video'}
GUIDED = {'loss/progressive', 'pg/both_masked', 'pg/visible_to_previous'}


@pytest.mark.parametrize(
  ('knobs', 'changed', 'rows'),
  [
    (dict(feature_loss='smooth_l1'), BASE | HARD, True),
    (dict(target_norm='ln'), BASE | HARD, True),
    (dict(alpha=0.05), HARD, True),
    (dict(tau=0.05), HARD | WEIGHTS, False),
    (dict(dare='smooth'), HARD | WEIGHTS, False),
    (dict(dare='weights'), HARD, False),
    (dict(df_extra_mean=True), HARD, False),
    (dict(pg_positions='both_masked'), {'loss/progressive'}, False),
    (dict(align_norm='ln'), ALIGNED, False),
    (dict(lambda_base=0.25), set(), False),
    (dict(lambda_pg=2.0), set(), False),
    (dict(lambda_df=0.5), set(), False),
    (dict(lambda_al=0.5), set(), False),
  ],
)
def test_a_knob_changes_its_terms_and_no_others(knobs, changed, rows):
  """On equal predictions, masks and memory."""
  loss, metrics, new = _default()
  other, others, fresh = Case(**knobs).check()
  assert others.keys() == metrics.keys()
  assert {n for n in metrics if others[n] != metrics[n]} == changed
  assert loss != other
  for name, value in new.items():
    assert np.array_equal(fresh[name], value) != rows


@pytest.mark.parametrize(
  ('knobs', 'gone'),
  [
    (dict(lambda_pg=0.0), GUIDED),
    (dict(lambda_df=0.0), HARD | WEIGHTS | FILLED),
    (dict(lambda_al=0.0), ALIGNED),
  ],
)
def test_a_term_of_no_weight_is_not_made(knobs, gone):
  _, metrics, _ = _default()
  case = Case(**knobs)
  _, others, rows = case.check()
  assert metrics.keys() - others.keys() == gone
  assert all(others[n] == metrics[n] for n in others)
  assert ('previous' in case.real.teachers) == ('lambda_pg' not in knobs)
  assert (
    bool(rows) == bool(case.real.memory_specs) == ('lambda_df' not in knobs)
  )
  assert bool(case.real.align) == ('lambda_al' not in knobs)
  roles = set(small.shapes(case.real))
  shared = {'encoder', 'decoder_image', 'decoder_video'}
  aligned = set() if 'lambda_al' in knobs else {'align_image', 'align_video'}
  assert roles == shared | aligned


def test_one_teacher_is_asked_alone():
  loss, metrics, rows = Case(teachers=('video',)).check()
  both, all_of_them, _ = _default()
  assert not any('image' in name for name in metrics)
  assert set(rows) == {'video'} and loss < both
  for name in metrics:
    if 'video' in name:
      assert metrics[name] == all_of_them[name]


@pytest.mark.parametrize('masks', ['tube', 'random'])
def test_several_masks_of_a_clip(masks):
  """A patch's loss is the mean over the masks that hide it; rows once."""
  case = Case(masks=masks, masks_per_clip=2)
  _, _, rows = case.check()
  assert rows['image'].shape == (3, small.TOKENS)
  one, two = small.masks(case.phase.masks)
  both = {tuple(np.intersect1d(a, b)) for a, b in zip(one[1], two[1])}
  assert min(map(len, both)) and not np.array_equal(one[1], two[1])


def test_masks_at_random_in_place_of_tubes():
  case = Case(masks='random')
  case.check()
  (mask,) = small.masks(case.phase.masks)
  by_time = np.sort(mask.visible // 36)
  assert (by_time.sum(1) != by_time.shape[1] / 2).any()


@functools.cache
def _gradients():
  """Returns a case and its gradients by what is said, and by the memory."""
  case = Case()
  batch = case.batch()

  @jax.jit
  def run(params, told, rows):
    def loss(params, told, rows):
      given = dataclasses.replace(batch, example_memory=rows)
      return case.loss(params, told, given)[0]

    return jax.grad(loss, argnums=(0, 1, 2))(params, told, rows)

  return case, run(case.params, case.told, batch.example_memory)


@pytest.mark.parametrize(
  'leaf',
  ['image', 'video', 'features', 'align_image/layer_02/kernel',
   'align_video/layer_03/bias'],
)  # fmt: skip
def test_the_gradient_in_numpy(leaf):
  """By finite differences."""
  case, (grads, _, _) = _gradients()
  grad = dict(trees.named_leaves(grads))[leaf]
  way = np.random.default_rng(0).normal(size=grad.shape)

  def moved(size):
    there = trees.map_named(
      lambda n, x: x + size * way if n == leaf else x, small.double(case.params)
    )
    return case.reference(there)[0]

  slope = (moved(1e-4) - moved(-1e-4)) / 2e-4
  np.testing.assert_allclose(np.sum(grad * way), slope, rtol=1e-3)


def test_what_has_a_gradient():
  """Hidden patches of predictions, visible ones of the aligned layers."""
  case, (grads, *constants) = _gradients()
  for leaf in jax.tree.leaves(constants):  # teachers, guide and memory
    assert not np.any(leaf)
  (mask,) = small.masks(case.phase.masks)
  said = np.any(grads['image'], -1)
  layers = np.any(grads['features'][1:5], (0, 3))
  for b in range(3):
    assert set(np.flatnonzero(said[b])) == set(mask.masked[b])
    assert set(np.flatnonzero(layers[b])) == set(mask.visible[b])
  # Nothing follows from what was embedded, nor from the deep third.
  assert not np.any(grads['features'][np.array([0, 5, 6])])


# --- the difficulty


HIDDEN = jnp.array([[True, False, True]])
BY_HAND = dict(
  loss=jnp.array([[0.2, 7.0, 0.6]]),
  value=jnp.array([[0.4, 3.0, 0.8]]),
  window=jnp.array([[0.5, 9.0, 1.0]]),
)


def _by_hand(loss, value, window, **knobs):
  knobs = dict(alpha=0.95, tau=0.5) | knobs
  return pmd_terms.weigh(loss, HIDDEN, value, window, **knobs)


def test_difficulty_by_hand():
  """Invariant 5."""
  found = _by_hand(**BY_HAND)
  np.testing.assert_allclose(found.loss, [0.50242], atol=1e-5)
  np.testing.assert_allclose(found.smoothed, [[0.21, 3.0, 0.61]], atol=1e-6)
  np.testing.assert_allclose(found.weights, [[0.26894, 0, 0.73106]], atol=1e-5)
  grads = jax.grad(lambda *x: _by_hand(*x).loss.sum(), argnums=(0, 1, 2))(
    *BY_HAND.values()
  )
  np.testing.assert_allclose(grads[0], [[0.25549, 0, 0.69451]], atol=1e-5)
  assert not np.any(grads[1:])
  memory = jax.grad(lambda x: _by_hand(**BY_HAND | {'loss': x}).smoothed.sum())
  assert not np.any(memory(BY_HAND['loss']))
  two = [x[0, [0, 2]].astype(float) for x in BY_HAND.values()]
  lhat, w = reference.smoothed_and_weights(*two, 0.95, 0.5)
  np.testing.assert_allclose([lhat, w], [[0.21, 0.61], [0.26894, 0.73106]],
                             atol=1e-5)  # fmt: skip


def test_parts_of_the_difficulty_by_hand():
  uniform = _by_hand(**BY_HAND, parts='smooth')
  np.testing.assert_allclose(uniform.loss, [(0.21 + 0.61) / 2], rtol=1e-6)
  new = _by_hand(**BY_HAND, parts='weights')
  np.testing.assert_allclose(
    new.loss, [0.268941 * 0.2 + 0.731059 * 0.6], rtol=1e-5
  )
  for found in (uniform, new):
    np.testing.assert_allclose(found.smoothed, [[0.21, 3.0, 0.61]], rtol=1e-6)
  with pytest.raises(ValueError, match="dare: found 'all', wanted one of"):
    _by_hand(**BY_HAND, parts='all')


def test_weights_of_a_large_memory_are_finite():
  window = jnp.array([[6e4, 9.0, 1.0]])
  found = _by_hand(**BY_HAND | {'window': window})
  np.testing.assert_allclose(found.weights, [[1, 0, 0]])
  np.testing.assert_allclose(found.loss, [0.21], rtol=1e-6)


def test_evenness_is_one_of_equal_weights_and_none_of_a_single_one():
  hidden = jnp.array([[True, True, False, True]])
  for weights, want in (
    ([1 / 3, 1 / 3, 0, 1 / 3], 1.0),
    ([1, 0, 0, 0], 0.0),
    ([0.5, 0.5, 0, 0], np.log(2) / np.log(3)),
  ):
    found = pmd_terms.evenness(jnp.array([weights], float), hidden)
    np.testing.assert_allclose(found, want, atol=1e-6)


def test_without_memory_difficulty_is_the_base_loss():
  """Invariants 2 and 3: and the letter of the paper divides it once more."""
  for extra, divisor in ((False, 1), (True, 60)):
    case = Case(alpha=1.0, df_extra_mean=extra)
    case.rows = {n: (v, np.zeros_like(w)) for n, (v, w) in case.rows.items()}
    _, metrics, _ = case.check(substituted=np.zeros(3, bool))
    for name in ('image', 'video'):
      np.testing.assert_allclose(
        divisor * metrics[f'loss/difficulty/{name}'],
        metrics[f'loss/base/{name}'],
        rtol=1e-5,
      )
      assert metrics[f'dare/entropy/{name}'] == pytest.approx(1, abs=1e-5)
      assert metrics[f'dare/max_weight/{name}'] == pytest.approx(1 / 60)


def test_a_substitute_has_no_difficulty():
  """It is in the mean as a clip of weight 0; other terms have it."""
  case = Case()
  all_in = case.check(substituted=np.zeros(3, bool))
  without = case.check(substituted=np.array([False, False, True]))
  assert without[0] < all_in[0]
  changed = {n for n in all_in[1] if all_in[1][n] != without[1][n]}
  assert changed == HARD
  everyone = case.check(substituted=np.ones(3, bool))
  assert all(everyone[1][n] == 0 for n in HARD)


def test_only_hidden_cells_of_memory_change():
  """Invariant 9, bit for bit."""
  case = Case()
  _, _, rows = case.found()
  (mask,) = small.masks(case.phase.masks)
  for name, (value, _) in case.rows.items():
    for b in range(3):
      moved = np.flatnonzero(np.asarray(rows[name][b]) != value[b])
      assert set(moved) == set(mask.masked[b])


def test_memory_of_one_clip_comes_to_its_loss_by_a_ratio():
  """Invariant 17: an example seen again and again, the student frozen."""
  case = Case(alpha=0.6)
  start = {n: value for n, (value, _) in case.rows.items()}
  (mask,) = small.masks(case.phase.masks)
  for visit in range(1, 5):
    _, _, new = case.found()
    for name, value in new.items():
      target = case.told[name]['layers'][-1]
      loss = np.square(case.params[name] - target).mean(-1)
      want = loss + 0.4**visit * (start[name] - loss)
      np.testing.assert_allclose(
        np.take_along_axis(np.asarray(value), mask.masked, 1),
        np.take_along_axis(want, mask.masked, 1),
        rtol=1e-4,
      )
    case.rows = {n: (new[n], w) for n, (_, w) in case.rows.items()}


def test_rows_of_tubes_are_the_mean_over_time_of_all_rows():
  """Invariant 14: over visits with other masks and other losses."""
  patch, tube = Case(), Case(memory_shape='tube')
  zeros = {n: (0 * v, 0 * w) for n, (v, w) in patch.rows.items()}
  patch.rows = zeros
  tube.rows = {n: (v[:, :36], w[:, :36]) for n, (v, w) in zeros.items()}
  for visit in range(3):
    told = small.told(tube.phase, 10 + visit)
    patch.told = tube.told = told
    rows, means = (c.check(number=visit)[2] for c in (patch, tube))
    for name, value in means.items():
      by_time = np.asarray(rows[name]).reshape(3, 2, 36)
      np.testing.assert_allclose(value, by_time.mean(1), rtol=1e-5)
      assert np.any(by_time[:, 0] != by_time[:, 1])
    # The next window looks at the memory of this visit.
    patch.rows = {n: (x, x) for n, x in rows.items()}
    tube.rows = {n: (x, x) for n, x in means.items()}
  assert tube.phase.memory_specs['image'].shape == (36,)


# --- the other terms


def test_distances_by_hand():
  """Invariant 6."""
  x, zero = jnp.array([[[0.5, 1, 2, -3]]]), jnp.zeros((1, 1, 4))
  for kind, want in (('smooth_l1', 1.15625), ('mse', 3.5625)):
    assert losses.per_token(x, zero, kind) == want
    assert reference.distance(x, zero, kind) == want
  with pytest.raises(ValueError, match="feature_loss: found 'l1'"):
    losses.per_token(x, zero, 'l1')


def test_alignment_by_hand():
  """Invariant 7: all pairs of layers are their mean and a spread."""
  mapped = {1: jnp.array([[[1.0, 3.0]]])}
  layers = {5: jnp.array([[[0.0, 2.0]]]), 6: jnp.array([[[2.0, 0.0]]])}
  mean, spread = pmd_terms.condense(list(layers.values()))
  assert pmd_terms.align(mapped, ((range(1, 2), mean),)) == 2.0
  assert spread == 1.0


@pytest.mark.parametrize('seed', range(3))
def test_alignment_to_the_mean_layer_is_that_of_all_pairs(seed):
  rng = np.random.default_rng(seed)
  mapped = {n: rng.normal(size=(2, 5, 7)) for n in (1, 2, 3)}
  teacher = rng.normal(size=(9, 2, 5, 7))
  pairs = ((range(1, 3), range(2, 5)), (range(3, 4), range(5, 9)))
  want = sum(
    np.mean([((mapped[n] - teacher[m]) ** 2).mean() for n in a for m in b])
    for a, b in pairs
  )
  groups, spread = [], 0.0
  for students, numbers in pairs:
    mean, around = pmd_terms.condense(
      [jnp.float32(teacher[m]) for m in numbers]
    )
    groups.append((students, mean))
    spread += jnp.mean(around)
  found = pmd_terms.align(
    {n: jnp.float32(x) for n, x in mapped.items()}, tuple(groups)
  )
  assert spread > 0
  np.testing.assert_allclose(found + spread, want, rtol=1e-6)


def test_thirds_of_the_layers():
  assert pmd_terms.thirds(12) == (range(1, 5), range(5, 9), range(9, 13))
  assert pmd_terms.thirds(24) == (range(1, 9), range(9, 17), range(17, 25))
  assert pmd_terms.thirds(3) == (range(1, 2), range(2, 3), range(3, 4))
  for depth in range(3, 60):
    every = [n for third in pmd_terms.thirds(depth) for n in third]
    assert every == list(range(1, depth + 1))
    assert all(pmd_terms.thirds(depth))
    for number, third in enumerate(pmd_terms.thirds(depth)):
      assert third == reference.third(depth, number)
  with pytest.raises(ValueError, match='3 blocks or more, found 2'):
    pmd_terms.thirds(2)


def test_the_guide_is_told_apart_by_what_it_saw():
  """Nested masks: it saw all that is visible now, and more."""
  case = Case('mask_80')
  _, nested, _ = case.check()
  assert nested['pg/both_masked'] > 0 < nested['pg/visible_to_previous']
  same = Case('mask_80', previous_mask='same')
  _, alone, _ = same.check()
  assert alone['pg/visible_to_previous'] == 0
  assert alone['pg/both_masked'] == pytest.approx(alone['loss/progressive'])
  # As sure as it is of itself.
  same.told = same.told | {'previous': {
    n: same.params[n] for n in ('features', 'image', 'video')
  }}  # fmt: skip
  assert same.found()[1]['loss/progressive'] == 0


def test_the_teachers_are_asked_once_for_all_masks(monkeypatch):
  asked = []
  real = small.Told.__call__
  monkeypatch.setattr(
    small.Told,
    '__call__',
    lambda self, video, features: (
      asked.append(video.shape) or real(self, video, features)
    ),
  )
  case = Case(masks_per_clip=3)
  jax.eval_shape(case.loss, case.params, case.told, case.batch())
  assert asked == [(3, *small.VIDEO)] * 2


def test_a_teacher_of_another_grid_is_an_error_with_both_grids():
  case = Case()
  image = dict(case.told['image'])
  image['layers'] = image['layers'][:, :, :36]
  told = case.told | {'image': image}
  with pytest.raises(Exception, match=r'36 tokens .* = 72'):
    case.loss(case.params, told, case.batch())


# --- memory in the frame of the whole picture


def _under(box, flip, cells=6):
  """Returns [36] the cell of the picture nearest to each cell of a crop."""
  top, left, bottom, right = box
  found = []
  for i in range(cells):
    for j in range(cells):
      x = (j + 0.5) / cells
      x = 1 - x if flip else x
      row = int((top + (bottom - top) * (i + 0.5) / cells) * cells)
      column = int((left + (right - left) * x) * cells)
      found.append(row * cells + column)
  return np.array(found)


@pytest.mark.parametrize('shape', ['patch', 'tube'])
def test_rows_follow_the_crop(shape):
  """They are read and written where the crop lies in the picture."""
  crop = np.float32([[0, 0, 1, 1], [0, 0.5, 0.5, 1], [0.1, 0.2, 0.9, 0.95]])
  where = dict(crop=crop, flip=np.array([True, False, True]))
  case = Case(memory_frame='crop', memory_shape=shape)
  grid = Case(memory_shape=shape)
  cells = [_under(*x) for x in zip(crop, where['flip'], strict=True)]
  t = 1 if shape == 'tube' else 2

  def seen(rows):
    """What lies under the crop, in its own order."""
    parts = np.asarray(rows).reshape(3, t, 36)
    return np.stack(
      [x[:, c] for x, c in zip(parts, cells, strict=True)]
    ).reshape(3, -1)

  grid.rows = jax.tree.map(seen, case.rows)
  loss, metrics, new = case.found(**where)
  wanted, others, in_crop = grid.check()
  np.testing.assert_allclose(loss, wanted, rtol=1e-5)
  for name in HARD | WEIGHTS:
    np.testing.assert_allclose(metrics[name], others[name], rtol=1e-5)
  (mask,) = small.masks(case.phase.masks)
  for name, (value, _) in case.rows.items():
    hidden = np.zeros((3, 72), bool)
    np.put_along_axis(hidden, mask.masked, True, 1)
    hidden = hidden.reshape(3, 2, 36)[:, :t]
    made = np.asarray(in_crop[name]).reshape(3, t, 36)
    want = value.reshape(3, t, 36).copy()
    for b, k in np.ndindex(3, t):
      for cell in range(36):
        on_it = hidden[b, k] & (cells[b] == cell)
        if on_it.any():
          want[b, k, cell] = made[b, k][on_it].mean()
    np.testing.assert_allclose(new[name], want.reshape(3, -1), rtol=1e-5)
