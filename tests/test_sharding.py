"""Where leaves are split over devices, and what of it cannot be."""

import pytest
from jax.sharding import PartitionSpec

from vssl_jax import sharding

SIZES = {'data': 2, 'fsdp': 4}


@pytest.mark.parametrize(
  ('axes', 'shape'),
  [
    (('fsdp', 'fsdp'), (8, 8)),  # an axis twice
    ((None, 'fsdp'), (8,)),  # more axes than the leaf has
    (('data',), ()),
    (('fsdp', 'data'), (8, 3)),  # 2 does not divide 3
  ],
)
def test_an_override_that_does_not_fit_names_its_key(axes, shape):
  with pytest.raises(ValueError, match=r'^mesh.overrides: found .*') as error:
    sharding.spec('params/x', shape, SIZES, {'params': axes})
  assert 'for params/x of shape' in str(error.value)


def test_an_override_that_fits_is_taken():
  axes = (None, 'fsdp', 'data')
  found = sharding.spec('params/x', (3, 8, 2, 5), SIZES, {'params': axes})
  assert found == PartitionSpec(*axes)
