"""Examples in docstrings run, and every public function here has one."""

import doctest
import inspect
import logging

import jax
import numpy as np
import pytest

import vssl_jax
from vssl_jax import losses, weights
from vssl_jax.masks import hiera_units, sampling, specs, tubelets
from vssl_jax.models import vit

MODULES = (losses, hiera_units, sampling, specs, tubelets, vssl_jax)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder with the weights of a tiny encoder."""
  module = vit.Vit(
    width=16, depth=1, num_heads=2, mlp_width=32, patch=(2, 8, 8)
  )
  video = np.zeros((1, 4, 16, 16, 3), np.uint8)
  params = module.init(jax.random.key(0), video)['params']
  path = tmp_path_factory.mktemp('exported')
  weights.export(
    module, jax.device_get(params), path, video=video.shape[1:], timing=(1, 0.0)
  )
  return str(path)


def _functions():
  for module in MODULES:
    for name, value in vars(module).items():
      if inspect.isfunction(value) and not name.startswith('_'):
        if value.__module__ == module.__name__:
          yield pytest.param(module, value, id=f'{module.__name__}.{name}')


@pytest.mark.parametrize('module, function', [*_functions()])
def test_the_example_of_a_function_runs(module, function, folder, monkeypatch):
  # A test that ran `main` in this process may have left its printer of logs.
  monkeypatch.setattr(logging.getLogger('vssl_jax'), 'handlers', [])
  names = vars(module) | {'np': np, 'vssl_jax': vssl_jax, 'folder': folder}
  finder = doctest.DocTestFinder(recurse=False)
  tests = finder.find(inspect.unwrap(function), function.__name__, globs=names)
  assert any(test.examples for test in tests), 'no example'
  runner = doctest.DocTestRunner(verbose=False)
  for test in tests:
    assert not runner.run(test).failed
