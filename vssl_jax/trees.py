"""Trees of arrays with named leaves, such as `encoder/block_00/norm`."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def name_of(path: tuple[Any, ...]) -> str:
  """Returns a JAX key path as slash-separated text."""
  return '/'.join(
    str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k))))
    for k in path
  )


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
  """Returns `(name, leaf)` of every leaf, in JAX's flattening order."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [(name_of(path), leaf) for path, leaf in leaves]


def map_named(fn: Callable[[str, Any], Any], tree: Any) -> Any:
  """Maps `fn(name, leaf)` over a tree."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: fn(name_of(path), leaf), tree
  )


def shapes(tree: Any) -> Any:
  """Returns the tree with a `ShapeDtypeStruct` for every leaf."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def count(tree: Any) -> int:
  """Returns the number of scalars in a tree of arrays or shapes."""
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
  """Returns the size of a tree of arrays or shapes in bytes."""
  return sum(
    int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


def cast(tree: Any, dtype: Any) -> Any:
  """Casts floating-point leaves to `dtype`; other leaves are unchanged."""

  def cast_leaf(x: Any) -> Any:
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(dtype) if floating else x

  return jax.tree.map(cast_leaf, tree)


def check_finite(tree: Any, source: str) -> None:
  """Checks that all parameters are finite floating-point numbers.

  Args:
    tree: parameters, NumPy or JAX arrays.
    source: origin of the parameters, for the error message.

  Raises:
    ValueError: arrays contain NaN or Inf, or are of an integer type; the
      message lists their names.
  """
  leaves = dict(named_leaves(tree))
  integers = [
    f'{name} ({x.dtype})'
    for name, x in leaves.items()
    if not jnp.issubdtype(x.dtype, jnp.floating)
  ]
  if integers:
    raise ValueError(
      f'{source}: found integers in {len(integers)} of {len(leaves)} arrays, '
      f'wanted floating-point weights: {_first(integers)}. Quantised weights '
      'have to be converted to floats before'
    )
  finite = jax.device_get(_finite(leaves))
  bad = [name for name, is_finite in finite.items() if not is_finite]
  if bad:
    raise ValueError(
      f'{source}: found NaN or Inf in {len(bad)} of {len(leaves)} arrays, '
      f'wanted finite weights: {_first(bad)}. Take another file, or an earlier '
      'checkpoint'
    )


def _finite(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Returns whether all values are finite, for each array."""
  if all(isinstance(x, np.ndarray) for x in leaves.values()):
    return {n: np.isfinite(x).all() for n, x in leaves.items()}
  return jax.jit(
    lambda tree: jax.tree.map(lambda x: jnp.isfinite(x).all(), tree)
  )(leaves)


def _first(names: list[str], limit: int = 5) -> str:
  rest = len(names) - limit
  return ', '.join(names[:limit]) + (f' and {rest} more' if rest > 0 else '')


def subtree(tree: Any, path: str) -> Any:
  """Returns the part of a nested dict under a slash-separated `path`.

  Raises:
    KeyError: a name on the path does not exist; the message lists the names
      that do.
  """
  for name in filter(None, path.split('/')):
    if name not in tree:
      raise KeyError(
        f'no subtree {path!r}: {name!r} is not among {sorted(tree)}'
      )
    tree = tree[name]
  return tree


def nest(named: Mapping[str, Any]) -> dict[str, Any]:
  """Returns nested dicts from leaves with slash-separated names."""
  out: dict[str, Any] = {}
  for name, leaf in named.items():
    *parents, last = name.split('/')
    node = out
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return out


def matcher(
  patterns: Iterable[str], names: Iterable[str], what: str
) -> Callable[[str], bool]:
  """Returns a predicate: does a name match at least one pattern?

  A pattern is a regular expression that must match from the start of the
  name. Every pattern must match at least one name, which detects typing
  errors.

  Args:
    patterns: regular expressions.
    names: all names.
    what: config key of the patterns, for the error message.

  Raises:
    ValueError: a pattern matches no name.
  """
  names, compiled = list(names), [re.compile(p) for p in patterns]
  for p in compiled:
    if not any(p.match(n) for n in names):
      raise ValueError(
        f'{what}: pattern {p.pattern!r} matches no parameter; '
        f'names look like {names[:3]}'
      )
  return lambda name: any(p.match(name) for p in compiled)


def difference(found: Any, wanted: Any) -> str:
  """Describes how two trees differ in names, shapes and dtypes.

  Args:
    found: tree of arrays or shapes, such as that of a file.
    wanted: expected tree of arrays or shapes.

  Returns:
    Text of at most about 20 lines; empty if there is no difference.
  """

  def describe(tree: Any) -> dict[str, str]:
    return {n: f'{x.dtype}{list(x.shape)}' for n, x in named_leaves(tree)}

  a, b = describe(found), describe(wanted)
  lines = [f'  only in the file: {n} {a[n]}' for n in sorted(a.keys() - b)]
  lines += [f'  only wanted: {n} {b[n]}' for n in sorted(b.keys() - a)]
  lines += [
    f'  {n}: found {a[n]}, wanted {b[n]}'
    for n in sorted(a.keys() & b)
    if a[n] != b[n]
  ]
  rest = len(lines) - 20
  return '\n'.join(
    lines[:20] + ([f'  ... and {rest} more'] if rest > 0 else [])
  )
