"""Determines the position table of VideoMAE-style files.

The encoders of VideoMAE and MVD have the same names and shapes but different
position tables. Fine-tuned files do not contain the table, so the user names
the layout after the source: `mvd_ssv2.pth#mvd`. Pretraining files of MVD
contain it, as do those of VideoMAE with learned positions.
"""

import logging
import math
from typing import NamedTuple

import numpy as np

from vssl_jax.masks import tubelets
from vssl_jax.models import positions
from vssl_jax.weights import source as source_lib
from vssl_jax.weights.readers import tensors

STORED = 'pos_embed'
PATCH = 'patch_embed.proj.weight'
# Tolerance between a stored table, possibly in 16 bits, and its formula:
# bfloat16 rounds numbers below 1 by up to 1 / 512.
SAME_TABLE = 2e-3
FORMULAS = {'videomae': 'sinusoid_1d', 'mvd': 'sincos_3d_mvd'}
# Time steps of most published models (16 frames, tubelets of 2), and pixels.
TIMES, SIDE = 8, 224


class Positions(NamedTuple):
  """The positions of an encoder, with the evidence for them.

  Attributes:
    kind: `sinusoid_1d`, `sincos_3d_mvd` or `learned`.
    grid: token grid (t, h, w) of a stored table, else None.
    evidence: reason, for the log; empty if the kind is assumed.
    others: alternative grids of a learned table; empty if `grid` is the usual
      one.
  """

  kind: str
  grid: tubelets.Grid | None
  evidence: str
  others: tuple[tubelets.Grid, ...] = ()


def of(found: source_lib.Found) -> Positions:
  """Determines the positions of a file of the family `videomae`.

  Raises:
    WeightsError: a stored table contradicts the named layout, or its number of
      rows fits no grid.
  """
  named = FORMULAS.get(found.named, '')
  _, stored = found.tensors('encoder').get(STORED, ('', None))
  if stored is None:
    if named:
      return Positions(named, None, f'as given by #{found.named}')
    if found.layout is not None and '(transformers)' in found.layout.name:
      return Positions('sinusoid_1d', None, 'transformers has no other')
    return Positions('sinusoid_1d', None, '')
  position = _of_table(found, stored)
  if named and position.kind != named:
    raise tensors.WeightsError(
      f'{found.source}: #{found.named} means positions {named}, and the '
      f'{STORED} in the file is {position.kind}; leave #{found.named} out'
    )
  return position


def _of_table(found: source_lib.Found, stored: tensors.Tensor) -> Positions:
  """Classifies a stored table as one of the formulas or as learned."""
  table = np.asarray(stored, np.float32)
  *_, patch = (1, *found.tensors('encoder')[PATCH][1].shape)
  grids = _grids(table.shape, patch)
  if not grids:
    raise tensors.WeightsError(
      f'{found.source}: {STORED} has shape {table.shape}, wanted '
      '[1, t * side * side, D]'
    )
  for kind in FORMULAS.values():
    for grid in grids:
      if is_formula(table[0], kind, grid):
        evidence = f'{STORED} in the file equals its formula'
        return Positions(kind, grid, evidence)
  evidence = f'{STORED} in the file is no known formula; grid {grids[0]}'
  is_usual = grids[0][0] == TIMES and grids[0][1] * patch == SIDE
  others = () if is_usual else tuple(grids[1:])
  return Positions('learned', grids[0], evidence, others)


def _grids(shape: tuple[int, ...], patch: int) -> list[tubelets.Grid]:
  """Returns the possible grids of a table [1, N, D], the most likely first.

  Grids whose number of time steps is a power of 2 come first. Among these, the
  clip closest to 16 frames of 224 pixels does, by the ratios of the sizes.
  """
  if len(shape) != 3 or shape[0] != 1:
    return []
  grids = []
  for t in range(1, 65):
    side = math.isqrt(shape[1] // t)
    if side and t * side * side == shape[1]:
      grids.append((t, side, side))

  def rank(grid: tubelets.Grid) -> tuple[bool, float]:
    t, side, _ = grid
    factors = abs(math.log(t / TIMES)) + abs(math.log(side * patch / SIDE))
    return t.bit_count() > 1, factors

  return sorted(grids, key=rank)


def is_formula(table: np.ndarray, kind: str, grid: tubelets.Grid) -> bool:
  """Returns whether a table [N, D] equals a formula on a grid.

  Args:
    table: position table, float32.
    kind: a name in `positions.TABLES`.
    grid: token grid (t, h, w).
  """
  try:
    formula = positions.TABLES[kind](grid, table.shape[1])
  except ValueError:  # the formula has no table of this width
    return False
  return bool(np.abs(table - formula).max() < SAME_TABLE)


def log(found: source_lib.Found) -> None:
  """Logs the positions of a VideoMAE-style file; warns if they are assumed."""
  position = of(found)
  logger = logging.getLogger(__name__)
  if position.others:
    logger.warning(
      '%s: positions %s for a grid (t, h, w) of %s tokens assumed. The file '
      'does not state the grid: its %s may also be for %s',
      found.source, position.kind, position.grid, STORED, position.others,
    )  # fmt: skip
  elif position.evidence:
    logger.info(
      '%s: positions %s (%s)',
      found.source, position.kind, position.evidence,
    )  # fmt: skip
  else:
    logger.warning(
      '%s: positions %s assumed, those of VideoMAE. The file does not state '
      'them, and files of MVD have the same names: for one of MVD write '
      '%s#mvd, else %s#videomae',
      found.source, position.kind, found.source, found.source,
    )  # fmt: skip
