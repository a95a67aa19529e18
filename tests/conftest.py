"""What all tests share: fake devices, checked shapes, strict arrays, skips."""

import functools
import os
import pathlib
import signal
import subprocess
import tempfile
from importlib.util import find_spec

import jax
import jaxtyping
import pytest

# Before the package is imported: its annotations are checked in every test.
jaxtyping.install_import_hook('vssl_jax', 'beartype.beartype')

# A shell starts what it puts in the background with Ctrl-C ignored, and the
# programs that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Most of a test is compiling what runs once. Without most optimizations a train
# step compiles seven times as fast. Programs that tests start inherit this.
# Tests that compute more than they compile have the marker `optimized`.
_LEAST_FLAGS = (
  ' --xla_cpu_use_fusion_emitters=false'
  ' --xla_cpu_parallel_codegen_split_count=1'
)
# On a busy machine one of eight devices may be late for a collective; by
# default XLA aborts the process after 40 s.
_PATIENCE = (
  ' --xla_cpu_collective_call_warn_stuck_timeout_seconds=120'
  ' --xla_cpu_collective_call_terminate_timeout_seconds=600'
)
_FLAGS = os.environ.get('XLA_FLAGS', '')
if _PATIENCE not in _FLAGS:  # else a worker, which has those of its parent
  _FLAGS += _PATIENCE
OPTIMIZED = {
  'JAX_DISABLE_MOST_OPTIMIZATIONS': '0',
  'XLA_FLAGS': _FLAGS.replace(_LEAST_FLAGS, ''),
}
LEAST_OPTIMIZED = {
  'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
  'XLA_FLAGS': OPTIMIZED['XLA_FLAGS'] + _LEAST_FLAGS,
}
os.environ.update(LEAST_OPTIMIZED)
jax.config.update('jax_platforms', os.environ['JAX_PLATFORMS'])
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')

# Compiled programs are shared by the tests of one session, by its workers and
# by the programs that they start, but never with an earlier session. Workers
# have the folder from the process that started them, which removes it.
if 'PYTEST_XDIST_WORKER' in os.environ:
  _CACHE = os.environ['JAX_COMPILATION_CACHE_DIR']
else:
  _OWNER = tempfile.TemporaryDirectory(prefix='vssl_jax_tests_')
  _CACHE = _OWNER.name
for key, value in {
  'jax_compilation_cache_dir': _CACHE,
  'jax_persistent_cache_min_compile_time_secs': 0.3,
  'jax_persistent_cache_min_entry_size_bytes': -1,
}.items():
  os.environ[key.upper()] = str(value)
  jax.config.update(key, value)

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Programs that tests start in other folders find the package of this clone.
os.environ['PYTHONPATH'] = os.pathsep.join(
  [str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
)
VIDEO_DATA = 'VSSL_TEST_DATA'


@pytest.fixture(scope='session')
def video_data() -> pathlib.Path:
  """Real videos that the user offers; tests without them are not run."""
  return pathlib.Path(os.environ[VIDEO_DATA])


@pytest.fixture(scope='session')
def tpu_compiler() -> str:
  """A slice that libtpu compiles for; it needs no TPU. Else left out."""
  return 'tpu:v5p:2x2x2'


def pytest_addoption(parser):
  parser.addoption('--slow', action='store_true', help='run slow tests too')
  parser.addoption(
    '--no-skips', action='store_true', help='a test that skips itself fails'
  )


@functools.cache
def _slurm_answers():
  try:
    result = subprocess.run(
      ['sinfo', '-h'], check=False, capture_output=True, timeout=30
    )
  except (FileNotFoundError, subprocess.TimeoutExpired):
    return False
  return result.returncode == 0


def _slow(config):
  return config.option.slow or 'slow' in config.option.markexpr


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
  """Sets what programs are compiled for: to be made soon, or to run fast."""
  optimized = item.get_closest_marker('optimized') is not None
  jax.config.update('jax_disable_most_optimizations', not optimized)
  os.environ.update(OPTIMIZED if optimized else LEAST_OPTIMIZED)


def pytest_collection_modifyitems(config, items):
  left_out = {}
  for item in items:
    if item.get_closest_marker('slow') and not _slow(config):
      left_out[item] = 'slow: run with --slow, or alone with -m slow'
    elif 'video_data' in item.fixturenames and VIDEO_DATA not in os.environ:
      left_out[item] = f'real videos: set {VIDEO_DATA} to their folder'
    elif 'tpu_compiler' in item.fixturenames and not find_spec('libtpu'):
      left_out[item] = 'a compiler for TPUs: pip install jax[tpu]'
    elif 'slurm' in item.fixturenames and not _slurm_answers():
      left_out[item] = 'SLURM: no cluster answers; see launch/README.md'
  items[:] = [item for item in items if item not in left_out]
  # Rooms with long files come first, so that two workers end together.
  first = LONG_SLOW if _slow(config) else LONG
  items.sort(key=lambda item: item.path.parent.name not in first)
  for item in items:
    if item.get_closest_marker('slow'):
      item.add_marker(pytest.mark.timeout(SLOW_SECONDS))
  config.hook.pytest_deselected(items=list(left_out))
  config.stash[LEFT_OUT] = list(left_out.values())
  if hasattr(config, 'workeroutput'):
    config.workeroutput['left_out'] = config.stash[LEFT_OUT]


LONG = ('train', 'methods', 'evals')
LONG_SLOW = ('tests', 'launch', 'train')  # a demo, a README, a notebook
SLOW_SECONDS = 900
LEFT_OUT = pytest.StashKey[list[str]]()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
  """Takes from a worker what it left out; all of them leave out the same."""
  left_out = getattr(node, 'workeroutput', {}).get('left_out', [])
  if left_out and LEFT_OUT not in node.config.stash:
    node.config.stash[LEFT_OUT] = left_out
    node.config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
  report = yield
  return _refuse_skip(item.config, report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
  report = yield
  return _refuse_skip(collector.config, report)


def _refuse_skip(config, report):
  """Makes a skip a failure where none is allowed."""
  expected = hasattr(report, 'wasxfail')
  if config.option.no_skips and report.skipped and not expected:
    report.outcome = 'failed'
    report.longrepr = f'skipped, and --no-skips is set: {report.longrepr}'
  return report


def pytest_terminal_summary(terminalreporter, config):
  skips = [
    report
    for report in terminalreporter.stats.get('skipped', [])
    if not hasattr(report, 'wasxfail')
  ]
  terminalreporter.write_line(f'skips: {len(skips)}')
  for report in skips:
    terminalreporter.write_line(f'  {report.nodeid}: {report.longrepr[2]}')
  reasons = config.stash.get(LEFT_OUT, [])
  for reason in sorted(set(reasons)):
    terminalreporter.write_line(f'left out {reasons.count(reason)}: {reason}')


@pytest.fixture(scope='session')
def clips(tmp_path_factory):
  """A folder of 40 small labelled videos."""
  folder = tmp_path_factory.mktemp('clips')
  from vssl_jax.data.tools import synthetic

  synthetic.write(folder, clips=40, size=32, frames=8)
  return folder / 'train'


@pytest.fixture
def tiny(clips, tmp_path):
  """Both phases of SALT, 6 steps each, in seconds."""
  from tests.train import small_runs

  return small_runs.tiny_config(clips, tmp_path / 'run')
