"""The package `hiera-transformer`, for tests and benchmarks that compare."""

import importlib.metadata
import sys
import types

import torch


class _DropPath(torch.nn.Module):
  """Leaves out a branch of some examples."""

  def __init__(self, rate):
    super().__init__()
    self.rate = rate

  def forward(self, x):
    """Returns the branch, scaled up where it stays."""
    if not self.training:
      return x
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    kept = torch.rand(shape, device=x.device) >= self.rate
    return x * kept / (1 - self.rate)


class _Mlp(torch.nn.Module):
  """Two linear layers and what is between them."""

  def __init__(self, width, hidden, act_layer):
    super().__init__()
    self.fc1 = torch.nn.Linear(width, hidden)
    self.act = act_layer()
    self.fc2 = torch.nn.Linear(hidden, width)

  def forward(self, x):
    """Returns tokens of the same width."""
    return self.fc2(self.act(self.fc1(x)))


def load():
  """Returns the module `hiera`.

  All that it takes of timm is the two layers above. timm itself wants
  torchvision, whose builds fit one build of torch each, and which in another
  one cannot even be imported; nor can transformers then.

  Raises:
    ImportError: the package is not installed.
  """
  names = ('timm', 'timm.models', 'timm.models.layers')
  before = {name: sys.modules.get(name) for name in names}
  for name in names:
    sys.modules[name] = types.ModuleType(name)
  layers = sys.modules[names[-1]]
  layers.DropPath, layers.Mlp = _DropPath, _Mlp
  try:
    import hiera
  finally:
    for name, module in before.items():
      if module is None:
        del sys.modules[name]
      else:
        sys.modules[name] = module
  return hiera


def version():
  """Returns the package's version."""
  return importlib.metadata.version('hiera-transformer')
