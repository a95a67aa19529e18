"""A LayerLock run goes on on other meshes and other numbers of processes."""

import pathlib
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from tests.train import locks
from tests.train import test_processes as programs
from vssl_jax import sharding, trees
from vssl_jax.checkpoint import manager

# Wide enough that matrices are split over devices.
WIDE = dict(schedule='((0, 2), (1, 2))', width=128)


@pytest.fixture(scope='module')
def saved(clips, tmp_path_factory):
  """A run on a mesh of 1x4 devices, every step kept."""
  folder = tmp_path_factory.mktemp('elastic')
  config = locks.tiny(clips, folder / 'run', **WIDE)
  config.checkpoint.every = 1
  config.mesh.update(dict(data=1, fsdp=4))
  programs._finish(programs._start(folder / 'a', config, devices=4))
  return config


@pytest.mark.slow
@pytest.mark.parametrize('step', [2, 3])  # at the lock, and inside it
@pytest.mark.parametrize('place', ['2x2', '1x2', 'two processes'])
def test_a_run_goes_on_elsewhere(saved, tmp_path, step, place):
  """Saved on 1x4 devices: the next losses are the same to 1e-6."""
  config = saved.copy_and_resolve_references()
  config.workdir = str(tmp_path / 'run')
  shutil.copytree(saved.workdir, config.workdir)
  locks.truncate(config.workdir, step)
  (pathlib.Path(config.workdir) / 'metrics.jsonl').unlink()
  if place == 'two processes':
    config.mesh.update(dict(data=2, fsdp=2))
    programs._finish(*programs._pair(tmp_path / 'a', config))
  else:
    data, fsdp = (int(n) for n in place.split('x'))
    config.mesh.update(dict(data=data, fsdp=fsdp))
    devices = data * fsdp
    programs._finish(programs._start(tmp_path / 'a', config, devices=devices))
  want = locks.logged(saved.workdir, 'loss')
  got = locks.logged(config.workdir, 'loss')
  assert sorted(got) == list(range(step + 1, 5))
  for after, loss in got.items():
    np.testing.assert_allclose(loss, want[after], rtol=1e-6)
  # What was locked on four devices has the same bits at the end elsewhere.
  before = locks.sums(locks.states(saved.workdir)[step])
  end = locks.sums(locks.states(config.workdir)[4])
  frozen = locks.named(before, *locks.LOCKED[1], 'pixel_head')
  assert len(frozen) == 20
  assert {n for n in frozen if before[n] != end[n]} == set()


@pytest.mark.slow
@pytest.mark.parametrize('shape', [(2, 2), (1, 2), (1, 1)])
@pytest.mark.parametrize('step', [2, 3])
def test_a_state_has_the_same_bits_on_every_mesh(saved, shape, step):
  state = locks.states(saved.workdir)[step]
  shapes = state.shapes()
  devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
  mesh = Mesh(devices, ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)
  at = sharding.shardings(shapes, mesh)
  target = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, at
  )
  restored = dict(trees.named_leaves(manager.restore(state, target)))
  alone = locks.read(state, '')
  assert restored.keys() == alone.keys()
  for name, x in restored.items():
    np.testing.assert_array_equal(x, alone[name], err_msg=name)
  split = [n for n, x in restored.items() if not x.is_fully_replicated]
  assert bool(split) == (shape[1] > 1)
