"""A run whose phases are of several kinds, and what the tuple must hold."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssl_jax import rngs
from vssl_jax.data import batch as batch_lib
from vssl_jax.masks import specs
from vssl_jax.methods import cost as cost_lib
from vssl_jax.methods import phase as phase_lib
from vssl_jax.models import Module, vit
from vssl_jax.train import run

VIT = vit.make(
  {'width': 16, 'depth': 1, 'num_heads': 2}, patch=(2, 8, 8), dtype='float32'
)
TURNED = VIT.clone(rope_pairing='vjepa2')
CLIP = (4, 16, 16, 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plain(phase_lib.Phase):
  """Answers what every phase must, and the rest as all do."""

  def init(self, rng, video):
    return {'encoder': self.encoder.init(rng, video)['params']}

  def loss(self, params, teachers, batch, rng):
    return jnp.mean(self.encode(params, batch.video)), phase_lib.Aux({})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Says(phase_lib.Phase):
  """Answers everything with its number."""

  number: float
  head: Module = VIT

  def init(self, rng, video):
    return {'encoder': {'number': self.number}}

  def targets(self, teachers, video):
    return {'number': jnp.full(len(video), self.number)}

  def loss(self, params, teachers, batch, rng):
    return jnp.asarray(self.number), phase_lib.Aux({})

  def cost(self, video):
    return cost_lib.Cost(self.number)

  def encode(self, params, video, depth=None):
    return jnp.full((1, 1, 1), self.number)

  def draw_masks(self, teachers, batch, rng):
    return {str(self.number): phase_lib.DrawnMask(None)}

  def reconstruct(self, params, batch, rng):
    return {str(self.number): phase_lib.Reconstruction(None, None, 'patch')}


def _plain(name, **fields):
  return Plain(**dict(name=name, steps=1, encoder=VIT) | fields)


def _says(name, number, **fields):
  fields = dict(name=name, steps=1, encoder=VIT, number=number) | fields
  return Says(**fields)


def _batch():
  video = np.random.default_rng(0).integers(0, 255, (2, *CLIP), np.uint8)
  return batch_lib.Batch(video=jnp.asarray(video), index=jnp.arange(2))


KEY = jax.random.key(0)
RNG = rngs.Rng(KEY, jnp.int32(0))


def test_every_question_is_answered_by_its_phase():
  phases = phase_lib.check((_says('a', 1.0), _plain('b'), _says('c', 2.0)))
  short = [dataclasses.replace(p, steps=7) for p in phases]  # another length
  spans = run.spans(short)
  assert [(s.phase.name, s.start, s.end) for s in spans] == [
    ('a', 0, 7), ('b', 7, 14), ('c', 14, 21),
  ]  # fmt: skip
  batch = _batch()
  for span, number in ((spans[0], 1), (spans[2], 2)):
    phase = span.phase
    assert phase.init(KEY, batch.video)['encoder']['number'] == number
    targets = phase.targets({}, batch.video)
    np.testing.assert_array_equal(targets['number'], [number, number])
    assert phase.loss({}, {}, batch, RNG)[0] == number
    assert phase.cost(CLIP).total == number
    assert phase.encode({}, batch.video) == number
    assert list(phase.draw_masks({}, batch, RNG)) == [f'{number}.0']
    assert list(phase.reconstruct({}, batch, RNG)) == [f'{number}.0']


def test_what_a_phase_need_not_answer():
  """No targets or pictures; its masks, counted cost and encoder's tokens."""
  batch = _batch()
  phase = _plain('a')
  assert phase.targets({}, batch.video) == {}
  assert phase.draw_masks({}, batch, RNG) == {}
  assert phase.reconstruct({}, batch, RNG) == {}
  masks = specs.parse('random:0.5')
  (drawn,) = _plain('a', masks=masks).draw_masks({}, batch, RNG).items()
  wanted, _ = masks[0].draw(RNG, batch, (2, 2, 2))
  assert drawn[0] == masks[0].name
  np.testing.assert_array_equal(drawn[1].mask.visible, wanted.visible)
  np.testing.assert_array_equal(drawn[1].mask.masked, wanted.masked)
  assert drawn[1].scores is None and drawn[1].predicted
  cost = phase.cost(CLIP)
  assert cost == cost_lib.traced(phase, CLIP) and cost.trained > 0
  params = jax.jit(phase.init)(KEY, batch.video)

  @functools.partial(jax.jit, static_argnums=1)
  def both(params, depth):
    encoder = {'params': params['encoder']}
    wanted = VIT.apply(encoder, batch.video, depth=depth)
    return phase.encode(params, batch.video, depth), wanted

  (whole, wanted), (part, first) = both(params, None), both(params, 0.5)
  np.testing.assert_array_equal(whole, wanted)
  np.testing.assert_array_equal(part, first)
  assert np.any(part != whole)


def _taught(name, source, module=VIT, subtree='encoder'):
  teacher = phase_lib.Teacher(module, source, subtree)
  return _says(name, 2.0, teachers={'wise': teacher}, carry=())


def test_a_teacher_may_come_from_an_earlier_phase_but_not_a_later_one():
  phases = _plain('a'), _taught('b', phase_lib.FromPhase('a'))
  assert phase_lib.check(phases) == phases
  with pytest.raises(ValueError, match=r'source @a, .*before it are \[\]'):
    phase_lib.check(phases[::-1])
  own = _taught('b', phase_lib.FromPhase('b'))
  with pytest.raises(ValueError, match=r"source @b, .*before it are \['a'\]"):
    phase_lib.check((_plain('a'), own))


def test_a_teacher_of_another_kind_is_of_the_same_function():
  """Its encoder, or a network that only the other kind has."""
  source = phase_lib.FromPhase('a')
  before = _says('a', 1.0, head=TURNED)
  for subtree, module in (('encoder', VIT), ('head', TURNED)):
    phases = before, _taught('b', source, module, subtree)
    assert phase_lib.check(phases) == phases
  for subtree, module in (('encoder', TURNED), ('head', VIT)):
    with pytest.raises(ValueError, match="'wise' has the parameters of @a, a"):
      phase_lib.check((before, _taught('b', source, module, subtree)))


def test_parameters_are_carried_from_one_kind_to_another():
  """The networks that both have must be of one function."""
  phases = _says('a', 1.0, head=TURNED), _plain('b'), _says('c', 2.0)
  assert phase_lib.check(phases) == phases
  turned = _says('c', 2.0, encoder=TURNED)
  with pytest.raises(ValueError, match=r"'c' carries .* of 'b' .* its encoder"):
    phase_lib.check((*phases[:2], turned))
  fresh = dataclasses.replace(turned, carry=('opt', 'example_memory'))
  assert phase_lib.check((*phases[:2], fresh))[2] is fresh


def test_a_run_has_phases_and_each_has_its_own_name():
  with pytest.raises(ValueError, match='the run has no phases'):
    phase_lib.check(())
  with pytest.raises(ValueError, match="two phases are named 'a'"):
    phase_lib.check((_plain('a'), _says('a', 1.0)))


def test_fields_of_a_phase_that_are_wrong():
  assert _plain('a').carry == ('params', 'opt', 'example_memory')
  with pytest.raises(ValueError, match=r"found carry=\('ema',\), wanted some"):
    _plain('a', carry=('ema',))
  with pytest.raises(ValueError, match=r'found steps=0, wanted at least 1'):
    _plain('a', steps=0)
  with pytest.raises(ValueError, match=r'@ema/slow, .* of the phase are \[\]'):
    _taught('a', phase_lib.FromEma('slow'))


@pytest.mark.parametrize(
  ('text', 'source'),
  [
    ('@pixel_teacher', phase_lib.FromPhase('pixel_teacher')),
    ('@ema/encoder', phase_lib.FromEma('encoder')),
    ('runs/salt', phase_lib.FromWeights('runs/salt')),
    ('weights/x.pth#mvd', phase_lib.FromWeights('weights/x.pth#mvd')),
  ],
)
def test_a_source_is_its_text_in_a_config(text, source):
  assert phase_lib.parse_source(text) == source
  assert str(source) == text


def test_no_source_is_an_error():
  with pytest.raises(ValueError, match='a source is missing; wanted @<phase>'):
    phase_lib.parse_source('')
