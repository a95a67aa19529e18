"""Mask specs: static fields of a phase, parsed from the text of a config.

`parse` converts the text of a config to specs. A spec computes its token
counts on a grid and draws the mask of a step.
"""

import abc
import dataclasses
import difflib
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Key

from vssl_jax import rngs
from vssl_jax.masks import sampling, tubelets


@dataclasses.dataclass(frozen=True)
class Spec(abc.ABC):
  """A mask as a static field of a phase.

  Attributes:
    name: names the random stream (`mask/<name>`) and the metrics.
  """

  name: str

  @abc.abstractmethod
  def counts(self, grid: tubelets.Grid) -> tuple[int, int]:
    """Returns the visible and masked counts on a grid."""

  @abc.abstractmethod
  def sample(
    self, keys: Key[Array, 'B'], size_key: Key[Array, ''], grid: tubelets.Grid
  ) -> tuple[sampling.Mask, sampling.Metrics]:
    """Draws a mask for per-example keys; returns it with its metrics."""

  def draw(
    self, rng: rngs.Rng, batch: Any, grid: tubelets.Grid
  ) -> tuple[sampling.Mask, sampling.Metrics]:
    """Draws this step's mask of a batch.

    Args:
      rng: random streams of the step.
      batch: has `index` and `repeat`, see `Rng.per_example`.
      grid: (t, h, w) in tokens.

    Returns:
      The mask, and scalar metrics such as `visible_tokens`.
    """
    stream = f'mask/{self.name}' if self.name else 'mask'
    keys = rng.per_example(stream, batch)
    mask, metrics = self.sample(keys, rng.stream(f'{stream}/size'), grid)
    visible, masked = (jnp.float32(index.shape[1]) for index in mask)
    return mask, {'visible_tokens': visible, 'masked_tokens': masked, **metrics}


@dataclasses.dataclass(frozen=True)
class MultiBlock(Spec):
  """V-JEPA's blocks; the fields are the arguments of `sampling.multiblock`.

  Attributes:
    visible_fraction: fraction of visible tokens; their number is rounded to
      a multiple of 8.
    masked_fraction: fraction of masked tokens; their number is rounded to a
      multiple of 8.
    visible: exact count, instead of the fraction.
    masked: exact count, instead of the fraction.
  """

  blocks: int
  scale: float
  visible_fraction: float
  masked_fraction: float
  aspect: tuple[float, float] = (0.75, 1.5)
  visible: int | None = None
  masked: int | None = None
  select: sampling.Select = 'random_k'
  size_per: sampling.SizePer = 'step'

  def counts(self, grid: tubelets.Grid) -> tuple[int, int]:
    """Returns the visible and masked counts on a grid."""
    n = math.prod(grid)
    visible = self.visible or _round8(self.visible_fraction * n)
    masked = self.masked or _round8(self.masked_fraction * n)
    if visible + masked > n:
      raise ValueError(
        f'mask {self.name!r}: {visible} visible and {masked} masked tokens do '
        f'not fit into grid {grid} ({n} tokens); use a larger clip, smaller '
        f'patches, or give counts, such as {self.name}:{n // 4}/{n // 2}'
      )
    return visible, masked

  def sample(
    self, keys: Key[Array, 'B'], size_key: Key[Array, ''], grid: tubelets.Grid
  ) -> tuple[sampling.Mask, sampling.Metrics]:
    """Draws a mask for per-example keys; returns it with its metrics."""
    visible, masked = self.counts(grid)
    return sampling.multiblock(
      keys,
      size_key,
      grid,
      blocks=self.blocks,
      scale=self.scale,
      aspect=self.aspect,
      visible=visible,
      masked=masked,
      select=self.select,
      size_per=self.size_per,
    )


@dataclasses.dataclass(frozen=True)
class Random(Spec):
  """Uniform random mask of all tokens, see `sampling.random`."""

  mask_ratio: float
  rule: sampling.Rule = 'visible_floor'

  def counts(self, grid: tubelets.Grid) -> tuple[int, int]:
    """Returns the visible and masked counts on a grid."""
    return sampling.counts(math.prod(grid), self.mask_ratio, self.rule)

  def sample(
    self, keys: Key[Array, 'B'], size_key: Key[Array, ''], grid: tubelets.Grid
  ) -> tuple[sampling.Mask, sampling.Metrics]:
    """Draws a mask for per-example keys; returns it with its metrics."""
    return sampling.random(keys, grid, self.mask_ratio, self.rule), {}


@dataclasses.dataclass(frozen=True)
class Tube(Spec):
  """Tube mask: the same positions at every time step, see `sampling.tube`."""

  mask_ratio: float
  rule: sampling.Rule = 'masked_floor'

  def counts(self, grid: tubelets.Grid) -> tuple[int, int]:
    """Returns the visible and masked counts on a grid."""
    t, h, w = grid
    visible, masked = sampling.counts(h * w, self.mask_ratio, self.rule)
    return t * visible, t * masked

  def sample(
    self, keys: Key[Array, 'B'], size_key: Key[Array, ''], grid: tubelets.Grid
  ) -> tuple[sampling.Mask, sampling.Metrics]:
    """Draws a mask for per-example keys; returns it with its metrics."""
    return sampling.tube(keys, grid, self.mask_ratio, self.rule), {}


@dataclasses.dataclass(frozen=True)
class Frames(Spec):
  """Independent random mask of each time step, see `sampling.frames`."""

  mask_ratio: float
  rule: sampling.Rule = 'visible_floor'

  def counts(self, grid: tubelets.Grid) -> tuple[int, int]:
    """Returns the visible and masked counts on a grid."""
    t, h, w = grid
    visible, masked = sampling.counts(h * w, self.mask_ratio, self.rule)
    return t * visible, t * masked

  def sample(
    self, keys: Key[Array, 'B'], size_key: Key[Array, ''], grid: tubelets.Grid
  ) -> tuple[sampling.Mask, sampling.Metrics]:
    """Draws a mask for per-example keys; returns it with its metrics."""
    return sampling.frames(keys, grid, self.mask_ratio, self.rule), {}


@dataclasses.dataclass(frozen=True)
class Causal(Spec):
  """Mask with the start of the clip visible, see `sampling.causal`."""

  mask_ratio: float

  def counts(self, grid: tubelets.Grid) -> tuple[int, int]:
    """Returns the visible and masked counts on a grid."""
    return sampling.counts(math.prod(grid), self.mask_ratio, 'visible_floor')

  def sample(
    self, keys: Key[Array, 'B'], size_key: Key[Array, ''], grid: tubelets.Grid
  ) -> tuple[sampling.Mask, sampling.Metrics]:
    """Draws a mask for per-example keys; returns it with its metrics."""
    return sampling.causal(keys, grid, self.mask_ratio), {}


# Scales: SALT, arXiv 2509.24317. Block counts: facebookresearch/vjepa2,
# configs/train/vitl16. The token counts are our choice; they are close to
# those after the published truncation of a batch (see `sampling.multiblock`).
SHORT = MultiBlock('short', 8, 0.15, 0.204, 0.418)
LONG = MultiBlock('long', 2, 0.7, 0.051, 0.699)

_ALIASES = {
  'short_long': 'short+long',
  'tube1': 'tube:0.9',
  'tube2': 'tube:0.9+tube:0.9',
  'causal2': 'causal:0.9+causal:0.9',
}
_RATIO_KINDS = {
  'tube': Tube,
  'random': Random,
  'frames': Frames,
  'causal': Causal,
}
_BLOCK_KINDS = {'short': SHORT, 'long': LONG}


def parse(
  text: str,
  *,
  select: sampling.Select = 'random_k',
  size_per: sampling.SizePer = 'step',
) -> tuple[Spec, ...]:
  """Parses the masks of a config.

  Args:
    text: masks joined by `+`: `short`, `long`, `short:24/32` (visible/masked
      counts), `tube:0.9`, `random:0.95`, `frames:0.75`, `causal:0.9` (mask
      ratio); or one of `short_long`, `tube1`, `tube2`, `causal2`.
    select: option of block masks, see `sampling.multiblock`.
    size_per: option of block masks, see `sampling.multiblock`.

  Returns:
    One spec per mask. Masks of the same kind are named `tube_1`, `tube_2`.

  Raises:
    ValueError: a mask is unknown; the message gives the nearest.

  Example:
    >>> [spec.name for spec in parse('short+long')]
    ['short', 'long']
    >>> parse('tube:0.9')[0].counts((8, 14, 14))
    (160, 1408)
  """
  items = _ALIASES.get(text, text).split('+')
  kinds = [item.partition(':')[0] for item in items]
  specs = []
  for i, (item, kind) in enumerate(zip(items, kinds, strict=True)):
    setting = item.partition(':')[2]
    repeated = kinds.count(kind) > 1
    name = f'{kind}_{kinds[:i].count(kind) + 1}' if repeated else kind
    if kind in _RATIO_KINDS and _is_ratio(setting):
      specs.append(_RATIO_KINDS[kind](name, float(setting)))
    elif kind in _BLOCK_KINDS and _are_counts(setting):
      visible, _, masked = setting.partition('/')
      specs.append(
        dataclasses.replace(
          _BLOCK_KINDS[kind],
          name=name,
          visible=int(visible) if visible else None,
          masked=int(masked) if masked else None,
          select=select,
          size_per=size_per,
        )
      )
    else:
      raise ValueError(_unknown(text, item))
  return tuple(specs)


def _is_ratio(text: str) -> bool:
  return text.replace('.', '', 1).isdecimal() and 0 < float(text) < 1


def _are_counts(text: str) -> bool:
  parts = text.split('/')
  return not text or (
    len(parts) == 2 and all(p.isdecimal() and int(p) > 0 for p in parts)
  )


def _unknown(text: str, item: str) -> str:
  known = [*_ALIASES, 'short', 'long', 'short:24/32']
  known += [f'{kind}:0.9' for kind in _RATIO_KINDS]
  kind = item.partition(':')[0]
  if kind in _RATIO_KINDS:
    nearest = f'{kind}:0.9'
  elif kind in _BLOCK_KINDS:
    nearest = f'{kind}:24/32'
  else:
    nearest = difflib.get_close_matches(item, known, n=1, cutoff=0.0)[0]
  return (
    f'mask {text!r}: found {item!r}, wanted masks such as {known} joined by '
    f'"+" (a ratio lies between 0 and 1); the nearest is {nearest!r}'
  )


def _round8(x: float) -> int:
  return max(8, 8 * round(x / 8))
