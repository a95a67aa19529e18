"""Config sections and ranges of networks, shared by all methods."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from vssl_jax.masks import specs
from vssl_jax.models import attention, blocks, layers, positions, vit
from vssl_jax.utils import ranges

STEPS = ranges.Whole(1, ranges.MANY)
MASKS = ranges.Text(specs.parse)
MASK_SELECT = ranges.Choice(('random_k', 'raster_truncate'))
MASKS_PER_CLIP = ranges.Whole(1, 2**6)
MASK_TOKENS = ranges.Whole(1, 2**10)
WEIGHT = ranges.Real(0, 1e6)  # of a loss term
WIDTH = ranges.Whole(0, 2**16)  # 0: width of the size
BLOCKS = ranges.Whole(0, 2**10)
HEADS = ranges.Whole(0, 2**10)
DTYPE = ranges.Choice(layers.DTYPES)
RATE = ranges.Real(0, below=1)
SHARE = ranges.Real(0, 1)
EMA = ranges.Tuple(SHARE, lengths=(2,))  # first and last momentum
TRIPLE = ranges.Tuple(ranges.Whole(1, 2**10), lengths=(3,))

# See models/vit.py and models/hiera/encoder.py for each field.
NETWORK = {
  'patch': TRIPLE,
  'positions': ranges.Choice(positions.NAMES),
  'rope_pairing': ranges.Choice(('paired', 'vjepa2')),
  'qkv_bias': ranges.Choice(('full', 'qv')),
  'init': ranges.Choice(layers.INIT_FAMILIES),
  'init_family': ranges.Choice(layers.INIT_FAMILIES),
  'gelu': ranges.Choice(('exact', 'tanh')),
  'norm_eps': ranges.Real(ranges.LEAST, 1),
  'drop_path': RATE,
  'dtype': DTYPE,
  'remat': ranges.Choice(('none', *blocks.REMAT)),
  'attention': ranges.Choice(attention.NAMES),
}


def network(**fields: Any) -> ranges.Section:
  """Returns the config section of fields shared by encoders.

  Args:
    **fields: name of a field, one of `NETWORK` -> default.
  """
  return ranges.Section(**{k: (v, NETWORK[k]) for k, v in fields.items()})


def encoder(size: str = 'L') -> ranges.Section:
  """Returns the config section of the shape of a ViT.

  Args:
    size: default size, one of `vit.SIZES`.
  """
  return ranges.Section(
    size=(size, ranges.Choice(tuple(vit.SIZES))),
    # For other shapes; 0 uses the value of the size.
    width=(0, WIDTH),
    depth=(0, BLOCKS),
    num_heads=(0, HEADS),
    mlp_width=(0, WIDTH),
  )


def head(width: int, depth: int, num_heads: int) -> ranges.Section:
  """Returns the config section of the shape of a predictor or decoder.

  Args:
    width: default width D.
    depth: default number of blocks.
    num_heads: default number of attention heads.
  """
  return ranges.Section(
    width=(width, ranges.Whole(1, 2**16)),
    depth=(depth, BLOCKS),
    num_heads=(num_heads, ranges.Whole(1, 2**10)),
  )


def roles(*names: str) -> ranges.Tuple:
  """Returns the range of the roles that are initialised from `init_from`."""
  return ranges.Tuple(ranges.Choice(names), lengths=(1, 2), unique=True)


def shape(
  section: ml_collections.ConfigDict, sizes: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the fields of a named size, with overrides from the section.

  Args:
    section: `size`, and fields that override the size where they are not 0 or
      empty.
    sizes: size -> fields.
  """
  fields = {k: v for k, v in section.items() if k != 'size' and v}
  return {**sizes[section.size], **fields}
