"""A fine-tuned model: clips to logits, and the votes of a list of videos.

    model = finetuned.load('runs/finetune_ucf101')
    model.classes[int(model(clip).argmax())]  # uint8 [T, H, W, 3]
    model.export('exported')  # `finetuned.load` reads it, too

`vssl_jax.load` of the same folder gives the encoder.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Num

from vssl_jax import encoders, sharding, trees, weights
from vssl_jax.evals import features, votes
from vssl_jax.models import classifier
from vssl_jax.train import checkpoint, manifests


@dataclasses.dataclass(frozen=True)
class Model:
  """A model with its parameters.

  Attributes:
    encoder: clips -> tokens.
    head: tokens -> logits.
    params: role -> tree, of `encoder` and `head`.
    classes: names by label.
    clip: that it was trained on.
    saved: the checkpoint it came from; None for exported weights.
  """

  encoder: Any
  head: Any
  params: Any
  classes: tuple[str, ...]
  clip: encoders.Clip
  saved: manifests.Saved | None = None

  @property
  def video(self) -> tuple[int, int, int, int]:
    """(T, H, W, C) of the clips that it was trained on."""
    return self.clip.video

  def __call__(
    self, video: Num[Array | np.ndarray, '...']
  ) -> Float[Array, 'B K']:
    """Returns logits of clips.

    Args:
      video: uint8, or float in [0, 1]: [B, T, H, W, C], or one clip without B.
    """
    video = video[None] if video.ndim == 4 else video
    return logits(self.encoder, self.head, self.params, video)

  def export(self, folder: str | os.PathLike[str], layout: str = 'auto') -> str:
    """Writes encoder, classifier, class names and colours.

    Args:
      folder: made if need be; `load` and `vssl_jax.load` read it.
      layout: see `weights.export`.

    Returns:
      The layout.

    Raises:
      WeightsError: the layout cannot express this model.
    """
    return weights.export(
      self.encoder,
      self.params['encoder'],
      folder,
      video=self.clip.video,
      timing=(self.clip.stride, self.clip.fps),
      layout=layout,
      classifier=weights.Classifier(self.params['head'], self.classes),
    )


def load(
  folder: str,
  mesh: jax.sharding.Mesh | None = None,
  overrides: Mapping[str, Any] | None = None,
) -> Model:
  """Loads a fine-tuned model: the best checkpoint of a run, or weights.

  Args:
    folder: a run folder, or weights with a classifier, see `vssl_jax.load`.
    mesh: devices to split the parameters of a run over; None for one device.
    overrides: of `sharding.shardings`.

  Raises:
    ValueError: nothing is saved there, or it has no classifier.
  """
  if not encoders.is_run(folder):
    return _of_weights(folder)
  found = encoders.find(folder)
  if not hasattr(found.phase, 'head'):
    raise ValueError(
      f'{folder}: found a run of phase {found.phase.name!r}, which has no '
      "classes; wanted one of the job 'finetune'"
    )
  shapes = found.saved.shapes('params')
  if mesh is None:
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    at = jax.tree.map(lambda _: place, shapes)
  else:
    at = sharding.shardings(shapes, mesh, overrides)
  target = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, at
  )
  params = checkpoint.restore(found.saved, target, 'params')
  trees.check_finite(params, folder)
  return Model(
    found.phase.encoder,
    found.phase.head,
    params,
    found.classes,
    found.clip,
    found.saved,
  )


def _of_weights(source: str) -> Model:
  """Returns the model of exported or published weights."""
  encoder = encoders.load(source)
  if encoder.classifier is None:
    raise ValueError(
      f'{source}: found an encoder without a classifier, wanted the run folder '
      'of a fine-tuning (run.json), or weights that were exported from one'
    )
  params, classes = encoder.classifier
  return Model(
    encoder.module,
    classifier.Classifier(len(classes)),
    {'encoder': encoder.params, 'head': params},
    classes,
    encoder.clip,
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def logits(
  encoder: Any, head: Any, params: Any, video: Num[Array, 'B T H W C']
) -> Float[Array, 'B K']:
  """Returns what a model says of clips: no mixing, no dropout.

  Args:
    encoder: clips -> tokens.
    head: tokens -> logits.
    params: of both, by role.
    video: uint8, or float in [0, 1].
  """
  tokens = encoder.apply({'params': params['encoder']}, video)
  return head.apply({'params': params['head']}, tokens)


def count(
  model: Any,
  params: Any,
  batches: features.Batches,
  views: int,
  mesh: jax.sharding.Mesh,
) -> votes.Votes:
  """Lets a model vote on every view of every video.

  Args:
    model: a `Model` or a phase: anything with an `encoder` and a `head`.
    params: role -> tree.
    batches: of clips, in any order.
    views: of each video.
    mesh: its devices split the clips.

  Raises:
    ValueError: there are no labelled videos, or views are missing.
  """
  found = votes.Votes(views)
  for batch in batches:
    rows = features.join(batch, 1)
    rows['video'] = rows['video'][:, 0]
    rows = features.put(rows, mesh)
    said = logits(model.encoder, model.head, params, rows.pop('video'))
    got = {name: features.fetch(x) for name, x in rows.items()}
    found.add(
      features.fetch(jax.nn.softmax(said))[:, None],
      got['label'],
      got['index'],
      got['view'],
      got['weight'] * (got['label'] >= 0),
    )
  if not found.total:
    raise ValueError('finetune: there are no labelled videos to count')
  return found
