"""LayerLock's losses against numpy, its invariants and its knobs."""

import dataclasses
import functools
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.methods import layerlock_numpy as reference
from vssl_jax import config as config_lib
from vssl_jax import losses, methods, rngs, trees
from vssl_jax.checkpoint import retention
from vssl_jax.data import batch as batch_lib
from vssl_jax.masks import sampling
from vssl_jax.methods import layerlock_config
from vssl_jax.methods import phase as phase_lib
from vssl_jax.train import freezing
from vssl_jax.utils import colours

VIDEO, PATCH, GRID = (4, 16, 16, 3), (2, 4, 4), (2, 4, 4)
TOKENS, DECODING = 32, 1
SCHEDULE = '((0, 4), (1, 4), (2, 4), (3, 4))'
KEY = jax.random.key(7)
SLOW = pytest.mark.slow


UNIT = colours.of(3, (0.0,), (1.0,))  # pixels stay in [0, 1]


def _config(**knobs):
  config = layerlock_config.default()
  config.encoder.update(
    dict(size='Ti', width=24, depth=4, num_heads=2, mlp_width=32)
  )
  config.vit.update(dict(patch=PATCH, dtype='float32'))
  config.update(
    dict(decoder_blocks=DECODING, masks='random:0.75', total=16)
    | dict(schedule=SCHEDULE)
  )
  config.predictor.update(dict(width=24, depth=1, num_heads=2))
  vit = knobs.pop('vit', {})
  config.vit.update(vit)
  config.update(knobs)
  return config


def _resolve(source):
  raise AssertionError(f'{source} is not outside')


def _build(**knobs):
  return methods.build(_config(**knobs), VIDEO, _resolve, UNIT)


def _at(phases, depth):
  """Returns the phase with a lock depth."""
  (phase,) = [p for p in phases if p.lock_depth == depth]
  return phase


@functools.cache
def _batch(size=3, progress=0.25):
  rng = np.random.default_rng(0)
  return batch_lib.Batch(
    video=rng.integers(0, 255, (size, *VIDEO), dtype=np.uint8),
    index=np.arange(size, dtype=np.int32),
    progress=np.float32(progress),
  )


def _rng(step=3):
  return rngs.Rng(KEY, jnp.int32(step))


def _shapes(phase):
  return jax.eval_shape(lambda v: phase.init(KEY, v), _batch().video)


def _params(phase):
  """Parameters large enough that every path matters."""
  shapes = _shapes(phase)
  rng = np.random.default_rng(1)

  def draw(name, x):
    scale = 0.2 if x.ndim > 1 else 0.1
    value = scale * rng.normal(size=x.shape)
    return jnp.asarray(value + name.endswith('scale'), jnp.float32)

  return trees.map_named(draw, shapes)


def _loss(phase, params, grad=False):
  """Compiled: much faster than operation by operation."""

  def loss(params, batch):
    return phase.loss(params, {}, batch, _rng())

  fn = jax.value_and_grad(loss, has_aux=True) if grad else loss
  return jax.jit(fn)(params, _batch())


def _mask(phase):
  (spec,) = phase.masks
  return jax.jit(lambda: spec.draw(_rng(), _batch(), GRID)[0])()


def _double(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def _wanted(phase, params, locked=None, chosen=None, context=None):
  """Returns (pixel, latent) losses of the reference; 0 where there is none."""
  batch, params = _batch(), _double(params)
  visible = np.asarray(_mask(phase).visible)
  shared = (batch.video, PATCH, visible, DECODING)
  pixel = latent = 0.0
  if 'pixel' in phase.terms:
    pixel = reference.pixel_loss(params, *shared, phase.pixel_norm)
  if 'latent' in phase.terms:
    names, k = phase.latent_heads, phase.lock_depth
    heads = {names[0]: k}
    if phase.target_layers == 'all':
      heads = {names[i]: i + 1 for i in range(k)}
    latent = reference.latent_loss(
      params,
      _double(locked) if locked else params['encoder'],
      *shared,
      heads,
      chosen,
      context,
      reference.normed if phase.target_norm == 'ln' else lambda x: x,
    )
  return pixel, latent


def _features(params, depth):
  """Returns the whole clips' layers by the reference."""
  every = np.repeat(np.arange(TOKENS)[None], 3, 0)
  video = _batch().video
  return reference.prefix(
    _double(params['encoder']), video, PATCH, every, depth
  )


# Losses agree to 2e-5: float32 against float64.
CLOSE = dict(rtol=2e-5)


@functools.cache
def _gradients(depth, **vit):
  """Returns loss, metrics and gradients by every parameter, frozen or not."""
  layout = vit.pop('layout', 'unrolled')
  phase = _at(_build(layout=layout, vit=vit), depth)
  params = _params(phase)
  labels = freezing.labels(params, phase.frozen)
  trained, frozen = freezing.split(params, labels)

  @jax.jit
  def run(trained):
    def loss(trained):
      whole = freezing.join(trained, frozen)
      return phase.loss(whole, {}, _batch(), _rng())

    return jax.value_and_grad(loss, has_aux=True)(trained)

  (loss, aux), grads = run(trained)
  none = jax.tree.map(jnp.zeros_like, frozen)
  grads = freezing.join(grads, none)
  return loss, aux.metrics, dict(trees.named_leaves(grads))


@pytest.mark.parametrize('depth', [pytest.param(0, marks=pytest.mark.slow), 2])
def test_losses_and_gradients_in_numpy(depth):
  """By finite differences in float64, of leaves along random directions.

  The target is made by parameters that do not move with them, and what is
  frozen has no gradient (invariant 2).
  """
  phase = _at(_build(), depth)
  params = _params(phase)
  loss, metrics, grads = _gradients(depth)
  pixel, latent = _wanted(phase, params)
  np.testing.assert_allclose(loss, pixel + latent, **CLOSE)
  labels = dict(trees.named_leaves(freezing.labels(params, phase.frozen)))
  for seed, (name, grad) in enumerate(grads.items()):
    assert np.any(grad) == (labels[name] == freezing.TRAIN), name
    # Of the blocks every fourth leaf.
    if np.any(grad) and (seed % 4 == 1 or 'block' not in name):
      slope, found = _slope(phase, params, name, grad, seed)
      np.testing.assert_allclose(
        found, slope, rtol=2e-3, atol=2e-5, err_msg=name
      )
  assert metrics['lock_depth'] == depth
  assert metrics['mask/visible_tokens'] == 8
  if depth:  # of the raw layer
    made = _features(params, depth)[depth]
    np.testing.assert_allclose(metrics['target/std'], made.std(), rtol=1e-4)
    np.testing.assert_allclose(
      metrics['target/token_variance'], made.var(1).mean(), rtol=1e-4
    )


def _slope(phase, params, name, grad, seed, weight=1.0):
  """Returns the slope along a direction, by the reference and by `grad`."""
  way = np.random.default_rng(seed).normal(size=grad.shape)

  def moved(size):
    there = trees.map_named(
      lambda n, x: x + size * way if n == name else x, _double(params)
    )
    pixel, latent = _wanted(phase, there, params['encoder'])
    return pixel + weight * latent

  slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
  return slope, np.sum(np.asarray(grad, np.float64) * way)


@pytest.mark.parametrize(
  ('depth', 'vit'),
  [
    (0, dict(layout='loops')),
    (2, dict(layout='loops', remat='full')),
    pytest.param(1, dict(layout='loops'), marks=SLOW),
    pytest.param(2, dict(layout='loops'), marks=SLOW),
    pytest.param(3, dict(layout='loops'), marks=SLOW),
    pytest.param(2, dict(layout='loops', remat='dots'), marks=SLOW),
    pytest.param(0, dict(layout='loops', remat='dots'), marks=SLOW),
    pytest.param(2, dict(remat='full'), marks=SLOW),
  ],
)
def test_loops_change_no_number_and_no_name(depth, vit):
  loss, metrics, grads = _gradients(depth)
  again, same, others = _gradients(depth, **vit)
  assert others.keys() == grads.keys() and same.keys() == metrics.keys()
  np.testing.assert_allclose(again, loss, rtol=1e-5)
  for name, grad in grads.items():
    size = float(jnp.abs(grad).max())
    if name.endswith('attn/k/bias'):  # moves all scores of a query alike:
      size = float(jnp.abs(grads[name.replace('/k/', '/q/')]).max())
      assert jnp.abs(grad).max() <= 1e-5 * size, name  # nought but rounding
    np.testing.assert_allclose(
      others[name], grad, rtol=1e-5, atol=1e-5 * size, err_msg=name
    )


@pytest.mark.parametrize(
  ('depth', 'knobs'),
  [
    (0, dict(pixel_norm='none', vit=dict(positions='both'))),
    (1, dict(target_norm='none')),
    (3, dict(target_layers='all')),
    pytest.param(3, dict(target_layers='all', layout='loops'), marks=SLOW),
  ],
)
def test_losses_of_the_knobs_in_numpy(depth, knobs):
  phase = _at(_build(**knobs), depth)
  params = _params(phase)
  loss, aux = _loss(phase, params)
  pixel, latent = _wanted(phase, params)
  np.testing.assert_allclose(loss, pixel + latent, **CLOSE)
  assert ('loss/pixel' in aux.metrics) == bool(pixel)
  assert ('loss/latent' in aux.metrics) == bool(latent)


def test_what_each_phase_freezes():
  def frozen(phases, depth):
    phase = _at(phases, depth)
    labels = freezing.labels(_shapes(phase), phase.frozen)
    return {
      '/'.join(name.split('/')[:2])
      .removesuffix('/kernel')
      .removesuffix('/bias')
      for name, label in trees.named_leaves(labels)
      if label == freezing.FREEZE
    }

  def blocks(k):
    return {f'encoder/block_{i:02d}' for i in range(k)}

  phases = _build()
  assert frozen(phases, 0) == {'latent_head'}
  for k in (1, 2, 3):
    assert frozen(phases, k) == blocks(k) | {'encoder/embed', 'pixel_head'}
  learned = frozen(_build(vit=dict(positions='both')), 1)
  assert learned == frozen(phases, 1) | {'encoder/positions'}
  pixels = frozen(_build(target='pixels'), 1)
  assert pixels == blocks(1) | {'encoder/embed', 'latent_head'}
  control = _build(freeze=False)
  assert frozen(control, 0) == {'latent_head'}
  assert frozen(control, 3) == set()
  every = _build(target_layers='all')
  heads = {f'latent_head_{k:02d}' for k in range(1, 4)}
  assert frozen(every, 0) == heads
  assert frozen(every, 2) == (
    blocks(2) | {'encoder/embed', 'pixel_head'} | heads - {
      'latent_head_01', 'latent_head_02',
    }
  )  # fmt: skip


def test_the_plan_of_a_run():
  phases = _build(rewarm=(0.5, 0.1), frozen_dtype='bfloat16')
  assert [p.name for p in phases] == ['pixels', 'lock_01', 'lock_02', 'lock_03']
  assert [p.steps for p in phases] == [4, 4, 4, 4]
  assert [p.rewarm for p in phases] == [(0, 1.0)] + [(2, 0.1)] * 3
  for phase in phases:
    assert (phase.carry, phase.horizon) == (phase_lib.CARRY, 'run')
    assert phase.frozen_dtype == 'bfloat16' and not phase.teachers
  generated = _build(schedule='', total=90, jump=2)
  assert [(p.lock_depth, p.steps) for p in generated] == [(0, 30), (2, 60)]
  terms = {
    'latent': ('latent',),
    'pixels': ('pixel',),
  }
  for target, wanted in terms.items():
    first, *locks = _build(target=target)
    assert first.terms == ('pixel',)
    assert {p.terms for p in locks} == {wanted}


def test_the_target_is_the_layer_of_the_whole_clip():
  """Invariants 4, 5 and 11."""
  phase = _at(_build(), 2)
  params, video = _params(phase), _batch().video
  mask = _mask(phase)

  @jax.jit
  def views(params, video):
    ((head, target),) = phase._latent_targets(params, video, None)
    encoder = {'params': params['encoder']}
    every = phase.encoder.apply(encoder, video, features=True)
    part = phase.encoder.apply(encoder, video, upto=2)
    seen = phase.encoder.apply(encoder, video, mask.visible)
    assert head == 'latent_head'
    return target, every[2], part, seen

  target, layer, part, seen = views(params, video)
  np.testing.assert_array_equal(part, layer)
  np.testing.assert_array_equal(target, layer)
  np.testing.assert_allclose(target, _features(params, 2)[2], atol=1e-4)
  # One masked token of clip 0 changes: every target of clip 0 does, and
  # nothing that the visible tokens are made of.
  t, y, x = np.unravel_index(int(mask.masked[0, 0]), GRID)
  other = np.array(video)
  other[0, 2 * t, 4 * y, 4 * x] ^= 255
  moved, _, _, seen_again = views(params, other)
  np.testing.assert_array_equal(seen_again, seen)
  changed = np.any(moved != target, axis=-1)
  assert changed[0].all() and not changed[1:].any()


def test_masked_pixels_reach_the_loss_only_as_targets():
  """Invariant 10, and that pixels of the target have no gradient here."""
  phase = _at(_build(), 1)
  params = _params(phase)

  @jax.jit
  def gradient(video):
    def loss(video):
      batch = dataclasses.replace(_batch(), video=video)
      return phase.loss(params, {}, batch, _rng())[0]

    return jax.grad(loss)(video)

  grad = gradient(jnp.asarray(_batch().video, jnp.float32) / 255)
  touched = np.abs(losses.patchify(grad, PATCH)).sum((2, 3)) > 0
  visible = np.asarray(_mask(phase).visible)
  for row, seen in zip(touched, visible, strict=True):
    assert set(np.flatnonzero(row)) == set(seen.tolist())


@pytest.mark.parametrize(
  'context', ['subset', pytest.param('full', marks=SLOW)]
)
def test_a_subset_of_the_positions(context):
  """Invariant 15: 5 % of all positions, masked ones, ascending."""
  knobs = dict(positions='subset', subset=0.1, subset_context=context)
  phase = _at(_build(**knobs), 2)
  params = _params(phase)
  mask = _mask(phase)
  draw = jax.jit(lambda m: phase._chosen(_rng(), _batch(), m, TOKENS))
  chosen = np.asarray(draw(mask))
  assert chosen.shape == (3, 3)  # a tenth of 32
  for row, masked in zip(chosen, np.asarray(mask.masked), strict=True):
    assert set(row.tolist()) <= set(masked.tolist()) and len(set(row)) == 3
  assert len({tuple(row) for row in chosen.tolist()}) == 3
  alone = chosen if context == 'subset' else None
  _, latent = _wanted(phase, params, chosen=chosen, context=alone)
  loss, _ = _loss(phase, params)
  np.testing.assert_allclose(loss, latent, **CLOSE)


def test_masked_positions_only():
  phase = _at(_build(positions='masked'), 2)
  params = _params(phase)
  chosen = np.asarray(_mask(phase).masked)
  _, latent = _wanted(phase, params, chosen=chosen)
  loss, _ = _loss(phase, params)
  np.testing.assert_allclose(loss, latent, **CLOSE)


@pytest.mark.parametrize(
  ('weight', 'masks'),
  [
    ('cosine', 'random:0.75'),
    pytest.param('constant', 'short:8/12', marks=SLOW),
  ],
)
def test_the_control_adds_both_terms(weight, masks):
  """And its target moves with the weights, without a gradient to it."""
  knobs = dict(freeze=False, latent_weight=weight, masks=masks)
  phase = _at(_build(**knobs), 2)
  params = _params(phase)
  w = {'constant': 1.0, 'cosine': (1 - math.cos(math.pi / 4)) / 2}[weight]
  (loss, aux), grads = _loss(phase, params, grad=True)
  pixel, latent = _wanted(phase, params)
  np.testing.assert_allclose(loss, pixel + w * latent, **CLOSE)
  np.testing.assert_allclose(aux.metrics['loss/pixel'], pixel, **CLOSE)
  np.testing.assert_allclose(aux.metrics['loss/latent'], latent, **CLOSE)
  name = 'encoder/block_00/mlp/fc1/kernel'
  grad = dict(trees.named_leaves(grads))[name]
  slope, found = _slope(phase, params, name, grad, 0, w)
  np.testing.assert_allclose(found, slope, rtol=2e-3)


def test_pictures_of_a_pixel_phase_and_features_before_the_decoder():
  phases = _build()
  phase = _at(phases, 0)
  params, video = _params(phase), _batch().video
  assert _at(phases, 1).reconstruct(params, _batch(), _rng()) == {}

  @jax.jit
  def views(params):
    picture = phase.reconstruct(params, _batch(), _rng())['random']
    encode = functools.partial(phase.encode, params, video)
    return *picture[:2], encode(), encode(depth=0.8)

  mask, predicted, tokens, part = views(params)
  np.testing.assert_array_equal(mask.masked, _mask(phase).masked)
  decoded = reference.decode(
    _double(params), video, PATCH, np.asarray(mask.visible), DECODING
  )
  wanted = reference.linear(_double(params['pixel_head']), decoded)
  wanted = np.take_along_axis(wanted, np.asarray(mask.masked)[..., None], 1)
  np.testing.assert_allclose(predicted, wanted, atol=2e-4)
  np.testing.assert_allclose(tokens, _features(params, 3)[3], atol=2e-4)
  # int(5 * .8) - 2 blocks, as 4DS counts.
  np.testing.assert_allclose(part, _features(params, 2)[2], atol=2e-4)


def test_frozen_matrices_in_bfloat16_change_no_output():
  """Where a model computes in bfloat16; vectors stay as they are."""
  phase = _at(_build(vit=dict(dtype='bfloat16')), 2)
  params = _params(phase)
  labels = freezing.labels(params, phase.frozen)
  stored = freezing.store(params, labels, 'bfloat16')
  kinds = {name: x.dtype for name, x in trees.named_leaves(stored)}
  halved = {n for n, dtype in kinds.items() if dtype == jnp.bfloat16}
  assert halved == {
    n
    for n, x in trees.named_leaves(params)
    if x.ndim > 1
    and n.startswith(
      ('encoder/embed', 'encoder/block_00', 'encoder/block_01', 'pixel_head')
    )
  }
  whole, _ = _loss(phase, params)
  half, _ = _loss(phase, stored)
  assert float(half) == float(whole)


def test_vjepa_predicts_the_layer_above_of_its_average():
  phases = _build(base='vjepa', masks='short:8/12', ema=(0.8, 1.0))
  names = ['lock_00', 'lock_01', 'lock_02', 'lock_03']
  assert [p.name for p in phases] == names
  assert [p.target_layer for p in phases] == [1, 2, 3, 4]
  assert [p.frozen_depth for p in phases] == [0, 1, 2, 3]
  for phase in phases:
    assert phase.teachers['target'].source == phase_lib.FromEma('encoder')
    assert phase.teachers['target'].module == phase.encoder
    assert phase.encoder.final_norm and not phase.encoder.decoder_blocks
  assert phases[0].frozen == ()
  # One line over the run, not one for each lock.
  momenta = [p.ema['encoder'].momentum for p in phases]
  wanted = [(0.8, 0.85), (0.85, 0.9), (0.9, 0.95), (0.95, 1.0)]
  np.testing.assert_allclose(momenta, wanted)
  phase = phases[2]
  params = _params(phase)
  average = jax.tree.map(lambda x: x + 0.05, params['encoder'])
  (spec,), video = phase.masks, _batch().video

  @jax.jit
  def both(params, average):
    teachers = {'target': average}
    targets = phase.targets(teachers, video)
    batch = dataclasses.replace(_batch(), targets=targets)
    loss, _ = phase.loss(params, teachers, batch, _rng())
    apply = phase.encoder.apply
    layer = apply({'params': average}, video, features=True)[3]
    mask, _ = spec.draw(_rng(), _batch(), GRID)
    z = apply({'params': params['encoder']}, video, mask.visible)
    p = phase.predictor.apply(
      {'params': params['predictor']}, z, mask, GRID, token=0
    )
    target = sampling.gather(losses.layer_norm0(layer), mask.masked)
    return loss, losses.l1(p, target)

  loss, wanted = both(params, average)
  # A teacher's parameters are read in bfloat16.
  np.testing.assert_allclose(loss, wanted, rtol=1e-2)


def test_4b_has_the_published_size():
  """Invariant 16: encoder and latents, without heads; all blocks are alike."""
  _, config = config_lib.load('configs/layerlock_4b.py')
  video = (16, 224, 224, 3)
  phases = methods.build(config.method, video, _resolve)
  phase = phases[0]
  clip = jax.ShapeDtypeStruct((1, *video), jnp.uint8)

  def count(depth):
    encoder = phase.encoder.clone(depth=depth)
    assert encoder.decoder_blocks == 4
    return trees.count(jax.eval_shape(encoder.init, KEY, clip))

  five, six = count(5), count(6)
  latents = 8 * 14 * 14 * 1792
  total = five + 51 * (six - five) + latents
  assert phase.encoder.depth == 56 and total == 3_809_464_064
  assert phase.latent_head.features == 1792
  assert phase.pixel_head.features == 2 * 16 * 16 * 3
  assert [p.lock_depth for p in phases] == list(range(38))
  # 38 copies of the parameters would be half a terabyte.
  kept = retention.phases(config.checkpoint.keep_phases, phases)
  assert kept == ('pixels', 'lock_37')


def _costs(size, **knobs):
  """Returns TFLOP before and after all locks, and of the run over an MAE's."""
  config = layerlock_config.default()
  config.encoder.size, config.total = size, 480_000
  config.update(knobs)
  clip = (16, 224, 224, 3)
  phases = methods.build(config, clip, _resolve)
  steps = [phase.steps for phase in phases]
  costs = [phase.cost(clip).total / 1e12 for phase in phases]
  run = np.dot(costs, steps) / (costs[0] * sum(steps))
  return costs[0], costs[-1], 100 * (run - 1), phases[-1]


@pytest.mark.parametrize('size', ['S', 'B', 'L', 'H', 'G', 'e'])
def test_the_table_of_costs_in_the_readme(size):
  text = pathlib.Path(layerlock_config.__file__).with_name('README.md')
  (row,) = re.findall(rf'^\| {size} \| (\d.*)\|$', text.read_text(), re.M)
  locked, before, *cells = (cell.strip() for cell in row.split('|'))
  variants = (dict(target='pixels'), {}, dict(positions='subset'))
  for cell, knobs in zip(cells, variants, strict=True):
    first, last, change, phase = _costs(size, **knobs)
    assert cell == f'{last:.3f} ({change:+.1f} %)'.removeprefix('0')
    assert before == f'{first:.3f}'.removeprefix('0')
    assert locked == f'{phase.lock_depth} of {phase.encoder.depth}'


def test_block_masks_cost_as_many_latents_as_there_are_positions():
  """They neither show nor hide some of the tokens; latents have them all."""
  before, *_ = _costs('B', masks='short:78/1000')
  assert before == _costs('B')[0]


def test_latents_and_heads_have_their_shapes():
  wanted = {
    'latents/tokens': (32, 24),
    'pixel_head/kernel': (24, 96),
    'pixel_head/bias': (96,),
    **{
      f'latent_head_{k:02d}/{part}': size
      for k in (1, 2, 3)
      for part, size in (('kernel', (24, 24)), ('bias', (24,)))
    },
  }
  for phase in _build(target_layers='all'):
    shapes = {
      name: x.shape
      for name, x in trees.named_leaves(_shapes(phase))
      if not name.startswith('encoder')
    }
    assert shapes == wanted


@pytest.mark.parametrize(
  ('knobs', 'message'),
  [
    (dict(schedule='((0, 12), (4, 4))'), 'locks 4 layers; at most 3'),
    (dict(decoder_blocks=2, last=3, schedule=''), 'locks 3 .*at most 2 of the'),
    (
      dict(total=17),
      'its phases have 16 steps in total and method.total is 17',
    ),
    (dict(schedule='soon'), "method.schedule: found 'soon'"),
    (dict(schedule='auto'), r"found 'auto', wanted \(lock depth, steps\)"),
    (dict(target_layers='single'), "method.target_layers: found 'single'"),
    (dict(schedule='', total=2), '2 steps, 1 of them before the first lock'),
    (dict(masks='random:0.5+tube:0.5'), 'wanted one mask'),
    (dict(masks='rndom:0.5'), 'nearest'),
    (dict(target='latents'), "method.target: found 'latents'"),
    (dict(positions='some'), "method.positions: found 'some'"),
    (dict(layout='scan'), "method.layout: found 'scan'"),
    (dict(base='ijepa'), "method.base: found 'ijepa'"),
  ],
)
def test_bad_configs_are_refused_by_name(knobs, message):
  with pytest.raises(ValueError, match=message):
    _build(**knobs)
