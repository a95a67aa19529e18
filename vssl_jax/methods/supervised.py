"""Supervised training: fine-tunes an encoder or trains it from scratch.

One phase. The encoder processes all tokens of the clip. The head is a layer
norm and a linear layer on the mean token. Mixed clips and soft targets are
computed on the device. The recipe is that of VideoMAE and MVD, see
`evals/finetune/job.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from vssl_jax import rngs
from vssl_jax.data import batch as batch_lib
from vssl_jax.methods import cost as cost_lib
from vssl_jax.methods import mixup
from vssl_jax.methods import phase as phase_lib
from vssl_jax.models import classifier


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupervisedPhase(phase_lib.Phase):
  """A phase of clip classification.

  Attributes:
    head: tokens -> logits.
    mix: mixing options of clips and labels.
  """

  head: classifier.Classifier
  mix: mixup.Mix

  def init(self, key: Array, video: phase_lib.Video) -> phase_lib.Params:
    """Returns random parameters; `init_from` may replace the encoder's."""
    tokens = jnp.zeros((len(video), 1, self.encoder.width))
    encoder_key, head_key = (
      rngs.stream(key, f'init/{n}') for n in ('encoder', 'head')
    )
    return {
      'encoder': self.encoder.init(encoder_key, video)['params'],
      'head': self.head.init(head_key, tokens)['params'],
    }

  def loss(
    self,
    params: phase_lib.Params,
    teachers: Mapping[str, Any],
    batch: batch_lib.Batch,
    rng: rngs.Rng,
  ) -> tuple[Float[Array, ''], phase_lib.Aux]:
    """Returns the mean cross-entropy over clips with a known label."""
    del teachers
    # A substitute clip shows another video, which may be a held-out one.
    label = jnp.where(batch.substituted, -1, batch.label)
    height, width = batch.video.shape[2:4]
    drawn = mixup.draw(self.mix, rng.per_batch('mix'), height, width)
    target = mixup.targets(label, self.head.classes, self.mix.smoothing, drawn)
    tokens = self.encoder.apply(
      {'params': params['encoder']},
      mixup.blend(batch.video, drawn),
      deterministic=False,
      rngs={'dropout': rng.per_batch('dropout/encoder')},
    )
    logits = self.head.apply(
      {'params': params['head']},
      tokens,
      deterministic=False,
      rngs={'dropout': rng.per_batch('dropout/head')},
    )
    weight = mixup.known(label, drawn)
    weight = weight / jnp.maximum(jnp.sum(weight), 1.0)
    cross_entropy = optax.softmax_cross_entropy(logits, target)
    correct = jnp.argmax(logits, axis=-1) == jnp.argmax(target, axis=-1)
    return jnp.sum(weight * cross_entropy), phase_lib.Aux(
      {
        # Accuracy on mixed clips, for the class with the larger share.
        'accuracy/mixed': jnp.sum(weight * correct),
        'mix/share': drawn.share,
      }
    )

  def cost(self, video: tuple[int, ...]) -> cost_lib.Cost:
    """Returns FLOPs per clip from the actual token counts."""
    return cost_lib.supervised(self, video)
