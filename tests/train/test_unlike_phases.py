"""Phases whose encoders differ in width and depth, from the log to the picture.

Both phases are real ones of SALT, with a small teacher and a larger student.
"""

import json
import os
import pathlib
import signal

import pytest

from vssl_jax import main
from vssl_jax.train import loop


@pytest.fixture
def unlike(tiny):
  tiny.method.pixel_teacher.encoder.update(dict(width=16, depth=2))
  tiny.method.latent_student.encoder.update(dict(width=24, depth=3))
  tiny.health.update(dict(every=2.0, clips=16))
  return tiny


def _looks(workdir):
  """Step -> names of the blocks that were followed up to it."""
  text = (pathlib.Path(workdir) / 'metrics.jsonl').read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  return {
    x['step']: [n[-2:] for n in x if n.startswith('drift/block_')]
    for x in lines
    if 'health/rankme' in x
  }


@pytest.mark.slow
def test_the_panel_follows_each_encoder_and_both_are_drawn(unlike):
  assert main.JOBS['train'](unlike) == 0
  teacher, student = ['00', '01'], ['00', '01', '02']
  # Nothing is said of the way from the one encoder to the other.
  assert _looks(unlike.workdir) == {
    **{1: [], 2: teacher, 4: teacher, 6: teacher},
    **{7: [], 8: student, 10: student, 12: student},
  }
  assert (pathlib.Path(unlike.workdir) / 'drift.png').stat().st_size > 5000


class _Stop:
  """Sends a SIGTERM after a step, as a scheduler does."""

  def due(self, done, span_start):
    return done == 5

  def look(self, run, span, state, done):
    os.kill(os.getpid(), signal.SIGTERM)
    return []


@pytest.mark.slow
def test_a_stopped_run_spends_no_time_on_pictures(unlike):
  unlike.method.phases = ('pixel_teacher',)
  status = main.JOBS['train'](unlike, hooks=[_Stop()])
  assert status == loop.PREEMPTED
  assert any(_looks(unlike.workdir).values())  # there was something to draw
  assert not (pathlib.Path(unlike.workdir) / 'drift.png').exists()
