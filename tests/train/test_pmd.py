"""PMD through the trainer: teachers of the run, memory of clips, resuming."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train import locks
from vssl_jax import config as config_lib
from vssl_jax import trees
from vssl_jax.methods import masked_pixels, pmd
from vssl_jax.train import loop, phase_start

# Programs of six phases are compiled.
pytestmark = pytest.mark.slow
CLIPS, BATCH, WINDOW = 40, 8, 3
# An epoch of teachers, then phases of a little more than one.
OWN, STEPS = 5, 6
TEACHERS = ['image_teacher', 'video_teacher']
STUDENTS = ['mask_75', 'mask_80', 'mask_85', 'mask_90']


def _config(clips, workdir):
  c = config_lib.default('pmd')
  c.workdir, c.batch_size = str(workdir), BATCH
  c.data.source = str(clips)
  c.data.frames, c.data.stride, c.data.size = 4, 1, (16, 16)
  c.data.isolate, c.data.decode_processes = False, 1
  m = c.method
  m.vit.update(dict(patch=(2, 4, 4), dtype='float32'))
  shape = dict(size='Ti', width=16, depth=3, num_heads=2, mlp_width=32)
  head = dict(width=16, depth=1, num_heads=2)
  m.encoder.update(shape)
  m.decoder.update(head)
  for section in (m.image_teacher, m.video_teacher):
    section.encoder.update(shape)
    section.decoder.update(head)
    section.steps = OWN
  m.image.teacher, m.video.teacher = '@image_teacher', '@video_teacher'
  m.steps = (STEPS,) * 4
  m.window, m.tau, m.drop_path = WINDOW, 0.05, 0.1
  c.optim.update(dict(lr=1e-2, lr_batch=8, warmup=2))
  c.checkpoint.update(dict(every=2, keep=100))
  c.log.update(dict(every=1, tensorboard=False))
  c.health.every = 0.0
  return c


class Finished:
  """A whole run, what taught in it, and what was traced."""

  def __init__(self, config):
    self.config, self.heard, self.traced = config, {}, []
    real = phase_start.teachers

    def teachers(run, phase):
      found = real(run, phase)
      self.heard[phase.name] = found, jax.tree.map(np.array, found)
      return found

    def watched(loss):
      def traced(phase, params, teachers, batch, rng):
        self.traced.append(phase.name)
        return loss(phase, params, teachers, batch, rng)

      return traced

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(phase_start, 'teachers', teachers)
      for kind in (masked_pixels.PixelPhase, pmd.DistilPhase):
        patch.setattr(kind, 'loss', watched(kind.loss))
      assert loop.train(config) == 0


def _start(number):
  """Returns the step that a phase of the student starts after."""
  return OWN * len(TEACHERS) + STEPS * number


END = _start(len(STUDENTS))


@pytest.fixture(scope='module')
def finished(clips, tmp_path_factory):
  return Finished(_config(clips, tmp_path_factory.mktemp('pmd') / 'run'))


def _rows(finished, step, end=''):
  found = locks.read(
    locks.states(finished.config.workdir)[step], 'example_memory/'
  )
  return found[f'example_memory/video{end}']


def test_every_phase_is_traced_once(finished):
  """Invariant 15."""
  assert finished.traced == [*TEACHERS, *STUDENTS]


def test_teachers_end_as_they_began(finished):
  """Invariant 12: after a phase of steps they have every bit."""
  assert not any(finished.heard[name][0] for name in TEACHERS)
  for i, name in enumerate(STUDENTS):
    now, then = finished.heard[name]
    assert set(now) == {'image', 'video'} | ({'previous'} if i else set())
    for leaf, before in zip(*map(jax.tree.leaves, (now, then)), strict=True):
      assert leaf.dtype == 'bfloat16'
      np.testing.assert_array_equal(np.array(leaf), before)


def test_the_guide_is_the_student_that_ended_the_phase_before(finished):
  """Invariant 12: the boundary checkpoint in bfloat16, bit for bit."""
  states = locks.states(finished.config.workdir)
  for i, name in enumerate(STUDENTS):
    if not i:
      continue
    guide = dict(trees.named_leaves(finished.heard[name][1]['previous']))
    saved = locks.read(states[_start(i)], 'params/')
    saved = {k.removeprefix('params/'): x for k, x in saved.items()}
    wanted = {k for k in saved if not k.startswith('align_')}
    assert guide.keys() == wanted and wanted != saved.keys()
    for leaf, x in guide.items():
      np.testing.assert_array_equal(
        x, np.array(jnp.asarray(saved[leaf]).astype('bfloat16'))
      )


def test_teachers_of_the_run_are_its_first_phases(finished):
  for name in TEACHERS:
    end = OWN * (1 + TEACHERS.index(name))
    saved = locks.states(finished.config.workdir)[end]
    start = 'params/encoder/'
    for phase in STUDENTS:
      told = finished.heard[phase][1][name.removesuffix('_teacher')]
      for leaf, x in trees.named_leaves(told):
        want = locks.read(saved, start + leaf)[start + leaf]
        np.testing.assert_array_equal(
          x, np.array(jnp.asarray(want).astype('bfloat16'))
        )


def _phase_states(finished, number):
  """Returns {steps into the phase: step} of the states that are kept."""
  start = _start(number)
  found = locks.states(finished.config.workdir)
  return {s - start: s for s in found if start < s <= start + STEPS}


def test_memory_of_clips_that_were_not_seen_keeps_every_bit(finished):
  """Invariant 9: a first epoch, in which no clip comes twice."""
  seen_by = {}
  for done, step in sorted(_phase_states(finished, 0).items()):
    rows = np.asarray(_rows(finished, step))
    assert rows.shape == (1024, 32)
    seen = set(np.flatnonzero(rows.any(1)).tolist())
    assert len(seen) == min(BATCH * done, CLIPS) and max(seen) < CLIPS
    for earlier in seen_by.values() if done <= 5 else ():
      some = sorted(np.flatnonzero(earlier.any(1)))
      np.testing.assert_array_equal(rows[some], earlier[some])
    seen_by[done] = rows
  assert len(seen_by) > 2
  # Each phase starts with an empty memory.
  done, step = min(_phase_states(finished, 1).items())
  rows = np.asarray(_rows(finished, step))
  assert rows.any(1).sum() == BATCH * done < CLIPS


def test_the_window_is_the_memory_as_it_stood_at_window_ends(finished):
  """Invariant 11."""
  for number in range(len(STUDENTS)):
    ends = 0
    for done, step in sorted(_phase_states(finished, number).items()):
      window = np.asarray(_rows(finished, step, '@window'))
      if done < WINDOW:
        assert not window.any()
      elif done % WINDOW == 0:
        kept = np.asarray(_rows(finished, step))
        np.testing.assert_array_equal(window, kept)
        ends += 1
      else:
        assert not np.array_equal(window, _rows(finished, step))
    assert ends


def test_what_is_logged(finished):
  workdir, second = finished.config.workdir, _start(1)
  guided = locks.logged(workdir, 'loss/progressive')
  assert sorted(guided) == list(range(second + 1, END + 1))
  filled = locks.logged(workdir, 'example_memory/filled/video')
  even = locks.logged(workdir, 'dare/entropy/video')
  start = _start(0)
  for done in range(1, STEPS + 1):
    assert filled[start + done] == (done > CLIPS // BATCH)
    # Weights are uniform until a window ends with the clip in it.
    if done <= WINDOW:
      assert even[start + done] == pytest.approx(1, abs=1e-5)
  assert even[start + STEPS] < 1 - 1e-5
  for name in ('base', 'difficulty', 'alignment'):
    found = locks.logged(workdir, f'loss/{name}/video')
    assert sorted(found) == list(range(start + 1, END + 1))
    assert np.isfinite([*found.values()]).all()


def test_a_run_resumes_in_the_middle_of_a_window(finished, tmp_path):
  """Invariant 10: parameters, moments and both tables, bit for bit."""
  config = finished.config.copy_and_resolve_references()
  shutil.copytree(config.workdir, tmp_path / 'run')
  config.workdir = str(tmp_path / 'run')
  inside = _phase_states(finished, len(STUDENTS) - 1)
  # Past a first window: the copies hold something that could be lost.
  step = min(s for done, s in inside.items() if done > WINDOW and done % WINDOW)
  locks.truncate(config.workdir, step)
  assert loop.train(config) == 0
  want = locks.sums(locks.states(finished.config.workdir)[END])
  got = locks.sums(locks.states(config.workdir)[END])
  assert any(n.startswith('example_memory/') for n in want)
  assert {n for n in want | got if want.get(n) != got.get(n)} == set()
