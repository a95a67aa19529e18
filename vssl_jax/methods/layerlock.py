"""LayerLock: a video MAE whose layers are frozen progressively, by depth.

Phase `pixels` predicts the pixels of a clip from 5 % of its tokens. At the
start of phase `lock_k` the embedding and the first k blocks are frozen, and
their output on the whole clip becomes the target (arXiv 2509.10156). The
target cannot collapse, because the layers that compute it are frozen. Other
options give a plain MAE, an MAE with frozen layers, and a control that predicts
latents without freezing: see `methods/README.md`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vssl_jax import flops, losses, rngs
from vssl_jax.masks import sampling, specs, tubelets
from vssl_jax.methods import phase as phase_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lock(phase_lib.Phase):
  """A phase with one lock depth.

  Attributes:
    lock_depth: number of blocks whose output is the latent target.
    frozen_depth: number of blocks that `frozen` matches: `lock_depth`, or 0 in
      the control.
    terms: terms of the loss, `pixel` and `latent`.
  """

  lock_depth: int
  frozen_depth: int
  terms: tuple[Literal['pixel', 'latent'], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerLock(phase_lib.Method):
  """The LayerLock loss and the phases that lock layer after layer.

  Attributes:
    plan: the phases, in order.
    mask: the mask of every step.
    pixel_head: latents -> pixels of their patch.
    latent_head: latents -> output of a locked layer.
    latent_heads: names of the heads of layers 1, 2 and so on; one name if all
      layers share a head.
    pixel_norm: normalisation of pixel targets, see `losses.pixel_targets`.
    target_norm: normalisation of latent targets, one of `losses.TARGET_NORMS`.
    targets: `single` (the newest locked layer) or `all` (every locked layer).
    positions: positions of the latent loss: `all`, all `masked` ones or a
      `subset` of the masked ones.
    subset: size of the subset as a fraction of all positions.
    subset_context: tokens that the target is computed from: the `subset` alone,
      which costs almost nothing, or the `full` clip.
    latent_weight: weight of the latent term if there is also a pixel term:
      `constant` 1, or `cosine`, (1 - cos(pi * progress)) / 2.
  """

  plan: tuple[Lock, ...]
  mask: specs.Spec
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

  def phases(self) -> tuple[phase_lib.Phase, ...]:
    """Returns the phases, in order."""
    return self.plan

  def init(
    self, rng: Array, video: phase_lib.Video, phase: phase_lib.Phase
  ) -> phase_lib.Params:
    """Returns random parameters of the encoder, the latents and the heads."""
    encoder = phase.encoder
    tokens = jnp.zeros((1, 1, encoder.width))
    t, h, w = tubelets.grid_of(video.shape, encoder.patch)

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
    params: phase_lib.Params,
    teachers: Mapping[str, Any],
    batch: Mapping[str, Any],
    rng: rngs.Rng,
    phase: phase_lib.Phase,
  ) -> tuple[Float[Array, ''], phase_lib.Aux]:
    """Returns the mean squared error to pixels, to locked layers, or both."""
    del teachers  # targets come from the same network
    video = batch['video']
    grid = tubelets.grid_of(video.shape, phase.encoder.patch)
    mask, metrics = self.mask.draw(rng, batch, grid)
    metrics = {f'mask/{name}': x for name, x in metrics.items()}
    decoded = self._decode(params, video, mask, phase, rng)
    total = jnp.zeros(())
    if 'pixel' in phase.terms:
      target = losses.pixel_targets(
        tubelets.to_unit(video), phase.encoder.patch, self.pixel_norm
      )
      predicted = self._head(params, 'pixel_head', decoded)
      metrics['loss/pixel'] = losses.mse(predicted, target)
      total += metrics['loss/pixel']
    if 'latent' in phase.terms:
      positions = self._chosen(rng, batch, mask, decoded.shape[1])
      if positions is not None:
        decoded = sampling.gather(decoded, positions)
      terms = []
      for name, target in self._targets(params, video, positions, phase):
        predicted = self._head(params, name, decoded)
        normed = losses.TARGET_NORMS[self.target_norm](target)
        terms.append(losses.mse(predicted, normed))
      metrics['loss/latent'] = jnp.mean(jnp.stack(terms))
      metrics |= _spread(target)  # of the newest layer
      total += self._weight(batch, phase) * metrics['loss/latent']
    metrics['prediction/std'] = jnp.std(predicted)
    metrics['lock_depth'] = jnp.float32(phase.lock_depth)
    return total, phase_lib.Aux(metrics)

  def _decode(
    self,
    params: phase_lib.Params,
    video: phase_lib.Video,
    mask: sampling.Mask,
    phase: phase_lib.Phase,
    rng: rngs.Rng | None = None,
  ) -> Float[Array, 'B N D']:
    """Returns the output of the decoder blocks at every position."""
    return phase.encoder.apply(
      {'params': params['encoder']},
      video,
      mask.visible,
      latents=params['latents']['tokens'],
      deterministic=rng is None,
      rngs=None if rng is None else {'dropout': rng.per_batch('dropout')},
    )

  def _head(
    self, params: phase_lib.Params, name: str, tokens: Float[Array, 'B P D']
  ) -> Float[Array, 'B P out']:
    head = self.pixel_head if name == 'pixel_head' else self.latent_head
    return head.apply({'params': params[name]}, tokens).astype(jnp.float32)

  def _chosen(
    self,
    rng: rngs.Rng,
    batch: Mapping[str, Any],
    mask: sampling.Mask,
    tokens: int,
  ) -> Int[Array, 'B P'] | None:
    """Returns the positions of the latent loss; None for all of them."""
    if self.positions == 'all':
      return None
    if self.positions == 'masked':
      return mask.masked
    keys = rng.per_example('positions', batch)
    return sampling.subset(keys, mask.masked, self._subset(tokens))

  def _subset(self, tokens: int) -> int:
    return max(int(self.subset * tokens + 1e-9), 1)

  def _targets(
    self,
    params: phase_lib.Params,
    video: phase_lib.Video,
    chosen: Int[Array, 'B P'] | None,
    phase: phase_lib.Phase,
  ) -> list[tuple[str, Float[Array, 'B P D']]]:
    """Returns (name of a head, target) pairs, without gradients."""
    subset_only = self._alone()
    features = phase.encoder.apply(
      {'params': params['encoder']},
      video,
      chosen if subset_only else None,
      upto=phase.lock_depth,
      features=True,
    )
    newest = phase.lock_depth
    depths = [newest] if self.targets == 'single' else range(1, newest + 1)
    targets = []
    for k in depths:
      target = jax.lax.stop_gradient(features[k])
      if chosen is not None and not subset_only:
        target = sampling.gather(target, chosen)
      name = self.latent_heads[min(k, len(self.latent_heads)) - 1]
      targets.append((name, target))
    return targets

  def _alone(self) -> bool:
    """Returns whether targets are computed from the subset's tokens alone."""
    return self.positions == 'subset' and self.subset_context == 'subset'

  def _weight(self, batch: Mapping[str, Any], phase: phase_lib.Phase) -> Array:
    if 'pixel' not in phase.terms or self.latent_weight == 'constant':
      return jnp.ones(())
    return (1 - jnp.cos(jnp.pi * jnp.asarray(batch['progress']))) / 2

  def reconstruct(
    self,
    params: phase_lib.Params,
    batch: Mapping[str, Any],
    rng: rngs.Rng,
    phase: phase_lib.Phase,
  ) -> Mapping[str, phase_lib.Reconstruction]:
    """Returns predicted pixels of the masked patches, in a pixel phase."""
    if 'pixel' not in phase.terms:
      return {}
    video = batch['video']
    grid = tubelets.grid_of(video.shape, phase.encoder.patch)
    mask, _ = self.mask.draw(rng, batch, grid)
    decoded = self._decode(params, video, mask, phase)
    predicted = self._head(
      params, 'pixel_head', sampling.gather(decoded, mask.masked)
    )
    return {
      self.mask.name: phase_lib.Reconstruction(mask, predicted, self.pixel_norm)
    }

  def cost(
    self, phase: phase_lib.Phase, video: tuple[int, ...]
  ) -> phase_lib.Cost:
    """Returns FLOPs per clip; the pass of the target counts as frozen."""
    encoder, k = phase.encoder, phase.lock_depth
    grid = tubelets.grid_of((1, *video), encoder.patch)
    visible, masked = self.mask.counts(grid)
    tokens = math.prod(grid)
    num_positions = {
      'all': tokens,
      'masked': masked,
      'subset': self._subset(tokens),
    }[self.positions]
    block_flops = flops.block(encoder, visible)
    decoder_flops = encoder.decoder_blocks * flops.block(
      encoder, visible + tokens
    )
    head_flops = 0.0
    if 'pixel' in phase.terms:
      head_flops += 2.0 * tokens * encoder.width * self.pixel_head.features
    if 'latent' in phase.terms:
      count = 1 if self.targets == 'single' else k
      head_flops += 2.0 * count * num_positions * encoder.width**2
    embed_flops = flops.embedding(encoder, visible)
    trained_blocks = encoder.encoder_depth - phase.frozen_depth
    forward = (
      embed_flops
      + encoder.encoder_depth * block_flops
      + decoder_flops
      + head_flops
    )
    backward = 2 * (trained_blocks * block_flops + decoder_flops + head_flops)
    if not phase.frozen_depth:
      backward += embed_flops  # gradient of weights; pixels need none
    target = 0.0
    if 'latent' in phase.terms:
      target_tokens = num_positions if self._alone() else tokens
      target = flops.embedding(encoder, target_tokens) + k * flops.block(
        encoder, target_tokens
      )
    activations = flops.activations(encoder, visible, trained_blocks)
    activations += flops.activations(
      encoder, visible + tokens, encoder.decoder_blocks
    )
    return phase_lib.Cost(forward + backward, target, activations)


def _spread(target: Float[Array, 'B P D']) -> dict[str, Array]:
  """Returns the standard deviation and token variance of a raw target."""
  target = target.astype(jnp.float32)
  return {
    'target/std': jnp.std(target),
    'target/token_variance': jnp.mean(jnp.var(target, axis=1)),
  }
