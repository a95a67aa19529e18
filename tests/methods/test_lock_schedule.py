"""When layers lock: the published schedule, its knobs, and what is refused."""

import itertools

import pytest

from vssl_jax.methods import lock_schedule


def _edges(schedule):
  """Returns the step at which each phase but the first begins, and the end."""
  return list(itertools.accumulate(n for _, n in schedule))


# Source: LayerLock, arXiv 2509.10156 (secondary source) for the first row:
# 160k steps on pixels, then a layer every 10k until 32 of 48 are locked. The
# others are the same fractions worked out by hand.
@pytest.mark.parametrize(
  ('total', 'depth', 'locks', 'first', 'last'),
  [
    (480_000, 48, 32, [160_000, 170_000, 180_000], [470_000, 480_000]),
    (100_000, 24, 16, [33_333, 37_500, 41_666], [95_833, 100_000]),
    (30_000, 12, 8, [10_000, 12_500, 15_000], [27_500, 30_000]),
    # 10.67 layers are 10.
    (33_000, 16, 10, [11_000, 13_200, 15_400], [30_800, 33_000]),
    (488_281, 56, 37, [162_760, 171_558, 180_356], [479_483, 488_281]),
  ],
)
def test_the_published_schedule_and_its_fractions(
  total, depth, locks, first, last
):
  found = lock_schedule.lock_schedule(total, depth, limit=depth - 4)
  assert [k for k, _ in found] == list(range(locks + 1))
  assert _edges(found)[:3] == first
  assert _edges(found)[-2:] == last
  assert lock_schedule.check(found, total, depth - 4) == found


def test_steps_and_fractions_say_the_same():
  a = lock_schedule.lock_schedule(1000, 12, start=0.4, interval=0.1, last=0.5)
  b = lock_schedule.lock_schedule(1000, 12, start=400, interval=100, last=6)
  assert a == b
  assert a == ((0, 400), *((k, 100) for k in range(1, 7)))


def test_the_last_lock_takes_the_rest_of_the_run():
  found = lock_schedule.lock_schedule(1000, 12, start=400, interval=100, last=3)
  assert found == ((0, 400), (1, 100), (2, 100), (3, 400))


def test_locks_that_would_come_after_the_end_are_left_out():
  found = lock_schedule.lock_schedule(1000, 12, start=400, interval=250, last=8)
  assert found == ((0, 400), (1, 250), (2, 250), (3, 100))


def test_several_layers_at_a_time():
  found = lock_schedule.lock_schedule(900, 12, jump=3, limit=8)  # 8 of 12
  assert found == ((0, 300), (3, 300), (6, 300))


def test_blocks_that_decode_are_never_locked():
  found = lock_schedule.lock_schedule(600, 6, limit=2)  # two thirds would be 4
  assert [k for k, _ in found] == [0, 1, 2]
  with pytest.raises(ValueError, match=r'last: locks 5 layers; at most 2'):
    lock_schedule.lock_schedule(600, 6, last=5, limit=2)


@pytest.mark.parametrize(
  ('total', 'knobs'),
  [
    (10, dict()),  # 16 locks in 7 steps
    (100, dict(start=100)),  # nothing is left
    (100, dict(start=0.001)),  # less than a step on pixels
    (100, dict(last=0.01)),  # no layer
    (100, dict(last=3, jump=4)),  # less than one jump
  ],
)
def test_a_run_too_short_for_its_locks_is_refused(total, knobs):
  with pytest.raises(ValueError, match=rf'{total} steps, .* leave no step for'):
    lock_schedule.lock_schedule(total, 24, **knobs)


def test_a_schedule_that_is_written_out():
  assert lock_schedule.parse('((0, 60), (1, 20))') == ((0, 60), (1, 20))
  assert lock_schedule.parse('[[0, 60], [3, 20]]') == ((0, 60), (3, 20))
  assert lock_schedule.parse('((2, 60),)') == ((2, 60),)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('soon', r"found 'soon', wanted \(lock depth, steps\)"),
    ('((0, 60)', 'found'),  # no end
    ('((0, 60))', 'found'),  # one pair, and no tuple of pairs
    ('((0, 60, 1),)', 'found'),
    ('((0, 60.5),)', 'found'),
    ('7', 'found'),
    ('()', 'at least one phase'),
    ('((0, 0), (1, 20))', 'one step in each'),
    ('((-1, 10),)', 'one step in each'),
    ('((0, 60), (2, 20), (1, 20))', r'\[0, 2, 1\], wanted them to rise'),
    ('((0, 60), (0, 20))', r'\[0, 0\], wanted them to rise'),
  ],
)
def test_text_that_is_no_schedule_is_refused(text, message):
  with pytest.raises(ValueError, match=rf'method.schedule: .*{message}'):
    lock_schedule.parse(text)


def test_a_schedule_must_fit_the_run_and_the_network():
  schedule = ((0, 60), (3, 20))
  assert lock_schedule.check(schedule, 80, 3) == schedule
  with pytest.raises(ValueError, match=r'80 steps in total and .*total is 90'):
    lock_schedule.check(schedule, 90, 3)
  with pytest.raises(ValueError, match=r'locks 3 layers; at most 2 can be'):
    lock_schedule.check(schedule, 80, 2)
