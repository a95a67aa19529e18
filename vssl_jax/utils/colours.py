"""Per-channel mean and standard deviation for the normalisation of pixels.

They are config keys (`data.mean`, `data.std`), shared by all encoders of a run,
its pixel targets and its erased boxes. A published frozen encoder keeps its
own.
"""

from collections.abc import Sequence
from typing import NamedTuple

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Colours(NamedTuple):
  """Normalisation of pixels in [0, 1]: (x - mean) / std.

  Attributes:
    mean: one value per channel.
    std: one value per channel, above 0.
  """

  mean: tuple[float | int, ...]
  std: tuple[float | int, ...]


# By number of channels. Grey: mean of ImageNet's three channels, our choice.
DEFAULTS = {
  1: Colours((0.449,), (0.226,)),
  3: Colours(IMAGENET_MEAN, IMAGENET_STD),
}


def of(
  channels: int,
  mean: Sequence[float | int] = (),
  std: Sequence[float | int] = (),
) -> Colours:
  """Returns mean and standard deviation with one value per channel.

  Args:
    channels: number of channels of the clips.
    mean: one value per channel, or one for all; () for the default, which is
      defined for 1 and 3 channels.
    std: as `mean`.

  Raises:
    ValueError: wrong number of values, or none and there is no default.
  """
  default = DEFAULTS.get(channels, Colours((), ()))
  values = []
  for name, value in (('mean', mean), ('std', std)):
    row = tuple(value or getattr(default, name))
    row = row * channels if len(row) == 1 else row
    if len(row) != channels:
      raise ValueError(
        f'data.{name}: found {tuple(value)} for clips of {channels} channels, '
        'wanted a value for each of them, or one for all; set '
        f'--config.data.{name}=(0.5,)'
      )
    values.append(row)
  return Colours(*values)


def check(channels: int, mean: Sequence[float | int], name: str) -> None:
  """Raises if clips and network differ in their number of channels.

  Args:
    channels: number of channels of the clips.
    mean: mean of the network's pixels, one value per channel.
    name: name of the network, for the message.

  Raises:
    ValueError: the numbers of channels differ.
  """
  if channels != len(mean):
    raise ValueError(
      f'{name}: found clips of {channels} channels, wanted {len(mean)}, which '
      f'its mean {tuple(mean)} is for; in a config set '
      f'--config.data.channels={len(mean)}'
    )
