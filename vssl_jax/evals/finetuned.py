"""A fine-tuned model: clips to logits, and the votes of a list of videos.

    model = finetuned.load('runs/finetune_ucf101')
    model.classes[int(model(clip).argmax())]  # uint8 [T, H, W, 3]

`vssl_jax.load` of the same folder gives the encoder alone.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Num

from vssl_jax import encoders, sharding
from vssl_jax.evals import features, votes
from vssl_jax.methods import base
from vssl_jax.train import checkpoint, manifests


@dataclasses.dataclass(frozen=True)
class Model:
  """A model with its parameters.

  Attributes:
    phase: its encoder and its head.
    params: role -> tree.
    classes: names by label.
    video: (T, H, W, C) of the clips it was trained on.
    saved: the checkpoint it came from.
  """

  phase: base.Phase
  params: Any
  classes: tuple[str, ...]
  video: tuple[int, int, int, int]
  saved: manifests.Saved

  def __call__(
    self, video: Num[Array | np.ndarray, '...']
  ) -> Float[Array, 'B K']:
    """Returns logits of clips.

    Args:
      video: uint8, or float in [0, 1]: [B, T, H, W, C], or one clip without B.
    """
    video = video[None] if video.ndim == 4 else video
    return logits(self.phase.encoder, self.phase.head, self.params, video)


def load(
  folder: str,
  mesh: jax.sharding.Mesh | None = None,
  overrides: Mapping[str, Any] | None = None,
) -> Model:
  """Loads the best checkpoint of a fine-tuning.

  Args:
    folder: its run folder.
    mesh: devices to split the parameters over; None for one device.
    overrides: of `sharding.shardings`.

  Raises:
    ValueError: nothing is saved there, or it is no fine-tuning.
  """
  if not encoders.is_run(folder):
    raise ValueError(f'{folder}: found no run.json, wanted a run folder')
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
  record = json.loads((found.folder / 'run.json').read_text())
  return Model(
    found.phase, params, tuple(record['classes']), found.video, found.saved
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
  phase: base.Phase,
  params: Any,
  batches: features.Batches,
  views: int,
  mesh: jax.sharding.Mesh,
) -> votes.Votes:
  """Lets a model vote on every view of every video.

  Args:
    phase: its encoder and its head.
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
    said = logits(phase.encoder, phase.head, params, rows.pop('video'))
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
