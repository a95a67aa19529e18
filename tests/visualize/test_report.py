import re
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.train import small_runs
from vssl_jax import losses
from vssl_jax.data.tools import synthetic
from vssl_jax.masks import sampling, tubelets
from vssl_jax.train import loop
from vssl_jax.utils import image_grid
from vssl_jax.visualize import __main__ as program
from vssl_jax.visualize import html, mask_pictures, report, run_reader


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A run with both phases of SALT."""
  folder = tmp_path_factory.mktemp('show')
  synthetic.write(folder / 'clips', clips=16, size=32, frames=8)
  config = small_runs.tiny_config(folder / 'clips' / 'train', folder / 'run')
  config.method.pixel_teacher.steps = 2
  config.method.latent_student.steps = 2
  config.health.update(dict(every=0.25, clips=8))
  assert loop.train(config) == 0
  return folder / 'run'


def _text(path):
  return re.sub(r'\s+', ' ', path.read_text())


@pytest.mark.slow
def test_the_page_refers_to_files_that_exist(finished):
  path = report.write(finished, clips=2)
  text = _text(path)
  assert path == finished / 'report' / 'index.html'
  files = re.findall(r'<img src="([^"]+)"', text)
  assert sorted(files) == sorted(p.name for p in path.parent.glob('*.png'))
  assert set(files) == {
    'curves.png',
    'drift.png',
    'pixel_teacher-mask-short.png',
    'pixel_teacher-reconstruction-short.png',
    'pixel_teacher-features.png',
    'latent_student-mask-short.png',
    'latent_student-features.png',
    'latent_student-polyak-features.png',
  }
  for file in files:
    assert np.asarray(Image.open(path.parent / file)).std() > 5, file
  assert 'http' not in text and '<script' not in text  # self-contained
  assert '4 of 4' in text
  assert f'Its average polyak: {finished}@latent_student/polyak.' in text
  # The default target is normalised, which is said where it is shown.
  assert report.TRUTH_USED.split("'")[0] in text


@pytest.mark.slow
def test_what_is_shown_is_what_the_loss_measures(finished):
  shown = run_reader.open_run(finished, 2)
  phase, student = shown.phases
  params, rng = run_reader.params(finished, phase), run_reader.rng(shown)
  found = phase.reconstruct(params, shown.batch, rng)
  targets = losses.pixel_targets(
    tubelets.to_unit(shown.batch.video),
    phase.encoder.patch,
    found['short'].kind,
  )
  mask, predicted = found['short'].mask, found['short'].predicted
  wanted, _ = phase.loss(params, {}, shown.batch, rng)
  np.testing.assert_allclose(
    losses.mse(predicted, sampling.gather(targets, mask.masked)),
    wanted,
    rtol=1e-5,
  )
  assert not student.reconstruct(params, shown.batch, rng)


@pytest.mark.slow
def test_a_phase_without_a_checkpoint_says_so(finished, tmp_path):
  copy = tmp_path / 'run'
  shutil.copytree(finished, copy)
  for folder in (copy / 'params', copy / 'checkpoints'):
    for found in folder.glob('*'):
      if found.is_file():
        found.unlink()
      else:
        shutil.rmtree(found)
  text = _text(report.write(copy, [finished], clips=1))
  assert text.count('No checkpoint: not started, or not one of') == 2
  assert 'latent_student-mask-short.png' in text


def test_a_folder_that_is_no_run_is_an_error(tmp_path, capsys):
  assert program.run([str(tmp_path)]) == 2
  assert 'found no run.json, wanted the folder of a run' in (
    capsys.readouterr().err
  )


def test_masks_that_cannot_be_drawn_end_nothing(tmp_path, capsys):
  mask_pictures.save_in(str(tmp_path))
  told = capsys.readouterr().err
  assert f'{tmp_path}: its masks could not be drawn' in told


@pytest.mark.slow
def test_masks_that_ask_no_teacher_are_in_the_report_alone(finished, capsys):
  mask_pictures.save_in(str(finished))
  assert not capsys.readouterr().err and not [*finished.glob('*mask*.png')]


def test_the_page_escapes_what_it_is_given():
  text = html.render(
    '<a>',
    {'k&': '"<b>'},
    [html.Section('<c>', [html.Picture('p.png', '<d>')], '<e>')],
  )
  for letter in 'abcde':
    assert f'<{letter}>' not in text
    assert f'&lt;{letter}&gt;' in text


def test_a_sheet_keeps_the_pixels_of_its_frames():
  rng = np.random.default_rng(0)
  frames = list(rng.integers(0, 256, (3, 32, 40, 3), dtype=np.uint8))
  drawn = np.asarray(image_grid.draw({'row': frames}, 'caption'))
  for i, frame in enumerate(frames):
    left = image_grid.LABEL_WIDTH + i * (120 + image_grid.GAP)
    found = drawn[image_grid.GAP : image_grid.GAP + 96, left : left + 120]
    np.testing.assert_array_equal(found[::3, ::3], frame)
    np.testing.assert_array_equal(found[2::3, 2::3], frame)


def test_long_clips_are_thinned_evenly():
  clip = np.zeros((16, 8, 8, 3), np.uint8)
  clip[:] = np.arange(16, dtype=np.uint8)[:, None, None, None]
  kept = image_grid.some(clip)[:, 0, 0, 0]
  assert kept.tolist() == [0, 2, 4, 6, 9, 11, 13, 15]
