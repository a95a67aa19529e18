"""Loads and converts classifiers of fine-tuned models, ours and published ones.

They compute the same as `models.classifier.Classifier`: mean over tokens, layer
norm, linear layer. `VideoMAEForVideoClassification` of transformers differs in
the epsilon of the norm, 1e-5 instead of 1e-6.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vssl_jax import trees
from vssl_jax.weights import source as source_lib
from vssl_jax.weights.readers import tensors

# Names of the norm and of the linear layer, by family of layouts. The first
# pair is the one that is written.
NAMES = {
  'videomae': (('fc_norm', 'classifier'), ('fc_norm', 'head')),
  'hiera': (('norm', 'head.projection'),),
}
# Our names, in the order of the published ones in `_theirs`.
LEAVES = ('norm/scale', 'norm/bias', 'head/kernel', 'head/bias')


class Classifier(NamedTuple):
  """A trained classifier.

  Attributes:
    params: `norm` (scale, bias) and `head` (kernel [D, K], bias), float32.
    classes: class names by label.
  """

  params: Any
  classes: tuple[str, ...]


def to_tensors(classifier: Classifier, layout: str) -> dict[str, np.ndarray]:
  """Converts a classifier to tensors by their names in a layout."""
  if layout == source_lib.OURS:
    return {
      source_lib.CLASSIFIER + name: np.asarray(x)
      for name, x in trees.named_leaves(classifier.params)
    }
  (norm, linear), params = NAMES[layout][0], classifier.params
  return {
    f'{norm}.weight': np.asarray(params['norm']['scale']),
    f'{norm}.bias': np.asarray(params['norm']['bias']),
    f'{linear}.weight': np.ascontiguousarray(
      np.asarray(params['head']['kernel']).T
    ),
    f'{linear}.bias': np.asarray(params['head']['bias']),
  }


def labels(classes: Sequence[str]) -> dict[str, Any]:
  """Returns the class-name entries of `config.json`."""
  return {
    'id2label': {str(i): name for i, name in enumerate(classes)},
    'label2id': {name: i for i, name in enumerate(classes)},
  }


def load(source: str | os.PathLike[str]) -> Classifier | None:
  """Loads the classifier of a fine-tuned model.

  Args:
    source: see `source.open_source`.

  Returns:
    The classifier; None if the file has none.

  Raises:
    WeightsError: the source does not exist, shapes are inconsistent, or weights
      are integers, NaN or Inf. The message names the tensors.
  """
  opened = source_lib.open_source(source)
  keys = _ours(opened) if opened.layout is None else _theirs(opened)
  if keys is None:
    return None
  leaves = {
    name: np.asarray(opened.groups[group][key])
    for name, (group, key) in keys.items()
  }
  trees.check_finite(
    {f'{keys[name][1]} ({name})': x for name, x in leaves.items()},
    f'{source}: the classifier',
  )
  params = trees.nest(
    {name: x.astype(np.float32) for name, x in leaves.items()}
  )
  if opened.layout is not None:
    params['head']['kernel'] = params['head']['kernel'].T
  kernel, bias = params['head']['kernel'], params['head']['bias']
  width = params['norm']['scale'].shape
  if kernel.shape != (*width, *bias.shape) or params['norm']['bias'].shape != (
    width
  ):
    raise tensors.WeightsError(
      f'{source}: found a classifier of {kernel.shape} behind a norm of {width}'
    )
  return Classifier(params, _classes(opened.config, len(bias)))


def _ours(found: source_lib.Found) -> dict[str, tuple[str, str]] | None:
  """Returns our name -> (group, key); None if there is no classifier."""
  keys = {
    name.removeprefix(source_lib.CLASSIFIER): ('', name)
    for name in found.groups['']
    if name.startswith(source_lib.CLASSIFIER)
  }
  if keys and set(keys) != set(LEAVES):
    raise tensors.WeightsError(
      f'{found.source}: found a classifier of '
      f'{[tensors.short(name) for name in sorted(keys)[:6]]}, wanted {LEAVES}'
    )
  return keys or None


def _theirs(found: source_lib.Found) -> dict[str, tuple[str, str]] | None:
  """Same as `_ours` for published layouts."""
  groups = found.layout.parts['encoder'].groups
  for group in (g for g in groups if g in found.groups):
    for norm, linear in NAMES.get(found.layout.family, ()):
      keys = [f'{x}.{y}' for x in (norm, linear) for y in ('weight', 'bias')]
      if all(key in found.groups[group] for key in keys):
        return {
          name: (group, key) for name, key in zip(LEAVES, keys, strict=True)
        }
  return None


def _classes(config: Mapping[str, Any], count: int) -> tuple[str, ...]:
  """Returns class names by label; numbers if names are missing."""
  names = config.get('id2label') or {}
  classes = tuple(str(names.get(str(i), i)) for i in range(count))
  return classes if len(names) == count else tuple(map(str, range(count)))
