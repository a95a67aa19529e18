"""An image model of another patch and grid as the teacher of a run."""

import jax
import numpy as np
import pytest

from vssl_jax import trees, weights
from vssl_jax.models import framewise, resizing, vit
from vssl_jax.train import phase_setup, phase_start
from vssl_jax.train import run as run_lib


@pytest.fixture
def folder(tmp_path):
  """Patches of 7 pixels on a learned grid of 3 x 3, for cells of 8."""
  image = vit.make(
    'Ti', width=12, depth=1, num_heads=2, mlp_width=16, patch=(1, 7, 7),
    positions='learned', class_token=True, dtype='float32',
    resize='bicubic_offset',
  )  # fmt: skip
  module = framewise.Framewise(image, every=2, cell=8)
  params = image.init(jax.random.key(0), np.zeros((1, 1, 21, 21, 3)))['params']
  weights.export(module, params, tmp_path / 'image', video=(4, 24, 24, 3))
  return tmp_path / 'image'


def test_its_positions_fit_the_clips_of_the_run(tiny, folder):
  tiny.method.phases = ('latent_student',)
  tiny.method.latent_student.teacher = str(folder)
  run = run_lib.open_run(tiny)
  try:
    with jax.set_mesh(run.mesh):
      (phase,) = run.phases
      teacher = phase.teachers['target']
      params = phase_start.teachers(run, phase)['target']
  finally:
    run.clips.close()
    run.logger.close()
  assert not trees.difference(
    params, phase_setup.teacher_shapes(teacher, run.video)
  )
  stored = weights.load_published(folder)[1]['positions']
  assert stored.shape == (1, 3, 3, 12)
  np.testing.assert_array_equal(
    params['positions'], resizing.resize(stored, (1, 2, 2), 'bicubic_offset')
  )
  tokens = jax.eval_shape(
    teacher, params, jax.ShapeDtypeStruct((1, 4, 16, 16, 3), np.uint8)
  )
  assert tokens.shape == (1, 8, 12)
