"""Mean and deviation of pixels by channel, which clips are normalised with.

They are keys of the data section (`data.mean`, `data.std`), so that all
encoders of a run, its pixel targets and its erased boxes share them. A frozen
encoder that was trained elsewhere keeps its own.
"""

from collections.abc import Sequence
from typing import NamedTuple

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Colours(NamedTuple):
  """What is subtracted from pixels in [0, 1], and what they are divided by.

  Attributes:
    mean: one value per channel.
    std: likewise, above 0.
  """

  mean: tuple[float | int, ...]
  std: tuple[float | int, ...]


# By channels. Of grey: the mean of ImageNet's three channels, our choice.
DEFAULTS = {
  1: Colours((0.449,), (0.226,)),
  3: Colours(IMAGENET_MEAN, IMAGENET_STD),
}


def of(
  channels: int,
  mean: Sequence[float | int] = (),
  std: Sequence[float | int] = (),
) -> Colours:
  """Returns mean and deviation of clips with some number of channels.

  Args:
    channels: of the clips.
    mean: a value per channel, or one for all; () for the default, which 1
      and 3 channels have.
    std: likewise.

  Raises:
    ValueError: another number of values, or none where there is no default.
  """
  default = DEFAULTS.get(channels, Colours((), ()))
  values = []
  for name, given in (('mean', mean), ('std', std)):
    row = tuple(given or getattr(default, name))
    row = row * channels if len(row) == 1 else row
    if len(row) != channels:
      raise ValueError(
        f'data.{name}: found {tuple(given)} for clips of {channels} channels, '
        'wanted a value for each of them, or one for all; set '
        f'--config.data.{name}=(0.5,)'
      )
    values.append(row)
  return Colours(*values)


def check(channels: int, mean: Sequence[float | int], name: str) -> None:
  """Raises for clips of other channels than a network reads.

  Args:
    channels: of the clips.
    mean: of the network, a value per channel.
    name: of the network, for the message.

  Raises:
    ValueError: the numbers of channels differ.
  """
  if channels != len(mean):
    raise ValueError(
      f'{name}: found clips of {channels} channels, wanted {len(mean)}, which '
      f'its mean {tuple(mean)} is for; in a config set '
      f'--config.data.channels={len(mean)}'
    )
