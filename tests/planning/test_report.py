"""`--plan` against what a real state and a real step hold."""

import dataclasses
import importlib.util
import pathlib
import re

import jax
import numpy as np
import pytest

from tests.train import small_runs, toy
from vssl_jax import config as config_lib
from vssl_jax import encoder as encoder_lib
from vssl_jax import main, methods, sharding, trees
from vssl_jax.methods import phase as phase_lib
from vssl_jax.planning import memory, report
from vssl_jax.train import phase_setup
from vssl_jax.train import run as run_lib
from vssl_jax.utils import metrics

VIDEO = (4, 16, 16, 3)


def _config(tmp_path, **encoder):
  config = small_runs.tiny_config('nowhere', tmp_path)
  for phase in ('pixel_teacher', 'latent_student'):
    config.method[phase].encoder.update(encoder)
  return config


def _outlines(config):
  phases = methods.build(config.method, VIDEO, encoder_lib.module_of)
  return [
    phase_setup.build(config, span, VIDEO) for span in run_lib.spans(phases)
  ]


def _wide(tmp_path):
  """Matrices large enough to be split over devices."""
  return _config(tmp_path, width=128, mlp_width=256)


def _by_rule(text):
  return [
    float(x) for x in re.findall(r'rule 6ND \+ 2ND .*: (\S+) FLOPs', text)
  ]


def test_the_papers_rule_stands_beside_the_true_count(tmp_path):
  """Of each phase's step and of the run: parameters times tokens."""
  config = _config(tmp_path)
  setups = _outlines(config)
  pixel, latent = (
    {role: trees.count(x) for role, x in o.state.params.items()} for o in setups
  )
  # 2 tokens are visible and 4 hidden; the teacher sees all 8.
  first = 6 * (2 * pixel['encoder'] + 6 * pixel['decoder'])
  second = 6 * (2 * latent['encoder'] + 6 * latent['predictor'])
  second += 2 * 8 * pixel['encoder']
  wanted = [8 * first, 8 * second, 8 * 6 * (first + second)]
  found = _by_rule(report.describe(config))
  np.testing.assert_allclose(found, wanted, rtol=5e-3)


@pytest.mark.slow
def test_the_papers_rule_gives_its_figure_for_salt():
  """1.2e21 for ViT-L, 80k + 160k steps: SALT, arXiv 2509.24317."""
  _, config = config_lib.load('configs/salt.py:L')
  assert _by_rule(report.describe(config))[-1] == pytest.approx(
    1.2e21, rel=0.02
  )


def test_exact_bytes_are_those_of_real_arrays(tmp_path):
  config = _wide(tmp_path)
  setups = _outlines(config)
  mesh = sharding.make_mesh()
  at = sharding.shardings(setups[1].state, mesh)
  state = jax.tree.map(
    lambda x, s: jax.device_put(np.zeros(x.shape, x.dtype), s),
    dict(params=setups[1].state.params, opt=setups[1].state.opt),
    dict(params=at.params, opt=at.opt),
  )

  def held(tree):  # by one device
    return sum(
      x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree)
    )

  found = memory.per_device(config, setups[1], VIDEO, 1, mesh.size)
  assert found['parameters'] == held(state['params'])
  assert found['optimizer'] == held(state['opt'])
  # One batch is worked on while the next one arrives.
  local = config.batch_size // mesh.size
  assert found['batch'] == 2 * np.zeros((local, *VIDEO), np.uint8).nbytes
  assert found['parameters'] < trees.nbytes(state['params'])  # some are split


SPECS = {
  'image': phase_lib.MemorySpec((1568,), window=7500),
  'video': phase_lib.MemorySpec((1568,), window=7500),
}


def test_rows_are_counted_to_the_byte(tmp_path, monkeypatch):
  """K400's 240,000 clips: 6.0 GB, 3.0 in half; and as real arrays hold them."""
  half = {k: dataclasses.replace(s, dtype='float16') for k, s in SPECS.items()}
  one = {'one': phase_lib.MemorySpec((), 'float16')}
  phases = [
    toy.phase(name=name, memory_specs=specs)
    for name, specs in (('a', SPECS), ('b', half), ('c', one), ('d', {}))
  ]
  monkeypatch.setattr(methods, 'build', lambda *_: tuple(phases))
  config = _config(tmp_path)
  config.optim.warmup, config.data.examples = 1, 240_000
  text = report.describe(config)
  assert 'nowhere is not available, 240,000 videos by data.examples' in text
  lines = [
    line for line in text.splitlines() if line.startswith('  example memory')
  ]
  room = 235 * 1024
  twice = '1568 float32 twice (windows of 7500 steps)'
  for line, kept, each in zip(
    lines,
    (f'image {twice}, video {twice}', 'image 1568 float16', 'one 1 float16'),
    (4 * 1568 * 4, 4 * 1568 * 2, 2),
    strict=True,
  ):
    assert line.startswith(f'  example memory: {kept}')
    assert line.endswith(
      f': {each:,} bytes per example; for 240,000 examples (room for 240,640) '
      f'{each * room:,} bytes, {each * room // 8:,} per device of 8'
    )
  assert '6,037,176,320 bytes' in lines[0] and '3,018,588,160' in lines[1]
  config.data.examples = 0
  (first, *_) = re.findall('  example memory: .*', report.describe(config))
  assert first.endswith('--config.data.examples sets how many to count')


@pytest.mark.parametrize(('data', 'fsdp'), [(1, 8), (2, 4)])
def test_a_device_holds_its_share_of_the_rows(tmp_path, data, fsdp):
  config = _config(tmp_path)
  specs = {'image': phase_lib.MemorySpec((6,), 'float16', window=2)}
  (span,) = run_lib.spans([toy.phase(memory_specs=specs)])
  config.optim.warmup = 1
  shapes = phase_setup.build(config, span, VIDEO, 1500)
  needs = memory.per_device(config, shapes, VIDEO, data, fsdp)
  at = sharding.shardings(shapes.state, sharding.make_mesh(data, fsdp))
  state = jax.jit(shapes.fresh, out_shardings=at)()
  held = [x.addressable_shards[0].data for x in state.example_memory.values()]
  assert (
    needs['example_memory']
    == sum(x.nbytes for x in held)
    == 2 * 2048 * 6 * 2 / 8
  )


def test_frozen_leaves_have_no_gradient_and_their_own_type(tmp_path):
  config = _config(tmp_path)
  shapes, _ = _outlines(config)
  whole = memory.per_device(config, shapes, VIDEO, 1, 1)
  frozen = 'encoder/block_00'
  fields = dict(frozen=(frozen,), frozen_dtype='bfloat16')
  phase = dataclasses.replace(shapes.span.phase, **fields)
  span = dataclasses.replace(shapes.span, phase=phase)
  shapes = phase_setup.build(config, span, VIDEO)
  locked = memory.per_device(config, shapes, VIDEO, 1, 1)
  block = trees.subtree(shapes.state.params, frozen)
  scalars = trees.count(block)
  matrices = sum(x.size for x in jax.tree.leaves(block) if x.ndim > 1)
  assert scalars > matrices > 0
  lost = {k: whole[k] - locked[k] for k in memory.EXACT}
  assert lost == {
    'parameters': 2 * matrices,
    'gradients': 4 * scalars,
    'optimizer': 8 * scalars,
  }


def test_overrides_of_the_mesh_count(tmp_path):
  config = _wide(tmp_path)
  shapes, _ = _outlines(config)
  before = memory.per_device(config, shapes, VIDEO, 1, 8)
  config.mesh.overrides = (('params/.*', ()),)
  after = memory.per_device(config, shapes, VIDEO, 1, 8)
  assert after['parameters'] == trees.nbytes(shapes.state.params)
  assert after['optimizer'] == before['optimizer']


def test_a_device_fits_what_it_holds_and_no_more(tmp_path, monkeypatch):
  config = _config(tmp_path)
  config.batch_size = 512
  setups = _outlines(config)
  need = memory.per_device(config, setups[0], VIDEO, 1, 8)
  total = sum(need.values())
  half = total - need['activations'] / 2
  devices = {'just': total, 'less': total - 1, 'half': half, 'none': 1.0}
  monkeypatch.setattr(memory, 'DEVICES', devices)
  monkeypatch.setattr(memory, 'MESHES', (8, 1024))
  row, advice, never = memory.fits(config, setups[:1], VIDEO)[3:]
  assert re.findall('yes|no', row) == ['yes', 'no', 'no', 'no']
  assert 'less with 2, half with 2, none with none' in advice
  assert never.startswith('1024: batch 512 does not divide')


def test_the_mesh_is_chosen_that_splits_the_widths(tmp_path):
  config = _config(tmp_path, width=384, num_heads=2, mlp_width=1408)
  config.batch_size = 1024
  setups = _outlines(config)
  table = memory.fits(config, setups, VIDEO)
  # 384 = 3 x 128 and 1408 = 11 x 128.
  found = [line.split()[2] for line in table[3:]]
  assert found == [n for n in ('1', '8', '64', '128') for _ in setups]


def test_a_long_run_is_told_by_its_ends(tmp_path, monkeypatch):
  phases = [toy.phase(name=f'lock_{i}', steps=10 + i // 4) for i in range(6)]
  monkeypatch.setattr(methods, 'build', lambda *_: tuple(phases))
  config = _config(tmp_path)
  config.optim.warmup = 1
  short = report.describe(config)
  assert re.findall(r'^phase (\w+)', short, re.MULTILINE) == [
    'lock_0',
    'lock_5',
  ]
  assert '\n4 phases lock_1 to lock_4: steps 10 to 51, 10-11 each' in short
  long = report.describe(config, 'phases')
  names = re.findall(r'^phase (\w+): steps (\d+)', long, re.MULTILINE)
  assert names == [(f'lock_{i}', str(10 * i + i // 5)) for i in range(6)]


@pytest.mark.slow
def test_a_compiler_speaks_of_its_own_machine_only(tmp_path):
  config = _config(tmp_path)
  config.method.phases = ('pixel_teacher',)
  lines = report.describe(config, 'compile').splitlines()
  spoken = [line for line in lines if line.startswith('compiled')]
  assert len(spoken) == 1
  assert f'for {jax.device_count()} x cpu' in spoken[0]
  assert spoken[0].endswith('(of this machine, not of another)')
  arguments = float(re.search(r'arguments ([\d.]+)', spoken[0])[1])
  assert 'GiB per device' in spoken[0] and arguments < 0.01


@pytest.mark.slow
def test_a_step_compiles_for_tpus_that_are_not_there(tmp_path, tpu_compiler):
  config = _config(tmp_path)
  config.method.phases = ('pixel_teacher',)
  spoken = report.describe(config, tpu_compiler).splitlines()[-1]
  assert spoken.startswith('compiled pixel_teacher for 8 x TPU v5 in ')
  assert spoken.endswith('(by its own compiler)')
  assert re.search(r'temporary \d+\.\d\d, total 0\.\d\d;', spoken)


@pytest.mark.parametrize(
  ('detail', 'message'),
  [
    (
      'shape',
      r"found 'shape', wanted one of \('shapes', 'phases', 'compile'\)",
    ),
    ('tpu:v5p', "found the slice 'v5p', wanted a kind and a shape"),
  ],
)
def test_unknown_details_say_what_there_is(tmp_path, detail, message):
  with pytest.raises(ValueError, match=message):
    report.describe(_config(tmp_path), detail)


def test_a_missing_tpu_compiler_says_how_to_get_it(tmp_path, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match=r"pip install 'jax\[tpu\]'"):
    report.describe(_config(tmp_path), 'tpu:v5p:2x2x2')


@pytest.mark.parametrize(
  ('kind', 'tflops'),
  [('TPU v5', 459), ('TPU v5 lite', 197), ('TPU v6 lite', 918), ('cpu', 0)],
)
def test_peaks_go_by_the_names_that_jax_gives(kind, tflops):
  assert metrics.peak_flops(kind=kind) == tflops * 1e12


@pytest.mark.slow
def test_the_table_of_what_the_largest_page_fits_on(capsys):
  """Rows of launch/README.md are those of its `--plan`."""
  root = pathlib.Path(__file__).parents[2]
  page = root / 'configs/layerlock_4b.py'
  assert main.main([f'--config={page}', '--plan']) == 0
  planned = {}
  for line in capsys.readouterr().out.splitlines():
    found = re.match(r'\s+1 x (\d+)\s+(\w+)((?:\s+[\d.]+){6})(.*)', line)
    if found:
      devices, phase, numbers, fits = found.groups()
      numbers = [float(x) for x in numbers.split()]
      answers = [word == 'yes' for word in re.findall('yes|no', fits)]
      planned[devices, phase] = [*numbers[:3], numbers[-1]], answers[1:]
  rows = re.findall(
    r'^\| (\d+) \| (pixels|lock_37) \| (.*) \|$',
    (root / 'launch/README.md').read_text(),
    re.MULTILINE,
  )
  assert len(rows) == 4
  for devices, phase, rest in rows:
    exact, total, *fits = rest.split(' | ')
    numbers, answers = planned[devices, phase]
    assert [float(x) for x in exact.split(' + ')] == numbers[:3]
    assert float(total) == pytest.approx(numbers[3], abs=0.06)
    assert [x == 'yes' for x in fits] == answers
