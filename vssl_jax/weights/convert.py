"""Converts parameters between published layouts and ours."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from vssl_jax import trees
from vssl_jax.models import resizing
from vssl_jax.weights.name_maps import rules
from vssl_jax.weights.readers import tensors as tensors_lib


@dataclasses.dataclass(frozen=True)
class Report:
  """Report on all keys of a loaded file.

  Attributes:
    source: the file or folder.
    layout: name of the layout.
    loaded: published keys that were loaded, in full or in part.
    resized: our names of resized position tables, with both shapes.
    missing: our names without a published key (only allowed ones).
    unused: published keys that were not loaded (only allowed ones).
  """

  source: str
  layout: str
  loaded: tuple[str, ...]
  resized: tuple[str, ...] = ()
  missing: tuple[str, ...] = ()
  unused: tuple[str, ...] = ()

  def __str__(self) -> str:
    """Returns a one-line summary for the log."""
    counts = [f'{len(self.loaded)} tensors loaded']
    for field in ('resized', 'missing', 'unused'):
      names = getattr(self, field)
      if names:
        counts.append(f'{len(names)} {field} ({_some(names)})')
    return f'{self.source} [{self.layout}]: ' + ', '.join(counts)


def _some(names: Iterable[str], limit: int = 6) -> str:
  names = list(names)
  more = len(names) - limit
  return ', '.join(names[:limit]) + (f', and {more} more' if more > 0 else '')


def _conv_to_ours(x: np.ndarray) -> np.ndarray:
  return x.transpose(2, 3, 4, 1, 0).reshape(-1, x.shape[0])


def _grid_rows(x: np.ndarray) -> np.ndarray:
  """Reshapes [1, 1 + side * side, D] to [1, h, w, D], without the class row."""
  side = math.isqrt(x.shape[1] - 1)
  if x.shape[:2] != (1, 1 + side * side) or not side:
    raise tensors_lib.WeightsError(
      f'a position table of shape {x.shape} is not that of a class token and '
      'a square of patches, [1, 1 + side * side, D]'
    )
  return x[:, 1:].reshape(1, side, side, x.shape[2])


def _conv_to_theirs(x: np.ndarray, patch: tuple[int, ...]) -> np.ndarray:
  return x.reshape(*patch, -1, x.shape[-1]).transpose(4, 3, 0, 1, 2)


Form = Callable[[np.ndarray], np.ndarray]
# Dense kernels are [out, in] in torch and [in, out] here. A convolution whose
# stride equals its kernel size becomes a dense layer with the flattened kernel;
# other convolutions keep their kernel shape.
FORMS: dict[str, Form] = {
  'same': lambda x: x,
  'dense': lambda x: x.T,
  'conv': _conv_to_ours,
  'image_conv': lambda x: _conv_to_ours(x[:, :, None]),
  'whole_conv': lambda x: x.transpose(2, 3, 4, 1, 0),
  'table': lambda x: x,
  'token': lambda x: x.reshape(1, -1),
  'registers': lambda x: x[0],
  'class_row': lambda x: x[0, :1],
  'grid_rows': _grid_rows,
  # Flax kernels have separate axes for heads and for the pixels of a patch.
  'patches': lambda x: x.reshape(-1, x.shape[-1]),
  'heads': lambda x: x.reshape(x.shape[0], -1),
  'head_bias': lambda x: x.reshape(-1),
  'from_heads': lambda x: x.reshape(-1, x.shape[-1]),
}
AXES = {
  'dense': 2,
  'conv': 5,
  'image_conv': 4,
  'whole_conv': 5,
  'patches': 5,
  'heads': 3,
  'head_bias': 2,
  'from_heads': 3,
  'registers': 3,
  'class_row': 3,
  'grid_rows': 3,
}


def to_ours(
  tensors: Mapping[str, tensors_lib.Tensor],
  rows: Iterable[rules.Row],
  shapes: Any,
  *,
  source: str = 'weights',
  layout: str = '',
  resize: str = 'trilinear',
  allow_missing: Iterable[str] = (),
  allow_unused: Iterable[str] = (),
  elsewhere: Iterable[str] = (),
) -> tuple[dict[str, Any], Report]:
  """Converts published tensors to our parameters.

  Args:
    tensors: key -> tensor, by the names of the table.
    rows: the table.
    shapes: shapes of our parameters (`jax.eval_shape` of the module's init).
    source: the source, for messages.
    layout: name of the layout, for the report.
    resize: method to resize position tables, a name in `resizing.NAMES`.
    allow_missing: patterns of our names that may be missing; these are not in
      the result.
    allow_unused: patterns of published keys that may stay unused.
    elsewhere: keys (not patterns) that other parts of the model use.

  Returns:
    float32 parameters and the report.

  Raises:
    WeightsError: missing or unused tensors, shapes that do not match, or
      weights that are integers, NaN or Inf. The message names the tensors.
  """
  leaf_shapes = dict(trees.named_leaves(shapes))
  by_name = rules.by_name(rows, tensors)
  leaves: dict[str, np.ndarray] = {}
  loaded, resized, missing, not_finite = set(), [], [], []
  for name, shape in leaf_shapes.items():
    row = by_name.get(name)
    if row is None or row.theirs not in tensors:
      missing.append(f'{name} ({row.theirs if row else "not in the table"})')
      continue
    loaded.add(row.theirs)
    stored = np.asarray(tensors[row.theirs])
    if not jnp.issubdtype(stored.dtype, jnp.floating):  # includes bfloat16
      raise tensors_lib.WeightsError(
        f'{source}: {row.theirs} holds {stored.dtype}, wanted floating-point '
        'weights; quantised weights have to be converted to floats before'
      )
    x = piece(stored, row, source)
    if x.shape != shape.shape and _is_table(name, x, shape.shape):
      resized.append(f'{name} {x.shape} -> {shape.shape}')
      x = resizing.resize(x, shape.shape[:3], resize)
    if x.shape != shape.shape:
      raise tensors_lib.WeightsError(
        f'{source}: {row.theirs} gives shape {x.shape} and {name} has '
        f'{shape.shape}; the size or the patch of the encoder differs'
      )
    with np.errstate(over='ignore'):  # float64 out of float32 range becomes Inf
      leaves[name] = x.astype(np.float32)
    if not np.isfinite(leaves[name]).all():
      not_finite.append(f'{row.theirs} ({name})')
  if not_finite:
    raise tensors_lib.WeightsError(
      f'{source}: found NaN or Inf in {len(not_finite)} tensors, wanted finite '
      f'weights: {_some(not_finite)}. Download the file again, or take another'
    )
  unused = sorted(set(tensors) - loaded)
  unknown = sorted({*unused} - {*elsewhere})
  _refuse(source, 'no tensor for', missing, allow_missing, 'allow_missing')
  _refuse(source, 'no use for', unknown, allow_unused, 'allow_unused')
  report = Report(
    source,
    layout,
    tuple(sorted(loaded)),
    tuple(resized),
    tuple(missing),
    tuple(unused),
  )
  return trees.nest(leaves), report


def piece(x: np.ndarray, row: rules.Row, source: str) -> np.ndarray:
  """Converts the part of a tensor that a row selects to our layout.

  Args:
    x: the published tensor.
    row: the row of the table.
    source: the source, for messages.

  Raises:
    WeightsError: the shape of the tensor does not match the row.
  """
  dimensions = AXES.get(row.form, x.ndim)
  if x.ndim != dimensions or len(x) % row.parts:
    raise tensors_lib.WeightsError(
      f'{source}: {row.theirs} has shape {x.shape}, wanted {dimensions} axes, '
      f'the first a multiple of {row.parts}'
    )
  size = len(x) // row.parts
  if row.parts > 1:
    x = x[row.part * size : (row.part + 1) * size]
  try:
    return FORMS[row.form](x)
  except tensors_lib.WeightsError as e:
    raise tensors_lib.WeightsError(f'{source}: {row.theirs}: {e}') from e


def _is_table(name: str, x: np.ndarray, shape: tuple[int, ...]) -> bool:
  leaf = name.rsplit('/', maxsplit=1)[-1]
  is_table = leaf.startswith('positions') and x.ndim == 4
  return is_table and x.shape[-1] == shape[-1]


def _refuse(
  source: str, what: str, names: list[str], allowed: Iterable[str], option: str
) -> None:
  bad = [n for n in names if not any(re.match(p, n) for p in allowed)]
  if bad:
    raise tensors_lib.WeightsError(
      f'{source}: {what} {len(bad)} names: {_some(bad)}. The file is of '
      f'another model or release; allowed names go into {option}'
    )


def to_theirs(
  params: Any,
  rows: Iterable[rules.Row],
  patch: tuple[int, int, int] = (1, 1, 1),
) -> dict[str, np.ndarray]:
  """Converts our parameters to published tensors.

  Args:
    params: our parameters.
    rows: the table.
    patch: patch size (t, h, w), to reshape the patch embedding.

  Raises:
    WeightsError: a parameter that is not in the table.
  """
  leaves = {n: np.asarray(x) for n, x in trees.named_leaves(params)}
  inverse_forms: dict[str, Form] = {
    'same': lambda x: x,
    'dense': lambda x: x.T,
    'conv': lambda x: _conv_to_theirs(x, patch),
    'whole_conv': lambda x: x.transpose(4, 3, 0, 1, 2),
    'table': lambda x: x.reshape(1, -1, x.shape[-1]),
    'token': lambda x: x.reshape(1, 1, -1),
  }
  pieces: dict[str, list[np.ndarray]] = {}
  for row in rows:
    if row.ours in leaves:
      x = inverse_forms[row.form](leaves.pop(row.ours))
      if row.form == 'token' and row.parts > 1:
        x = x[None]  # mask tokens are stacked along a new first axis
      pieces.setdefault(row.theirs, []).append(x)
  if leaves:
    raise tensors_lib.WeightsError(
      f'the layout has no place for {_some(leaves)}; save in another layout'
    )
  return {
    key: np.ascontiguousarray(np.concatenate(x) if len(x) > 1 else x[0])
    for key, x in pieces.items()
  }
