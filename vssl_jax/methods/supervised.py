"""Training with labels: fine-tuning an encoder, or training it from scratch.

One phase. All tokens of the clip go through the encoder, their mean through a
layer norm and a linear layer of its own; mixed clips and soft targets are made
on the device. The recipe is that of VideoMAE and MVD, see `evals/finetune.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from vssl_jax import flops, mixing, rngs
from vssl_jax.methods import base
from vssl_jax.models import classifier, layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labels(base.Phase):
  """Classification of clips.

  Attributes:
    head: tokens -> logits.
    mix: how clips and their labels are mixed.
  """

  head: classifier.Classifier
  mix: mixing.Mix


@dataclasses.dataclass(frozen=True)
class Supervised(base.Method):
  """Cross-entropy of mixed clips and soft targets.

  Attributes:
    phase: the only one.
  """

  phase: Labels

  def phases(self) -> tuple[base.Phase, ...]:
    """Returns the only phase."""
    return (self.phase,)

  def init(
    self, rng: Array, video: base.Video, phase: base.Phase
  ) -> base.Params:
    """Returns random parameters; those of `init_from` replace the encoder's."""
    tokens = jnp.zeros((len(video), 1, phase.encoder.width))
    encoder, head = (rngs.stream(rng, f'init/{n}') for n in ('encoder', 'head'))
    return {
      'encoder': phase.encoder.init(encoder, video)['params'],
      'head': phase.head.init(head, tokens)['params'],
    }

  def loss(
    self,
    params: base.Params,
    teachers: Mapping[str, Any],
    batch: Mapping[str, Any],
    rng: rngs.Rng,
    phase: base.Phase,
  ) -> tuple[Float[Array, ''], base.Aux]:
    """Returns the mean cross-entropy of the clips with a label."""
    del teachers
    # The pixels of another video, which may be one that is held out.
    label = jnp.where(batch['substituted'], -1, batch['label'])
    height, width = batch['video'].shape[2:4]
    drawn = mixing.draw(phase.mix, rng.per_batch('mix'), height, width)
    target = mixing.targets(
      label, phase.head.classes, phase.mix.smoothing, drawn
    )
    tokens = phase.encoder.apply(
      {'params': params['encoder']},
      mixing.blend(batch['video'], drawn),
      deterministic=False,
      rngs={'dropout': rng.per_batch('dropout/encoder')},
    )
    logits = phase.head.apply(
      {'params': params['head']},
      tokens,
      deterministic=False,
      rngs={'dropout': rng.per_batch('dropout/head')},
    )
    weight = mixing.known(label, drawn)
    weight = weight / jnp.maximum(jnp.sum(weight), 1.0)
    each = optax.softmax_cross_entropy(logits, target)
    right = jnp.argmax(logits, axis=-1) == jnp.argmax(target, axis=-1)
    return jnp.sum(weight * each), base.Aux(
      {
        # Of the class with the larger share, of clips as they were mixed.
        'accuracy/mixed': jnp.sum(weight * right),
        'mix/share': drawn.share,
      }
    )

  def cost(self, phase: base.Phase, video: tuple[int, ...]) -> base.Cost:
    """Returns FLOPs per clip from the true token count."""
    grid = layers.grid_of((1, *video), phase.encoder.patch)
    tokens = grid[0] * grid[1] * grid[2]
    head = 3 * classifier.flops(phase.encoder.width, phase.head.classes)
    return base.Cost(
      flops.train(phase.encoder, grid) + head,
      activations=flops.activations(phase.encoder, tokens),
    )
