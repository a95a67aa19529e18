"""LayerLock: a video MAE whose layers freeze in order of depth.

Phase `pixels` predicts the pixels of a clip from 5 % of its tokens. At the
start of phase `lock_k` the embedding and the first k blocks are frozen, and
the target becomes their own output on the whole clip (arXiv 2509.10156). The
target cannot collapse, as nothing that makes it moves. With other knobs the
same loss is a plain MAE, an MAE with frozen layers, and the control that
predicts latents without freezing: see `methods/README.md`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vssl_jax import flops, losses, mask_specs, masking, rngs
from vssl_jax.methods import base
from vssl_jax.models import layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lock(base.Phase):
  """A stretch of steps with one lock depth.

  Attributes:
    lock_depth: the latent target is the output of so many blocks.
    frozen_depth: blocks that `frozen` names: as many, or none in the control.
    terms: what the loss is made of, `pixel` and `latent`.
  """

  lock_depth: int
  frozen_depth: int
  terms: tuple[Literal['pixel', 'latent'], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerLock(base.Method):
  """The loss, and the phases that lock one layer after the other.

  Attributes:
    plan: the phases.
    mask: what is visible.
    pixel_head: latents -> pixels of their patch.
    latent_head: latents -> a locked layer's output.
    latent_heads: names of the heads of layer 1, 2, ...; one name for all
      layers where a single head is kept.
    pixel_norm: of pixel targets, `losses.pixel_targets`.
    target_norm: of latent targets, `losses.TARGET_NORMS`.
    targets: `single` (the newest locked layer) or `all` (every locked one).
    positions: where the latent loss is taken: `all`, the `masked` ones or a
      `subset` of those.
    subset: share of all positions in the subset.
    subset_context: tokens that the target is made of: the `subset` alone,
      which is nearly free, or the `full` clip.
    latent_weight: of the latent term beside a pixel term: `constant` 1, or
      `cosine`, (1 - cos(pi * progress)) / 2.
  """

  plan: tuple[Lock, ...]
  mask: mask_specs.Spec
  pixel_head: nn.Module
  latent_head: nn.Module
  latent_heads: tuple[str, ...] = ('latent_head',)
  pixel_norm: str = 'patch_channel'
  target_norm: str = 'ln'
  targets: str = 'single'
  positions: str = 'all'
  subset: float = 0.05
  subset_context: str = 'subset'
  latent_weight: str = 'constant'

  def phases(self) -> tuple[base.Phase, ...]:
    """Returns the plan."""
    return self.plan

  def init(
    self, rng: Array, video: base.Video, phase: base.Phase
  ) -> base.Params:
    """Returns random parameters: encoder, latents and heads."""
    encoder = phase.encoder
    tokens = jnp.zeros((1, 1, encoder.width))
    t, h, w = layers.grid_of(video.shape, encoder.patch)

    def key(role: str) -> Array:
      return rngs.stream(rng, f'init/{role}')

    latents = nn.initializers.normal(0.02)(
      key('latents'), (t * h * w, encoder.width), jnp.float32
    )
    heads = {'pixel_head': self.pixel_head}
    heads |= dict.fromkeys(self.latent_heads, self.latent_head)
    return {
      'encoder': encoder.init(key('encoder'), video)['params'],
      'latents': {'tokens': latents},
      **{
        name: head.init(key(name), tokens)['params']
        for name, head in heads.items()
      },
    }

  def loss(
    self,
    params: base.Params,
    teachers: Mapping[str, Any],
    batch: Mapping[str, Any],
    rng: rngs.Rng,
    phase: base.Phase,
  ) -> tuple[Float[Array, ''], base.Aux]:
    """Returns the mean squared error to pixels, or to locked layers."""
    del teachers  # the target is a part of the same network
    video = batch['video']
    grid = layers.grid_of(video.shape, phase.encoder.patch)
    mask, metrics = self.mask.draw(rng, batch, grid)
    metrics = {f'mask/{name}': x for name, x in metrics.items()}
    decoded = self._decode(params, video, mask, phase, rng)
    total = jnp.zeros(())
    if 'pixel' in phase.terms:
      target = losses.pixel_targets(
        layers.to_unit(video), phase.encoder.patch, self.pixel_norm
      )
      predicted = self._head(params, 'pixel_head', decoded)
      metrics['loss/pixel'] = losses.mse(predicted, target)
      total += metrics['loss/pixel']
    if 'latent' in phase.terms:
      chosen = self._chosen(rng, batch, mask, decoded.shape[1])
      if chosen is not None:
        decoded = masking.gather(decoded, chosen)
      terms = []
      for name, target in self._targets(params, video, chosen, phase):
        predicted = self._head(params, name, decoded)
        normed = losses.TARGET_NORMS[self.target_norm](target)
        terms.append(losses.mse(predicted, normed))
      metrics['loss/latent'] = jnp.mean(jnp.stack(terms))
      metrics |= _spread(target)  # of the newest layer
      total += self._weight(batch, phase) * metrics['loss/latent']
    metrics['prediction/std'] = jnp.std(predicted)
    metrics['lock_depth'] = jnp.float32(phase.lock_depth)
    return total, base.Aux(metrics)

  def _decode(
    self,
    params: base.Params,
    video: base.Video,
    mask: masking.Mask,
    phase: base.Phase,
    rng: rngs.Rng | None = None,
  ) -> Float[Array, 'B N D']:
    """Returns what the decoding blocks make of every position's latent."""
    return phase.encoder.apply(
      {'params': params['encoder']},
      video,
      mask.visible,
      latents=params['latents']['tokens'],
      deterministic=rng is None,
      rngs=None if rng is None else {'dropout': rng.per_batch('dropout')},
    )

  def _head(
    self, params: base.Params, name: str, tokens: Float[Array, 'B P D']
  ) -> Float[Array, 'B P out']:
    head = self.pixel_head if name == 'pixel_head' else self.latent_head
    return head.apply({'params': params[name]}, tokens).astype(jnp.float32)

  def _chosen(
    self,
    rng: rngs.Rng,
    batch: Mapping[str, Any],
    mask: masking.Mask,
    tokens: int,
  ) -> Int[Array, 'B P'] | None:
    """Returns the positions of the latent loss; None for all of them."""
    if self.positions == 'all':
      return None
    if self.positions == 'masked':
      return mask.masked
    keys = rng.per_example('positions', batch)
    return masking.subset(keys, mask.masked, self._subset(tokens))

  def _subset(self, tokens: int) -> int:
    return max(int(self.subset * tokens + 1e-9), 1)

  def _targets(
    self,
    params: base.Params,
    video: base.Video,
    chosen: Int[Array, 'B P'] | None,
    phase: base.Phase,
  ) -> list[tuple[str, Float[Array, 'B P D']]]:
    """Returns heads and the layers they predict, from the whole clip."""
    alone = self._alone()
    out = phase.encoder.apply(
      {'params': params['encoder']},
      video,
      chosen if alone else None,
      upto=phase.lock_depth,
      features=True,
    )
    newest = phase.lock_depth
    depths = [newest] if self.targets == 'single' else range(1, newest + 1)
    wanted = []
    for k in depths:
      target = jax.lax.stop_gradient(out[k])
      if chosen is not None and not alone:
        target = masking.gather(target, chosen)
      name = self.latent_heads[min(k, len(self.latent_heads)) - 1]
      wanted.append((name, target))
    return wanted

  def _alone(self) -> bool:
    """Returns whether the target is made of the subset's tokens alone."""
    return self.positions == 'subset' and self.subset_context == 'subset'

  def _weight(self, batch: Mapping[str, Any], phase: base.Phase) -> Array:
    if 'pixel' not in phase.terms or self.latent_weight == 'constant':
      return jnp.ones(())
    return (1 - jnp.cos(jnp.pi * jnp.asarray(batch['progress']))) / 2

  def reconstruct(
    self,
    params: base.Params,
    batch: Mapping[str, Any],
    rng: rngs.Rng,
    phase: base.Phase,
  ) -> Mapping[str, base.Reconstruction]:
    """Returns predicted pixels of the masked patches, in a pixel phase."""
    if 'pixel' not in phase.terms:
      return {}
    video = batch['video']
    grid = layers.grid_of(video.shape, phase.encoder.patch)
    mask, _ = self.mask.draw(rng, batch, grid)
    decoded = self._decode(params, video, mask, phase)
    predicted = self._head(
      params, 'pixel_head', masking.gather(decoded, mask.masked)
    )
    return {
      self.mask.name: base.Reconstruction(mask, predicted, self.pixel_norm)
    }

  def cost(self, phase: base.Phase, video: tuple[int, ...]) -> base.Cost:
    """Returns FLOPs per clip; the target's pass counts as frozen."""
    encoder, k = phase.encoder, phase.lock_depth
    grid = layers.grid_of((1, *video), encoder.patch)
    visible, masked = self.mask.counts(grid)
    tokens = math.prod(grid)
    places = {
      'all': tokens,
      'masked': masked,
      'subset': self._subset(tokens),
    }[self.positions]
    below = flops.block(encoder, visible)
    joint = encoder.decoder_blocks * flops.block(encoder, visible + tokens)
    heads = 0.0
    if 'pixel' in phase.terms:
      heads += 2.0 * tokens * encoder.width * self.pixel_head.features
    if 'latent' in phase.terms:
      count = 1 if self.targets == 'single' else k
      heads += 2.0 * count * places * encoder.width**2
    embed = flops.embedding(encoder, visible)
    free = encoder.encoder_depth - phase.frozen_depth
    forward = embed + encoder.encoder_depth * below + joint + heads
    backward = 2 * (free * below + joint + heads)
    if not phase.frozen_depth:
      backward += embed  # of its weights; nobody needs that of the pixels
    target = 0.0
    if 'latent' in phase.terms:
      seen = places if self._alone() else tokens
      target = flops.embedding(encoder, seen) + k * flops.block(encoder, seen)
    kept = flops.activations(encoder, visible, free)
    kept += flops.activations(encoder, visible + tokens, encoder.decoder_blocks)
    return base.Cost(forward + backward, target, kept)


def _spread(target: Float[Array, 'B P D']) -> dict[str, Array]:
  """Returns how much a target varies, before it is normalised."""
  target = target.astype(jnp.float32)
  return {
    'target/std': jnp.std(target),
    'target/token_variance': jnp.mean(jnp.var(target, axis=1)),
  }
