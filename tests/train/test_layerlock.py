"""LayerLock through the trainer: what freezes, is carried and resumes."""

import shutil

import jax
import numpy as np
import pytest

from tests.train import locks
from vssl_jax import encoder as encoder_lib
from vssl_jax import trees
from vssl_jax.train import loop, phase_setup, phase_start
from vssl_jax.train import run as run_lib

# Whole runs. What freezing does in one step stands in test_freezing.py.
pytestmark = pytest.mark.slow


def _copy(config):
  return config.copy_and_resolve_references()


@pytest.fixture(scope='module')
def finished(clips, tmp_path_factory):
  """A whole run of three phases, every second step kept."""
  config = locks.tiny(clips, tmp_path_factory.mktemp('lock') / 'run')
  assert loop.train(config) == 0
  return config


def _cut(config, folder, step):
  """Returns the config of a copy of a run that stopped after a step."""
  shutil.copytree(config.workdir, folder / 'run')
  config = _copy(config)
  config.workdir = str(folder / 'run')
  locks.truncate(config.workdir, step)
  return config


def test_frozen_leaves_keep_every_bit_for_ever_after(finished):
  """Invariant 1: under weight decay, and with momentum from before."""
  bits = {
    step: locks.sums(saved)
    for step, saved in locks.states(finished.workdir).items()
  }
  assert sorted(bits) == list(range(2, 13, 2))
  first = locks.named(bits[4], *locks.LOCKED[1], 'pixel_head')
  second = locks.named(bits[4], 'encoder/block_01')
  assert len(first) == 2 + 16 + 2 and len(second) == 16
  for step in (6, 8, 10, 12):
    assert {n for n in first if bits[step][n] != bits[4][n]} == set()
  for step in (10, 12):
    assert {n for n in second if bits[step][n] != bits[8][n]} == set()
  # They moved until then, and the others move on.
  moving = locks.named(bits[4], 'encoder/block_02', 'latents')
  for step in range(4, 13, 2):
    after, before = bits[step], bits[step - 2]
    still = {n for n in moving if after[n] == before[n]}
    assert still == set(), step
  assert all(bits[4][n] != bits[2][n] for n in first)
  assert all(bits[8][n] != bits[4][n] for n in second)
  head = locks.named(bits[4], 'latent_head')
  assert all(bits[4][n] == bits[2][n] for n in head)
  assert all(bits[6][n] != bits[4][n] for n in head)


def test_the_optimizer_forgets_what_is_frozen(finished):
  found = locks.states(finished.workdir)

  def moments(step):
    names = [n for n in locks.sums(found[step]) if '/mu/' in n]
    return {n.split('/mu/')[1].rpartition('/')[0] for n in names}

  before, one, two = moments(4), moments(6), moments(10)
  assert 'latent_head' in one - before and 'pixel_head' in before - one
  assert 'encoder/embed' in before - one
  for names, k in ((before, 0), (one, 1), (two, 2)):
    blocks = {n.split('/')[1] for n in names if '/block' in n}
    assert blocks == {f'block_{i:02d}' for i in range(k, 3)}


def _begun(config, number):
  """Returns the state that a phase starts from, and the one saved before."""
  run = run_lib.open_run(config)
  try:
    with jax.set_mesh(run.mesh):
      span = run_lib.spans(run.phases)[number]
      saved = run.checkpoints.newest()
      examples = run.clips.num_examples
      shapes = phase_setup.build(config, span, run.video, examples)
      state = phase_start.state(run, shapes, saved, False)
    return dict(trees.named_leaves(state)), locks.read(saved, '')
  finally:
    run.clips.close()
    run.logger.close()


@pytest.mark.parametrize('lock', [1, 2])
def test_what_is_still_trained_is_carried_by_name(finished, tmp_path, lock):
  """Invariant 8: parameters, moments and Adam's count, bit for bit."""
  config = _cut(finished, tmp_path, 4 * lock)
  state, before = _begun(config, lock)
  fresh = set()
  for name, x in state.items():
    if name.startswith('guard'):
      continue  # of a phase
    if name in before:
      np.testing.assert_array_equal(x, before[name], err_msg=name)
    else:
      fresh.add(name)
      assert not np.any(x), name
  heads = {n for n in state if '/latent_head/' in n and n.startswith('opt')}
  assert len(heads) == 4  # two moments of kernel and bias
  assert fresh == (heads if lock == 1 else set())
  if lock == 2:
    assert all(np.any(state[n]) for n in heads)
  (count,) = {int(x) for n, x in state.items() if n.endswith('/count')}
  assert count == int(state['step']) == 4 * lock


def test_the_learning_rate_is_a_cosine_of_the_run_times_a_rewarm(finished):
  """Invariant 13, on what was logged."""
  rates = locks.logged(finished.workdir, 'lr')
  peak, end = 1e-2, 1e-4
  for number, rate in rates.items():
    cosine = (1 + np.cos(np.pi * (number - 2) / 10)) / 2
    wanted = peak * number / 2 if number < 2 else end + (peak - end) * cosine
    if number > 4:  # two steps of each lock
      wanted *= 0.1 + 0.9 * min(1, ((number - 1) % 4 + 1) / 2)
    np.testing.assert_allclose(rate, wanted, rtol=1e-5, err_msg=str(number))
  assert sorted(rates) == list(range(1, 13))


def test_the_target_of_a_clip_is_constant_within_a_phase(finished):
  """Invariants 3 and 14: and its spread does not fall."""
  run = run_lib.open_run(_copy(finished))
  run.clips.close()
  run.logger.close()
  phase = run.phases[2]
  video = np.random.default_rng(0).integers(0, 255, (2, *run.video), np.uint8)
  upto = jax.jit(
    lambda p: phase.encoder.apply({'params': p}, video, upto=phase.lock_depth)
  )

  def target(step):
    leaves = locks.read(locks.states(finished.workdir)[step], 'params/encoder')
    return upto(trees.nest(leaves)['params']['encoder'])

  at_lock = target(8)
  for step in (10, 12):
    np.testing.assert_array_equal(target(step), at_lock)
  assert np.any(target(6) != at_lock)
  spread = locks.logged(finished.workdir, 'target/token_variance')
  for lock in (range(5, 9), range(9, 13)):
    values = [spread[step] for step in lock]
    assert max(values) < 2 * min(values)
  depths = locks.logged(finished.workdir, 'lock_depth')
  assert [depths[s] for s in sorted(depths)] == [0] * 4 + [1] * 4 + [2] * 4


def test_without_locks_the_losses_are_those_before_the_first(
  finished, clips, tmp_path
):
  """Invariant 6, bit for bit; the matched MAE baseline."""
  config = locks.tiny(clips, tmp_path / 'run', '((0, 12),)')
  config.checkpoint.every = 1000
  assert loop.train(config) == 0
  want, got = (
    locks.logged(finished.workdir, 'loss'),
    locks.logged(config.workdir, 'loss'),
  )
  for step in range(1, 5):
    assert got[step] == want[step], step
  assert got[5] != want[5]


@pytest.mark.parametrize(
  'step',
  [2, 4, 6, 8, 10],  # 4 and 8 are boundaries between locks
)
def test_resume_is_bit_exact(finished, tmp_path, step):
  """Invariant 9: the optimizer's tree differs from phase to phase."""
  config = _cut(finished, tmp_path, step)
  assert loop.train(config) == 0
  want, got = (
    locks.states(finished.workdir)[12],
    locks.states(config.workdir)[12],
  )
  want, got = locks.sums(want), locks.sums(got)
  assert {n for n in want | got if want.get(n) != got.get(n)} == set()


def test_a_run_goes_on_in_loops(finished, tmp_path):
  """Inside a lock, from the same checkpoint: the layout has no names."""
  config = _cut(finished, tmp_path, 10)
  config.method.layout = 'loops'
  assert loop.train(config) == 0
  want, got = (
    locks.logged(finished.workdir, 'loss'),
    locks.logged(config.workdir, 'loss'),
  )
  for step in (11, 12):
    np.testing.assert_allclose(got[step], want[step], rtol=1e-5)
  a, b = (
    locks.sums(locks.states(finished.workdir)[12]),
    locks.sums(locks.states(config.workdir)[12]),
  )
  assert a.keys() == b.keys()
  same = {n for n in a if a[n] == b[n]}
  assert locks.named(a, *locks.LOCKED[2], 'pixel_head') <= same


@pytest.fixture(scope='module')
def half(clips, tmp_path_factory):
  """A run that keeps what is frozen in bfloat16."""
  folder = tmp_path_factory.mktemp('half') / 'run'
  config = locks.tiny(clips, folder, '((0, 1), (1, 1), (2, 2))')
  config.checkpoint.every = 1
  config.method.frozen_dtype = config.method.vit.dtype = 'bfloat16'
  assert loop.train(config) == 0
  return config


def test_frozen_matrices_are_kept_in_half_the_bytes(half):
  found = locks.states(half.workdir)
  for step, k in ((1, 0), (2, 1), (3, 2)):
    leaves = dict(trees.named_leaves(found[step].shapes()))
    frozen = locks.named(leaves, *locks.LOCKED[k], 'pixel_head') if k else set()
    frozen |= set() if k else locks.named(leaves, 'latent_head')
    assert frozen
    for name, x in leaves.items():
      if name.startswith('params/'):
        halved = name in frozen and len(x.shape) > 1
        assert x.dtype == ('bfloat16' if halved else 'float32'), name
      else:
        assert x.dtype != 'bfloat16', name
  # Rounded once, then the same bits, in the next lock too.
  encoder = encoder_lib.load(f'{half.workdir}@lock_02')
  frozen = encoder.params['block_00']['mlp']['fc1']['kernel']
  name = 'params/encoder/block_00/mlp/fc1/kernel'
  before = locks.read(found[1], name)[name]
  np.testing.assert_array_equal(frozen, before.astype('bfloat16'))
  assert len({tuple(locks.sums(found[step])[name]) for step in (2, 3, 4)}) == 1
  clip = np.random.default_rng(0).integers(0, 255, encoder.video, np.uint8)
  assert np.isfinite(encoder(clip)).all()


def test_a_run_with_frozen_matrices_in_half_resumes(half, tmp_path):
  config = _cut(half, tmp_path, 3)
  assert loop.train(config) == 0
  want, got = locks.states(half.workdir)[4], locks.states(config.workdir)[4]
  assert locks.sums(want) == locks.sums(got)


def test_vjepa_with_locks_and_an_average_that_catches_up(clips, tmp_path):
  """The average of a frozen leaf comes to it by half with every step."""
  config = locks.tiny(clips, tmp_path / 'run', '((0, 2), (1, 4))')
  m = config.method
  config.checkpoint.every = 1
  m.base, m.masks, m.ema = 'vjepa', 'short:2/4', (0.5, 0.5)
  m.predictor.update(dict(width=16, depth=1, num_heads=2))
  assert loop.train(config) == 0
  found = locks.states(config.workdir)

  def apart(step, block):
    name = f'encoder/block_{block:02d}/mlp/fc1/kernel'
    params = locks.read(found[step], f'params/{name}')[f'params/{name}']
    ema = locks.read(found[step], f'ema/{name}')[f'ema/{name}']
    return float(np.abs(params - ema).max())

  for step in range(3, 7):
    np.testing.assert_allclose(
      apart(step, 0), apart(2, 0) / 2 ** (step - 2), rtol=1e-2
    )
    assert apart(step, 1) > 0
  bits = {step: locks.sums(found[step]) for step in found}
  frozen = locks.named(bits[2], *locks.LOCKED[1])
  for step in range(3, 7):
    assert {n for n in frozen if bits[step][n] != bits[2][n]} == set()
