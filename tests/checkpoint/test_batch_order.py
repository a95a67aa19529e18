import itertools

import pytest

from tests.train import small_runs
from vssl_jax.checkpoint import batch_order
from vssl_jax.data import pipeline

RANGES = [(), ((3, 5),), ((0, 2),), ((2, 3), (5, 9), (11, 12))]


def _taken(left_out, count=40):
  """The batches that are taken, written out."""
  gone = {n for a, b in left_out for n in range(a, b)}
  return [n for n in range(200) if n not in gone][:count]


@pytest.mark.parametrize('left_out', RANGES)
def test_a_step_takes_the_batch_of_its_place(left_out):
  taken = _taken(left_out)
  assert [batch_order.batch_of(s, left_out) for s in range(40)] == taken


@pytest.mark.parametrize('left_out', RANGES)
def test_leaving_out_takes_the_batches_of_those_steps_away(left_out):
  for step, count in itertools.product(range(12), (0, 1, 4)):
    found = batch_order.leave_out(left_out, step, count)
    taken = _taken(left_out, 60)
    del taken[step : step + count]
    assert _taken(found) == taken[:40], (step, count)
    for (_, stop), (first, _) in itertools.pairwise(found):
      assert stop < first, (step, count)


@pytest.mark.parametrize('left_out', RANGES)
def test_what_was_passed_tells_whether_the_past_is_the_same(left_out):
  """Of two orders of one seed, up to a step."""
  for step, at in itertools.product(range(12), range(12)):
    other = batch_order.leave_out(left_out, at, 2)
    same = _taken(left_out, step) == _taken(other, step)
    passed = [batch_order.passed(x, step) for x in (left_out, other)]
    assert (passed[0] == passed[1]) == same, (step, at)


def test_the_clips_come_in_that_order(clips):
  config = small_runs.tiny_config(clips, 'nowhere')
  stream = pipeline.make(config.data.to_dict(), batch_size=4, seed=0)
  first = itertools.islice(stream.iterator(0), 20)
  straight = [x['index'].tolist() for x in first]
  left_out = ((2, 3), (5, 9), (11, 12))
  for step in (0, 2, 4, 6):
    mine = itertools.islice(batch_order.iterator(stream, left_out, step), 6)
    wanted = [straight[n] for n in _taken(left_out)[step : step + 6]]
    assert [x['index'].tolist() for x in mine] == wanted
  stream.close()
