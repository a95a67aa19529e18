"""Methods after one another: each phase is answered by its own part."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from vssl_jax import rngs
from vssl_jax.methods import chain
from vssl_jax.methods import phase as phase_lib
from vssl_jax.models import vit


@dataclasses.dataclass(frozen=True)
class Says(phase_lib.Method):
  """Answers everything with its number."""

  number: float
  plan: tuple

  def phases(self):
    return self.plan

  def init(self, rng, video, phase):
    return {'encoder': {'number': self.number}}

  def targets(self, teachers, video, phase):
    return {'number': jnp.full(len(video), self.number)}

  def loss(self, params, teachers, batch, rng, phase):
    return jnp.asarray(self.number), phase_lib.Aux({})

  def cost(self, phase, video):
    return phase_lib.Cost(self.number)

  def encode(self, params, video, depth=None, phase=None):
    return jnp.full((1, 1, 1), self.number)

  def masks(self, teachers, batch, rng, phase):
    return {str(self.number): phase_lib.Seen(None)}

  def reconstruct(self, params, batch, rng, phase):
    return {str(self.number): phase_lib.Reconstruction(None, None, 'patch')}


def _phase(name, **fields):
  return phase_lib.Phase(name=name, steps=1, encoder=vit.make('Ti'), **fields)


def test_every_question_goes_to_the_part_that_has_the_phase():
  first = Says(1.0, (_phase('a'), _phase('b')))
  method = chain.of(first, Says(2.0, (_phase('c'),)))
  assert [p.name for p in method.phases()] == ['a', 'b', 'c']
  key, clip = jax.random.key(0), jnp.zeros((1, 2, 16, 16, 3))
  for own, number in zip(method.phases(), (1, 1, 2), strict=True):
    phase = dataclasses.replace(own, steps=7)  # as of a shortened run
    batch = {'video': clip}
    rest = (batch, rngs.Rng(key, jnp.int32(0)), phase)
    assert method.init(key, clip, phase)['encoder']['number'] == number
    assert method.targets({}, clip, phase)['number'] == number
    assert method.targets_of({}, batch, phase)['number'] == number
    assert method.loss({}, {}, *rest)[0] == number
    assert method.cost(phase, (2, 16, 16, 3)).total == number
    assert method.encode({}, clip, phase=phase) == number
    assert list(method.masks({}, *rest)) == [f'{number}.0']
    assert list(method.reconstruct({}, *rest)) == [f'{number}.0']
  assert method.encode({}, clip) == 2  # the last phase's


def test_a_chain_of_one_is_that_one():
  only = Says(1.0, (_phase('a'),))
  assert chain.of(Says(2.0, ()), only) is only


def test_a_teacher_may_come_from_an_earlier_part_but_not_a_later_one():
  taught = _phase(
    'b', teachers={'t': phase_lib.Teacher(vit.make('Ti'), source='@a')}
  )
  parts = Says(1.0, (_phase('a'),)), Says(2.0, (taught,))
  assert phase_lib.check(chain.of(*parts).phases())
  with pytest.raises(ValueError, match=r"source '@a'.*before it are \[\]"):
    phase_lib.check(chain.of(*parts[::-1]).phases())
