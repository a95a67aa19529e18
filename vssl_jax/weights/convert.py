"""Moves numbers between published layouts and ours, and reports every key."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from vssl_jax import trees
from vssl_jax.models import resizing
from vssl_jax.weights import pairs, read


@dataclasses.dataclass(frozen=True)
class Report:
  """What became of every key of a file.

  Attributes:
    source: the file or folder.
    layout: which table was used.
    loaded: their keys, in full or in part.
    resized: our names, with the two shapes, of position tables made to fit.
    missing: our names that no key filled, allowed ones.
    unused: their keys that filled nothing, allowed ones.
  """

  source: str
  layout: str
  loaded: tuple[str, ...]
  resized: tuple[str, ...] = ()
  missing: tuple[str, ...] = ()
  unused: tuple[str, ...] = ()

  def __str__(self) -> str:
    """Returns a summary that fits in a log."""
    counts = [f'{len(self.loaded)} tensors loaded']
    for what in ('resized', 'missing', 'unused'):
      names = getattr(self, what)
      if names:
        counts.append(f'{len(names)} {what} ({_some(names)})')
    return f'{self.source} [{self.layout}]: ' + ', '.join(counts)


def _some(names: Iterable[str], limit: int = 6) -> str:
  names = list(names)
  rest = len(names) - limit
  return ', '.join(names[:limit]) + (f', and {rest} more' if rest > 0 else '')


def _conv_to_ours(x: np.ndarray) -> np.ndarray:
  return x.transpose(2, 3, 4, 1, 0).reshape(-1, x.shape[0])


def _grid_rows(x: np.ndarray) -> np.ndarray:
  """Returns the rows [1, 1 + side * side, D] of a square as [1, h, w, D]."""
  side = math.isqrt(x.shape[1] - 1)
  if x.shape[:2] != (1, 1 + side * side) or not side:
    raise read.WeightsError(
      f'a position table of shape {x.shape} is not that of a class token and '
      'a square of patches, [1, 1 + side * side, D]'
    )
  return x[:, 1:].reshape(1, side, side, x.shape[2])


def _conv_to_theirs(x: np.ndarray, patch: tuple[int, ...]) -> np.ndarray:
  return x.reshape(*patch, -1, x.shape[-1]).transpose(4, 3, 0, 1, 2)


Form = Callable[[np.ndarray], np.ndarray]
# torch multiplies by [out, in], we by [in, out]; a convolution whose stride is
# its kernel is a product with its flattened kernel, another one stays whole.
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
  # Flax keeps axes of their own for heads and for the pixels of a patch.
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
  tensors: Mapping[str, read.Tensor],
  rows: Iterable[pairs.Row],
  shapes: Any,
  *,
  source: str = 'weights',
  layout: str = '',
  resize: str = 'trilinear',
  allow_missing: Iterable[str] = (),
  allow_unused: Iterable[str] = (),
  elsewhere: Iterable[str] = (),
) -> tuple[dict[str, Any], Report]:
  """Fills our tree from published tensors.

  Args:
    tensors: key -> tensor, by the names of the table.
    rows: the table.
    shapes: our tree, of shapes (`jax.eval_shape` of the module's init).
    source: for messages.
    layout: for the report.
    resize: how position tables are made to fit, a name in `resizing.NAMES`.
    allow_missing: patterns of our names that may stay out; they are left out
      of the tree.
    allow_unused: patterns of their keys that need not be used.
    elsewhere: keys, no patterns, that other parts of the model use.

  Returns:
    float32 parameters and the report.

  Raises:
    WeightsError: a leaf that nothing fills, a key that fills nothing, a shape
      that does not fit, or weights that are integers, NaN or Inf, each named.
  """
  wanted = dict(trees.named_leaves(shapes))
  by_name = pairs.by_name(rows, tensors)
  leaves: dict[str, np.ndarray] = {}
  used, resized, missing, not_finite = set(), [], [], []
  for name, shape in wanted.items():
    row = by_name.get(name)
    if row is None or row.theirs not in tensors:
      missing.append(f'{name} ({row.theirs if row else "not in the table"})')
      continue
    used.add(row.theirs)
    stored = np.asarray(tensors[row.theirs])
    if not jnp.issubdtype(stored.dtype, jnp.floating):  # bfloat16 is one
      raise read.WeightsError(
        f'{source}: {row.theirs} holds {stored.dtype}, wanted floating-point '
        'weights; quantised weights have to be converted to floats before'
      )
    x = piece(stored, row, source)
    if x.shape != shape.shape and _is_table(name, x, shape.shape):
      resized.append(f'{name} {x.shape} -> {shape.shape}')
      x = resizing.resize(x, shape.shape[:3], resize)
    if x.shape != shape.shape:
      raise read.WeightsError(
        f'{source}: {row.theirs} gives shape {x.shape} and {name} wants '
        f'{shape.shape}; the size or the patch of the encoder differs'
      )
    with np.errstate(over='ignore'):  # float64 beyond float32 is Inf below
      leaves[name] = x.astype(np.float32)
    if not np.isfinite(leaves[name]).all():
      not_finite.append(f'{row.theirs} ({name})')
  if not_finite:
    raise read.WeightsError(
      f'{source}: found NaN or Inf in {len(not_finite)} tensors, wanted finite '
      f'weights: {_some(not_finite)}. Download the file again, or take another'
    )
  unused = sorted(set(tensors) - used)
  unknown = sorted({*unused} - {*elsewhere})
  _refuse(source, 'no tensor for', missing, allow_missing, 'allow_missing')
  _refuse(source, 'no use for', unknown, allow_unused, 'allow_unused')
  report = Report(
    source,
    layout,
    tuple(sorted(used)),
    tuple(resized),
    tuple(missing),
    tuple(unused),
  )
  return trees.nest(leaves), report


def piece(x: np.ndarray, row: pairs.Row, source: str) -> np.ndarray:
  """Returns a row's part of a tensor in our layout.

  Raises:
    WeightsError: the tensor has another shape than the row says.
  """
  dimensions = AXES.get(row.form, x.ndim)
  if x.ndim != dimensions or len(x) % row.parts:
    raise read.WeightsError(
      f'{source}: {row.theirs} has shape {x.shape}, wanted {dimensions} axes, '
      f'the first a multiple of {row.parts}'
    )
  size = len(x) // row.parts
  if row.parts > 1:
    x = x[row.part * size : (row.part + 1) * size]
  try:
    return FORMS[row.form](x)
  except read.WeightsError as e:
    raise read.WeightsError(f'{source}: {row.theirs}: {e}') from e


def _is_table(name: str, x: np.ndarray, shape: tuple[int, ...]) -> bool:
  last = name.rsplit('/', maxsplit=1)[-1]
  table = last.startswith('positions') and x.ndim == 4
  return table and x.shape[-1] == shape[-1]


def _refuse(
  source: str, what: str, names: list[str], allowed: Iterable[str], option: str
) -> None:
  bad = [n for n in names if not any(re.match(p, n) for p in allowed)]
  if bad:
    raise read.WeightsError(
      f'{source}: {what} {len(bad)} names: {_some(bad)}. The file is of '
      f'another model or release; what may be so goes into {option}'
    )


def to_theirs(
  params: Any,
  rows: Iterable[pairs.Row],
  patch: tuple[int, int, int] = (1, 1, 1),
) -> dict[str, np.ndarray]:
  """Returns published tensors from our tree.

  Args:
    params: our parameters.
    rows: the table.
    patch: frames and pixels of a token, to unfold the embedding.

  Raises:
    WeightsError: a leaf that the table does not know.
  """
  leaves = {n: np.asarray(x) for n, x in trees.named_leaves(params)}
  inverse: dict[str, Form] = {
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
      x = inverse[row.form](leaves.pop(row.ours))
      if row.form == 'token' and row.parts > 1:
        x = x[None]  # mask tokens are stacked along an axis of their own
      pieces.setdefault(row.theirs, []).append(x)
  if leaves:
    raise read.WeightsError(
      f'the layout has no place for {_some(leaves)}; save in another layout'
    )
  return {
    key: np.ascontiguousarray(np.concatenate(x) if len(x) > 1 else x[0])
    for key, x in pieces.items()
  }
