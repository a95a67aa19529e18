"""KDHiera through the trainer: its own teachers, kept targets, pictures."""

import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from tests.train import locks
from vssl_jax import config as config_lib
from vssl_jax import encoder as encoder_lib
from vssl_jax import main, trees
from vssl_jax.data import options
from vssl_jax.train import phase_start
from vssl_jax.visualize import report

# Programs of three phases are compiled, twice.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
# Of each teacher, and of the distillation: more than an epoch of 5 steps.
OWN, STEPS = 3, 6
END = 2 * OWN + STEPS


def config_of(clips, workdir):
  c = config_lib.default('kdhiera')
  c.workdir, c.batch_size = str(workdir), 8
  c.data.source = str(clips)
  c.data.frames, c.data.stride, c.data.size = 4, 1, (32, 32)
  c.data.isolate, c.data.decode_processes = False, 1
  c.data.update(options.FIXED)
  m = c.method
  m.vit.update(dict(patch=(2, 8, 8), dtype='float32'))
  shape = dict(size='Ti', width=16, depth=4, num_heads=2, mlp_width=32)
  for name in ('image', 'video'):
    own = m[f'{name}_teacher']
    own.encoder.update(shape)
    own.decoder.update(dict(width=16, depth=1, num_heads=2))
    own.steps = OWN
    m[name].update(dict(teacher=f'@{name}_teacher', dtype='float32'))
    m[name].layers = (1, 2, 3, 4)
  m.video_teacher.masks = 'tube:0.75'
  m.encoder.update(dict(channels=16, depths=(1, 1, 1, 1), num_heads=1))
  m.hiera.update(dict(stride=(2, 2, 2), dtype='float32'))
  m.update(dict(scores='column_mean', mask_ratio=0.5, steps=STEPS))
  c.optim.update(dict(lr=1e-3, lr_batch=8, warmup=1))
  c.checkpoint.update(dict(every=100, keep=100))
  c.log.update(dict(every=1, tensorboard=False))
  c.health.update(dict(every=0.5, clips=16))
  return c


@pytest.fixture(scope='module')
def finished(clips, tmp_path_factory):
  """A whole run, and what taught in it before and after."""
  config = config_of(clips, tmp_path_factory.mktemp('kdhiera') / 'run')
  heard, real = {}, phase_start.teachers

  def teachers(run, phase):
    found = real(run, phase)
    heard[phase.name] = found, jax.tree.map(np.array, found)
    return found

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(phase_start, 'teachers', teachers)
    assert main._train(config) == 0
  return config, heard


def test_teachers_end_as_they_began_and_are_not_saved(finished):
  """Invariant 12."""
  config, heard = finished
  now, then = heard['distill']
  assert set(now) == {'image', 'video'}
  for leaf, before in zip(*map(jax.tree.leaves, (now, then)), strict=True):
    np.testing.assert_array_equal(np.array(leaf), before)
  saved = locks.states(config.workdir)
  for i, name in enumerate(('image', 'video')):
    start = 'params/encoder/'
    for leaf, x in trees.named_leaves(now[name]):
      want = locks.read(saved[OWN * (i + 1)], start + leaf)[start + leaf]
      np.testing.assert_array_equal(np.array(x), want)
  roles = {n.split('/')[1] for n in locks.sums(saved[END]) if 'par' in n}
  assert roles == {'encoder', 'heads_image', 'heads_video'}


def test_what_is_logged(finished):
  workdir = finished[0].workdir
  for teacher in ('image', 'video'):
    for i in (1, 2, 3, 4):
      found = locks.logged(workdir, f'loss/{teacher}/stage_{i}')
      assert sorted(found) == [*range(2 * OWN + 1, END + 1)]
      assert all(0 <= x <= 4 for x in found.values())
      angle = locks.logged(workdir, f'cosine/{teacher}/stage_{i}')
      for step, x in found.items():
        assert x == pytest.approx(2 - 2 * angle[step], abs=1e-4)
  kept = locks.logged(workdir, 'mask/attention_kept')
  assert all(0 < x < 1 for x in kept.values())
  assert locks.logged(workdir, 'mask/visible_units')[END] == 4
  assert 0 < locks.logged(workdir, 'teacher_share')[END] < 1
  assert locks.logged(workdir, 'health/rankme')


def test_pictures_of_the_masks(finished):
  """Saved by the run, and in its report."""
  folder = finished[0].workdir
  saved = np.asarray(Image.open(f'{folder}/distill-mask-all.png'))
  assert saved.std() > 5
  page = report.write(folder, clips=2).read_text()
  for name in ('distill-mask-all.png', 'distill-features.png',
               'video_teacher-mask-tube.png'):  # fmt: skip
    assert f'<img src="{name}"' in page
  assert 'By score' in page and 'No masks' not in page


def test_the_encoder_is_loaded_by_the_name_of_its_run(finished):
  encoder = encoder_lib.load(finished[0].workdir)
  tokens = encoder(np.zeros((2, 4, 32, 32, 3), np.uint8))
  assert tokens.shape == (2, 2 * 4 * 4, 128) and encoder.grid == (2, 4, 4)


def test_targets_are_kept_with_the_scores(finished, tmp_path):
  """A run that reads them ends where the one that asks its teachers does."""
  config = finished[0].copy_and_resolve_references()
  config.workdir = str(tmp_path / 'run')
  config.cache_targets = str(tmp_path / 'targets')
  assert main._train(config) == 0
  (folder,) = (tmp_path / 'targets').iterdir()
  assert folder.name.startswith('image_video-')
  ends = [locks.states(c.workdir)[END] for c in (finished[0], config)]
  for name in locks.sums(ends[0]):
    if name.startswith('params/'):
      a, b = (locks.read(x, name)[name] for x in ends)
      np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4, err_msg=name)


def test_the_student_outlives_its_teachers(finished, tmp_path):
  """A run whose outside teachers are gone is still loaded."""
  config = finished[0].copy_and_resolve_references()
  teachers = tmp_path / 'teachers'
  shutil.copytree(config.workdir, teachers)
  config.workdir, config.method.steps = str(tmp_path / 'run'), 1
  config.optim.warmup = 0
  for name in ('image', 'video'):
    config.method[name].teacher = f'{teachers}@{name}_teacher'
  assert main._train(config) == 0
  shutil.rmtree(teachers)
  tokens = encoder_lib.load(config.workdir)(np.zeros((4, 32, 32, 3), np.uint8))
  assert tokens.shape == (1, 2 * 4 * 4, 128)
