"""Learned positions on other grids, as the released codes resize them."""

import numpy as np
import pytest

from vssl_jax.models import resizing

try:
  import torch
except ImportError:
  torch = None

TABLE = np.random.default_rng(0).standard_normal((1, 5, 5, 3), np.float32)
# Smaller, larger, not square, and as large along one axis.
GRIDS = [(3, 3), (2, 4), (8, 7), (5, 6), (1, 1)]


def keys(x, a):
  """Keys' kernel, from its definition, at one distance."""
  x = abs(x)
  if x < 1:
    return (a + 2) * x**3 - (a + 3) * x**2 + 1
  return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def one(row, i, wanted, kind):
  """One resized number, by a loop over all stored ones and beyond the edges."""
  offset = 0.1 if kind == 'bicubic_offset' else 0.0
  scale = len(row) / (wanted + offset)
  centre = (i + 0.5) * scale - 0.5
  if kind == 'bicubic_antialias':
    wide = max(scale, 1)
    taps = [keys((j - centre) / wide, -0.5) for j in range(len(row))]
    return np.dot(taps, row) / np.sum(taps)
  last = len(row) - 1
  return sum(
    keys(j - centre, -0.75) * row[min(max(j, 0), last)]
    for j in range(-9, len(row) + 9)
  )


def along(table, axis, wanted, kind):
  return np.stack(
    [
      np.apply_along_axis(one, axis, table, i, wanted, kind)
      for i in range(wanted)
    ],
    axis,
  )


@pytest.mark.parametrize('kind', resizing.NAMES[1:])
def test_numbers_are_those_of_the_formula(kind):
  for h, w in GRIDS:
    wanted = along(along(TABLE.astype(float), 1, h, kind), 2, w, kind)
    found = resizing.resize(TABLE, (1, h, w), kind)
    assert found.shape == (1, h, w, 3) and found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize('kind', resizing.NAMES)
def test_a_table_of_the_grid_keeps_every_bit(kind):
  found = resizing.resize(TABLE, (1, 5, 5), kind)
  np.testing.assert_array_equal(found, TABLE)
  constant = resizing.resize(np.ones((2, 4, 4, 1), np.float32), (3, 7, 2), kind)
  np.testing.assert_allclose(constant, 1, atol=1e-6)
  with pytest.raises(ValueError, match="resize is 'nearest', wanted one of"):
    resizing.resize(TABLE, (1, 5, 5), 'nearest')


@pytest.mark.slow
@pytest.mark.skipif(torch is None, reason='needs the extra parity')
@pytest.mark.parametrize('side', [(5, 5), (37, 37)])
def test_as_torch_interpolates(side):
  """As in the released position code of DINO, DINOv2 and registers."""
  table = np.random.default_rng(1).standard_normal((1, *side, 4), np.float32)
  image = torch.tensor(table).permute(0, 3, 1, 2)
  for h, w in [*GRIDS, (14, 14), (12, 16)]:
    options = {
      'bicubic': {'size': (h, w)},
      'bicubic_antialias': {'size': (h, w), 'antialias': True},
      'bicubic_offset': {
        'scale_factor': ((h + 0.1) / side[0], (w + 0.1) / side[1])
      },
    }
    for kind, arguments in options.items():
      wanted = torch.nn.functional.interpolate(
        image, mode='bicubic', **arguments
      )
      found = resizing.resize(table, (1, h, w), kind)
      np.testing.assert_allclose(
        found, wanted.permute(0, 2, 3, 1).numpy(), atol=2e-5
      )
