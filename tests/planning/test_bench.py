import dataclasses
import json
import os

import jax
import numpy as np
import pytest

from tests.train import small_runs
from vssl_jax import encoder, methods
from vssl_jax.data import batch as batch_lib
from vssl_jax.planning import bench, timing
from vssl_jax.train import train_step

ROOT = os.path.dirname(
  os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
)
VIDEO = (4, 16, 16, 3)


def _config(tmp_path):
  return small_runs.tiny_config('nowhere', tmp_path)


@pytest.fixture(scope='module')
def found(tmp_path_factory):
  """Both phases at one size, the first one at two."""
  config = _config(tmp_path_factory.mktemp('bench'))
  lines, results = [], []
  for phase, sizes in (('pixel_teacher', (16, 8)), ('latent_student', (8,))):
    result = bench.bench(
      config, phase=phase, steps=5, sizes=sizes, matrix=128, say=lines.append
    )
    results.append(result)
  return results, lines


def test_every_size_has_a_result_and_a_line(found):
  results, lines = found
  pairs = [(r['phase'], r['batch_size']) for r in _rows(results)]
  assert pairs == [
    ('pixel_teacher', 8),
    ('pixel_teacher', 16),
    ('latent_student', 8),
  ]
  assert len(lines) == 5  # and the limit of both
  for result in results:
    assert json.loads(json.dumps(result)) == result
    provenance = result['provenance']
    assert provenance['versions']['jax'] == jax.__version__
    assert provenance['config_hash'] and provenance['device']


def _rows(results):
  return [row for result in results for row in result['results']]


def test_figures_agree_with_each_other(found, tmp_path):
  results, _ = found
  config = _config(tmp_path)
  phases = methods.build(config.method, VIDEO, encoder.module_of)
  costs = {p.name: p.cost(VIDEO) for p in phases}
  for result in results:
    limit = result['limit']
    assert limit['flops_per_s'] == limit['matrix_product'] > 0  # a CPU
    assert 'matrix product of side 128' in limit['name']
    for r in result['results']:
      _check_row(r, costs[r['phase']], limit)


def _check_row(r, cost, limit):
  seconds = r['step_seconds']
  low, high = r['step_seconds_quartiles']
  assert 0 < low <= seconds <= high
  np.testing.assert_allclose(r['clips_per_s'], r['batch_size'] / seconds)
  assert r['flops_per_clip'] == cost.total
  np.testing.assert_allclose(
    r['utilisation'],
    cost.total * r['batch_size'] / seconds / limit['flops_per_s'],
  )
  assert r['compile_seconds'] > 0
  # The state of 16-wide networks: MiB, not GiB.
  assert r['peak_source'] == 'compiler' and 1e-5 < r['peak_gib'] < 1


def test_the_teacher_is_part_of_the_students_step_alone(found):
  results, _ = found
  for r in _rows(results):
    if r['phase'] == 'pixel_teacher':
      assert r['teacher_share_flops'] == r['teacher_share_seconds'] == 0
    else:
      assert 0 < r['teacher_share_flops'] < 1
      assert 0 < r['teacher_share_seconds'] < 1


def test_steps_are_timed_from_end_to_end(monkeypatch):
  """Warm-up is left out, and the state goes from step to step."""
  clock = iter(2.0 ** np.arange(100))
  monkeypatch.setattr(timing.time, 'perf_counter', lambda: next(clock))
  first = train_step.TrainState(0, {}, {}, {}, {}, {})

  def compiled(state, teachers, batch):
    return dataclasses.replace(state, step=state.step + 1), {}

  batch = batch_lib.Batch(video=None, index=None)
  prepared = timing.Prepared(compiled, first, {}, batch, 0.0)
  seconds, state = timing.step_seconds(prepared, 4)
  assert seconds == [4.0, 8.0, 16.0, 32.0]
  assert state.step == timing.WARM_UP + 4 + 1


@pytest.mark.slow
def test_an_average_of_the_student_can_be_the_teacher(tmp_path):
  config = _config(tmp_path)
  config.method.phases = ('latent_student',)
  config.method.latent_student.teacher = '@ema/encoder'
  result = bench.bench(config, steps=2, matrix=64, say=lambda _: None)
  (r,) = result['results']
  assert 0 < r['teacher_share_seconds'] < 1


def test_the_named_peak_is_the_limit_where_there_is_one(tmp_path):
  config = _config(tmp_path)
  config.log.peak_tflops = 3.0
  result = bench.bench(
    config, phase='pixel_teacher', steps=1, matrix=64, say=lambda _: None
  )
  devices = jax.device_count()
  assert result['limit']['flops_per_s'] == 3e12 * devices
  (r,) = result['results']
  ratio = r['of_matrix_product'] / r['utilisation']
  np.testing.assert_allclose(
    ratio, 3e12 * devices / result['limit']['matrix_product']
  )


def test_a_sweep_ends_where_memory_does(tmp_path, monkeypatch):
  prepare, tried = timing.prepare, []

  def allocate(config, span, size, video, mesh):
    tried.append((span.phase.name, size))
    if size > 8:
      raise jax.errors.JaxRuntimeError(
        f'RESOURCE_EXHAUSTED: Out of memory allocating {size} GiB\nand more'
      )
    return prepare(config, span, size, video, mesh)

  monkeypatch.setattr(timing, 'prepare', allocate)
  result = bench.bench(
    _config(tmp_path), steps=1, sizes=(24, 8, 16), matrix=64, say=lambda _: None
  )
  assert tried == [
    ('pixel_teacher', 8),
    ('pixel_teacher', 16),
    ('latent_student', 8),
    ('latent_student', 16),
  ]
  small, large = result['results'][:2]
  assert small['step_seconds'] > 0
  assert large['out_of_memory'] == (
    'RESOURCE_EXHAUSTED: Out of memory allocating 16 GiB'
  )
  assert 'batch 16: out of memory' in bench.text(large)


def test_other_failures_of_the_device_are_not_hidden(tmp_path, monkeypatch):
  def fail(*_):
    raise jax.errors.JaxRuntimeError('INTERNAL: broken')

  monkeypatch.setattr(bench, 'measure', fail)
  with pytest.raises(jax.errors.JaxRuntimeError, match='broken'):
    bench.bench(_config(tmp_path), steps=1, matrix=64, say=lambda _: None)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (dict(phase='student'), r"'student', wanted one of \['pixel_teacher'"),
    (dict(sizes=(8, 9)), r'batch sizes \[9\]: wanted multiples of 8'),
    (dict(sizes=(0,)), r'batch sizes \[0\]'),
    (dict(steps=0), '--steps: found 0'),
  ],
)
def test_wrong_arguments_say_what_is_wanted(tmp_path, arguments, message):
  with pytest.raises(ValueError, match=message):
    bench.bench(_config(tmp_path), **arguments)


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    ([], '--config'),
    (['--config=configs/salt.py', '--swep=8'], 'no such flag: --swep=8'),
    (['--config=configs/salt.py', '--sweep=8,x'], 'wanted sizes such as'),
  ],
)
def test_wrong_flags_are_errors(capsys, argv, message):
  with pytest.raises(SystemExit) as stopped:
    bench.parse(argv)
  assert stopped.value.code == 2
  assert message in capsys.readouterr().err


def test_a_wrong_key_names_the_nearest(capsys):
  page = os.path.join(ROOT, 'configs', 'salt.py')
  assert bench.run([f'--config={page}', '--config.batch_sise=8']) == 2
  assert 'did you mean --config.batch_size' in capsys.readouterr().err


def test_the_program_writes_what_was_found(tmp_path, monkeypatch):
  asked = {}

  def answer(config, **arguments):
    asked.update(arguments, seed=config.seed)
    return {'results': [1.5]}

  monkeypatch.setattr(bench, 'bench', answer)
  page = os.path.join(ROOT, 'configs', 'salt.py:B')
  out = tmp_path / 'results' / 'salt.json'
  flags = ['--phase=pixel_teacher', '--sweep=8,16', f'--out={out}']
  assert bench.run([f'--config={page}', '--config.seed=3', *flags]) == 0
  assert json.loads(out.read_text()) == {'results': [1.5]}
  assert asked == {
    'phase': 'pixel_teacher', 'steps': 30, 'sizes': (8, 16), 'seed': 3
  }  # fmt: skip
