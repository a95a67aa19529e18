"""The classifier of a fine-tuned model, in our files and in published ones.

It is what `models.classifier.Classifier` computes: the mean over tokens, a
layer norm and a linear layer. `VideoMAEForVideoClassification` of transformers
has the same, with a norm whose epsilon is 1e-5 instead of 1e-6.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vssl_jax import trees
from vssl_jax.weights import read
from vssl_jax.weights import source as source_lib

# Names of the norm and of the linear layer, by family of files; the first ones
# are written.
NAMES = {
  'videomae': (('fc_norm', 'classifier'), ('fc_norm', 'head')),
  'hiera': (('norm', 'head.projection'),),
}


class Classifier(NamedTuple):
  """A trained classifier.

  Attributes:
    params: `norm` (scale, bias) and `head` (kernel [D, K], bias), float32.
    classes: names by label.
  """

  params: Any
  classes: tuple[str, ...]


def to_tensors(classifier: Classifier, layout: str) -> dict[str, np.ndarray]:
  """Returns a classifier's tensors by their names in a layout."""
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
  """Returns the entries of `config.json` on class names."""
  return {
    'id2label': {str(i): name for i, name in enumerate(classes)},
    'label2id': {name: i for i, name in enumerate(classes)},
  }


def load(source: str | os.PathLike[str]) -> Classifier | None:
  """Loads the classifier of a fine-tuned model; None where there is none.

  Args:
    source: see `source.open_source`.

  Raises:
    WeightsError: nothing there, or tensors that do not fit each other.
  """
  found = source_lib.open_source(source)
  params = _ours(found) if found.layout is None else _theirs(found)
  if params is None:
    return None
  kernel, bias = params['head']['kernel'], params['head']['bias']
  width = params['norm']['scale'].shape
  if kernel.shape != (*width, *bias.shape) or params['norm']['bias'].shape != (
    width
  ):
    raise read.WeightsError(
      f'{source}: found a classifier of {kernel.shape} behind a norm of {width}'
    )
  return Classifier(params, _classes(found.config, len(bias)))


def _ours(found: source_lib.Found) -> Any:
  named = {
    name.removeprefix(source_lib.CLASSIFIER): np.asarray(x, np.float32)
    for name, x in found.groups[''].items()
    if name.startswith(source_lib.CLASSIFIER)
  }
  return trees.nest(named) if named else None


def _theirs(found: source_lib.Found) -> Any:
  groups = found.layout.parts['encoder'].groups
  for group in (found.groups[g] for g in groups if g in found.groups):
    for norm, linear in NAMES.get(found.layout.family, ()):
      keys = [f'{x}.{y}' for x in (norm, linear) for y in ('weight', 'bias')]
      if all(key in group for key in keys):
        scale, shift, kernel, bias = (
          np.asarray(group[key], np.float32) for key in keys
        )
        return {
          'norm': {'scale': scale, 'bias': shift},
          'head': {'kernel': kernel.T, 'bias': bias},
        }
  return None


def _classes(config: Mapping[str, Any], count: int) -> tuple[str, ...]:
  """Returns class names by label; numbers where the file has no names."""
  names = config.get('id2label') or {}
  found = tuple(str(names.get(str(i), i)) for i in range(count))
  return found if len(names) == count else tuple(map(str, range(count)))
