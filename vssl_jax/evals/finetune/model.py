"""A fine-tuned model: clips to logits, and predictions for a list of videos.

    model = finetuned.load('runs/finetune_ucf101')
    model.classes[int(model(clip).argmax())]  # uint8 [T, H, W, 3]
    model.export('exported')  # for `model.load`

`vssl_jax.load` of the same folder returns the encoder.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Num

from vssl_jax import encoder as encoder_lib
from vssl_jax import sharding, trees, weights
from vssl_jax.checkpoint import integrity, manager
from vssl_jax.evals import features, multi_view
from vssl_jax.models import classifier


@dataclasses.dataclass(frozen=True)
class Model:
  """A model with its parameters.

  Attributes:
    encoder: clips -> tokens.
    head: tokens -> logits.
    params: role -> tree, of `encoder` and `head`.
    classes: names by label.
    clip: the clips that it was trained on.
    saved: the checkpoint it was loaded from; None for exported weights.
  """

  encoder: Any
  head: Any
  params: Any
  classes: tuple[str, ...]
  clip: encoder_lib.Clip
  saved: integrity.Saved | None = None

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
    """Writes encoder, classifier, class names and channels.

    Args:
      folder: created if missing; `load` and `vssl_jax.load` read it.
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
    mesh: devices that the parameters of a run are sharded over; None for one
      device.
    overrides: see `sharding.shardings`.

  Raises:
    ValueError: the folder has no checkpoint, or no classifier.
  """
  if not encoder_lib.is_run(folder):
    return _of_weights(folder)
  source = encoder_lib.find(folder)
  if not source.classes:
    raise ValueError(
      f'{folder}: found a run of phase {source.phase.name!r}, which has no '
      "classes; wanted one of the job 'finetune'"
    )
  shapes = source.saved.shapes('params')
  if mesh is None:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda _: device, shapes)
  else:
    shardings = sharding.shardings(shapes, mesh, overrides)
  target = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )
  params = manager.restore(source.saved, target, 'params')
  trees.check_finite(params, folder)
  return Model(
    source.phase.encoder,
    source.phase.head,
    params,
    source.classes,
    source.clip,
    source.saved,
  )


def _of_weights(source: str) -> Model:
  """Loads the model of exported or published weights."""
  encoder = encoder_lib.load(source)
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
  """Returns the logits of clips, without mixing and dropout.

  Args:
    encoder: clips -> tokens.
    head: tokens -> logits.
    params: parameters of both, by role.
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
) -> multi_view.Predictions:
  """Returns a model's predictions for every view of every video.

  Args:
    model: a `Model` or a phase: anything with an `encoder` and a `head`.
    params: role -> tree.
    batches: batches of clips, in any order.
    views: number of views per video.
    mesh: devices that the clips are sharded over.

  Raises:
    ValueError: there are no labelled videos, or views are missing.
  """
  predictions = multi_view.Predictions(views)
  for batch in batches:
    rows = features.join(batch, 1)
    rows['video'] = rows['video'][:, 0]
    rows = features.put(rows, mesh)
    outputs = logits(model.encoder, model.head, params, rows.pop('video'))
    columns = {name: features.fetch(x) for name, x in rows.items()}
    predictions.add(
      features.fetch(jax.nn.softmax(outputs))[:, None],
      columns['label'],
      columns['index'],
      columns['view'],
      columns['weight'] * (columns['label'] >= 0),
    )
  if not predictions.total:
    raise ValueError('finetune: there are no labelled videos to count')
  return predictions
