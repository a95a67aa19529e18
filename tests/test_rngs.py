"""Keys of the examples of a batch: what they depend on and what not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vssl_jax import rngs
from vssl_jax.data import batch as batch_lib


def _rng(seed=0, step=3, micro_batch=None):
  return rngs.Rng(jax.random.key(seed), jnp.int32(step), micro_batch)


def _keys(index, repeat=None, name='mask', rng=None):
  """Returns the bits of the keys of a batch."""
  repeat = None if repeat is None else jnp.int32(repeat)
  batch = batch_lib.Batch(video=None, index=jnp.int32(index), repeat=repeat)
  keys = (rng or _rng()).per_example(name, batch)
  return np.asarray(jax.random.key_data(keys))


@pytest.mark.parametrize('repeat', [None, [0, 1, 0, 2]])
def test_a_key_is_its_examples_own_wherever_it_stands(repeat):
  order = np.array([2, 0, 3, 1])
  index = np.array([7, 9, 7, 4]) if repeat else np.array([7, 9, 3, 4])
  moved = None if repeat is None else np.array(repeat)[order]
  whole = _keys(index, repeat)
  np.testing.assert_array_equal(_keys(index[order], moved), whole[order])
  parts = [None] * 2 if repeat is None else [repeat[:2], repeat[2:]]
  halves = [_keys(*x) for x in zip((index[:2], index[2:]), parts, strict=True)]
  np.testing.assert_array_equal(np.concatenate(halves), whole)


def test_clips_of_one_example_differ_only_where_the_batch_counts_them():
  first, second = _keys([5, 5], [0, 1])
  assert (first != second).any()
  first, second = _keys([5, 5])
  np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
  'other',
  [
    dict(name='mask/short'),
    dict(rng=_rng(seed=1)),
    dict(rng=_rng(step=4)),
    dict(index=[8, 10]),
    dict(repeat=[1, 1]),
  ],
)
def test_a_key_depends_on_name_seed_step_index_and_repeat(other):
  settings = dict(index=[7, 9], repeat=[0, 0])
  differs = _keys(**settings) != _keys(**(settings | other))
  assert differs.any(axis=1).all()


def test_micro_batches_differ_in_draws_per_batch_alone():
  whole, first, second = (_rng(micro_batch=n) for n in (None, 0, 1))
  keys = [x.per_batch('dropout') for x in (whole, first, second)]
  assert len({jax.random.key_data(k).tobytes() for k in keys}) == 3
  np.testing.assert_array_equal(
    _keys([7, 9], rng=first), _keys([7, 9], rng=second)
  )


def test_a_batch_may_be_traced():
  batch = batch_lib.Batch(
    video=None, index=jnp.arange(3), repeat=jnp.zeros(3, jnp.int32)
  )
  keys = jax.jit(lambda rng, batch: rng.per_example('mask', batch))
  np.testing.assert_array_equal(
    jax.random.key_data(keys(_rng(), batch)), _keys(range(3), [0] * 3)
  )
