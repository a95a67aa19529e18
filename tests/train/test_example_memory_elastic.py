"""What was remembered goes on elsewhere: other devices, other processes."""

import pathlib

import numpy as np
import pytest

from tests.train import locks, test_example_memory
from tests.train import test_processes as programs

PAGE = (
  programs.PAGE
  + """
from tests.train import test_example_memory as memory
from vssl_jax.train import run

run.methods.build = lambda *_: memory.PLAN
"""
)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_goes_on_elsewhere(clips, tmp_path, monkeypatch):
  """On four devices, in two processes, on one device, on two.

  Each goes on from what the one before had saved: inside a window, at its end
  and at the start of the phase that takes the memory over.
  """
  monkeypatch.setattr(programs, 'PAGE', PAGE)
  config = test_example_memory.make_config(clips, tmp_path / 'run')
  config.mesh.update(dict(data=1, fsdp=4))
  programs._finish(programs._start(tmp_path / 'a', config, devices=4))
  want, losses = _rows(config), locks.logged(config.workdir, 'loss')
  assert sorted(losses) == [*range(1, 10)]
  for start, mesh in ((2, (2, 2)), (3, (1, 1)), (4, (1, 2))):
    locks.truncate(config.workdir, start)
    (pathlib.Path(config.workdir) / 'metrics.jsonl').unlink()
    config.mesh.update(dict(zip(('data', 'fsdp'), mesh, strict=True)))
    if mesh == (2, 2):
      programs._finish(*programs._pair(tmp_path / 'a', config))
    else:
      devices = mesh[0] * mesh[1]
      programs._finish(programs._start(tmp_path / 'a', config, devices=devices))
    got = locks.logged(config.workdir, 'loss')
    assert sorted(got) == [*range(start + 1, 10)]
    for step, loss in got.items():
      np.testing.assert_allclose(loss, losses[step], rtol=1e-6)
    for step, leaves in _rows(config).items():
      for name, x in leaves.items():
        # Counts are exact; losses are sums in the order of a mesh.
        close = 0 if 'seen' in name else 1e-5
        np.testing.assert_allclose(
          x, want[step][name], rtol=close, err_msg=f'{step} {name}'
        )


def _rows(config):
  states = locks.states(config.workdir)
  found = {n: locks.read(s, 'example_memory/') for n, s in states.items()}
  for leaves in found.values():
    assert leaves['example_memory/cells'].shape == (1024, 2, 3)
    assert np.count_nonzero(leaves['example_memory/seen'])
    assert not np.asarray(leaves['example_memory/seen'][40:]).any()  # 40 videos
  return found
