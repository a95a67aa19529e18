"""Validates the fields of `config.json` from which networks are built.

Other fields are ignored. Sizes are taken from tensors if possible. The fields
checked here are those that a malicious file could set to any value.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from vssl_jax.weights.readers import tensors

LARGEST = 2**16  # limit of sizes: channels, heads, frames, pixels
LONGEST = 64  # limit of the length of lists and strings
POOLED = 8  # limit of q_pool, in stages of Hiera


def _is_count(x: Any, least: int = 1) -> bool:
  return type(x) is int and least <= x <= LARGEST


def _is_size(x: Any) -> bool:
  return _is_count(x, 0)


def _is_number(x: Any) -> bool:
  return type(x) in (int, float) and math.isfinite(x) and abs(x) < 1e9


def _is_text(x: Any) -> bool:
  return isinstance(x, str) and len(x) <= LONGEST


def _is_list(member: Callable[[Any], bool]) -> Callable[[Any], bool]:
  return lambda x: (
    isinstance(x, list) and len(x) <= LONGEST and all(map(member, x))
  )


def _is_side(x: Any) -> bool:
  """Returns whether x is an image side or an image processor's size dict."""
  return _is_count(x) or (isinstance(x, dict) and _is_count(x.get('height')))


def _is_field(x: Any) -> bool:
  """Returns whether x is a valid network field of `modules.to_fields`."""
  is_scalar = x is None or isinstance(x, bool | float) or _is_text(x)
  return is_scalar or _is_size(x) or _is_list(_is_number)(x)


KNOWN: dict[str, tuple[Callable[[Any], bool], str]] = {
  **dict.fromkeys(
    (
      'num_attention_heads',
      'pred_num_attention_heads',
      'decoder_num_attention_heads',
      'num_heads',
      'frames_per_clip',
      'num_frames',
    ),
    (_is_count, f'a number from 1 to {LARGEST}'),
  ),
  **dict.fromkeys(
    ('crop_size', 'image_size'),
    (_is_side, f'a number from 1 to {LARGEST}, or a height and a width'),
  ),
  'hidden_act': (_is_text, 'a name'),
  'layer_norm_eps': (
    lambda x: _is_number(x) and 0 < x < 1,
    'a number between 0 and 1',
  ),
  **dict.fromkeys(
    ('image_mean', 'image_std'), (_is_list(_is_number), 'a list of numbers')
  ),
  **dict.fromkeys(
    ('do_normalize', 'do_rescale'),
    (lambda x: isinstance(x, bool), 'true or false'),
  ),
  'rescale_factor': (lambda x: _is_number(x) and x > 0, 'a number above 0'),
  'video': (
    lambda x: _is_list(_is_count)(x) and len(x) == 4,
    'frames, height, width and channels',
  ),
  'clip': (
    lambda x: _is_list(_is_number)(x) and len(x) == 2 and min(x) >= 0,
    'stride and frames per second, from 0',
  ),
  'id2label': (
    lambda x: (
      isinstance(x, dict) and all(isinstance(n, str) for n in x.values())
    ),
    'an object of names by label',
  ),
  'q_pool': (
    lambda x: type(x) is int and 0 <= x <= POOLED,
    f'a number from 0 to {POOLED}',
  ),
  **dict.fromkeys(
    ('patch_stride', 'input_size'), (_is_list(_is_count), 'a list of sizes')
  ),
  'patch_padding': (_is_list(_is_size), 'a list of sizes'),
}
OURS = ('vit', 'hiera', 'framewise')  # sections with network fields
# Sections whose fields are treated like top-level ones.
WITHIN = ('image_processor', 'video_processor')
# Ranges of mean and deviation, relative to the largest value of a pixel.
MEANS, DEVIATIONS = (-10, 10), (0.005, 10)


def of_file(path: str, config: Mapping[str, Any]) -> dict[str, Any]:
  """Validates a config and returns the fields that are set.

  Mean and deviation are converted to pixels from 0 to 1, whatever range the
  image processor uses. Those of `timm` (`pretrained_cfg`) are supported, too.

  Args:
    path: path of the file, for the message.
    config: contents of the file.

  Raises:
    WeightsError: a field has the wrong type or size; the message names it.
  """
  # transformers writes null for unset fields.
  fields = {name: x for name, x in config.items() if x is not None}
  for name in WITHIN:
    if isinstance(fields.get(name), dict):
      fields |= {k: x for k, x in fields[name].items() if x is not None}
  cfg = fields.get('pretrained_cfg')
  if isinstance(cfg, dict) and cfg.get('mean') and cfg.get('std'):
    fields = {'image_mean': cfg['mean'], 'image_std': cfg['std']} | fields
  check(path, fields)
  return fields | _colours(path, fields)


def _colours(path: str, config: Mapping[str, Any]) -> dict[str, list[float]]:
  """Returns mean and deviation of pixels from 0 to 1; {} if there are none."""
  names = ('image_mean', 'image_std')
  mean, std = (config.get(name) for name in names)
  if config.get('do_normalize') is False:
    count = len(mean or std or (0,) * 3)
    mean, std = [0.0] * count, [1.0] * count
  if mean is None and std is None:
    return {}
  if mean is None or std is None or len(mean) != len(std) or not mean:
    raise tensors.WeightsError(
      f'{path}: found image_mean {mean} and image_std {std}, wanted a value of '
      'each per channel'
    )
  factor = config.get('rescale_factor', 1 / 255)
  peak = 255.0 if config.get('do_rescale') is False else 255 * factor
  peak = 1.0 if abs(peak - 1) < 1e-6 else peak
  mean, std = [x / peak for x in mean], [x / peak for x in std]
  for values, (low, high) in ((mean, MEANS), (std, DEVIATIONS)):
    if not all(low <= x <= high for x in values):
      raise tensors.WeightsError(
        f'{path}: found image_mean {config.get(names[0])} and image_std '
        f'{config.get(names[1])} for pixels from 0 to {peak:g}, wanted at most '
        f'{high} times that, and deviations of at least {DEVIATIONS[0]} of it; '
        'divide them by 255, or correct do_rescale and rescale_factor'
      )
  return dict(zip(names, (mean, std), strict=True))


def check(path: str, config: Mapping[str, Any]) -> None:
  """Validates the fields of a config.

  Args:
    path: path of the file, for the message.
    config: contents of the file.

  Raises:
    WeightsError: a field has the wrong type or size; the message names it.
  """
  for name, (is_valid, expected) in KNOWN.items():
    if config.get(name) is not None and not is_valid(config[name]):
      raise tensors.WeightsError(
        f'{path}: {name} is {tensors.short(config[name])}, wanted {expected}'
      )
  for name in OURS:
    fields = config.get(name, {})
    if not isinstance(fields, dict):
      raise tensors.WeightsError(
        f'{path}: {name} is {tensors.short(fields)}, wanted names and values'
      )
    for field, value in fields.items():
      if not _is_field(value):
        raise tensors.WeightsError(
          f'{path}: {name}.{tensors.short(field)[1:-1]} is '
          f'{tensors.short(value)}, wanted a size from 0 to {LARGEST}, '
          'or a number, a name or a list'
        )
