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

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vssl_jax import losses, rngs
from vssl_jax.data import batch as batch_lib
from vssl_jax.masks import sampling, tubelets
from vssl_jax.methods import cost as cost_lib
from vssl_jax.methods import phase as phase_lib
from vssl_jax.models import Module


@dataclasses.dataclass(frozen=True, kw_only=True)
class LockPhase(phase_lib.Phase):
  """A phase with one lock depth.

  Attributes:
    lock_depth: number of blocks whose output is the latent target.
    frozen_depth: number of blocks that `frozen` matches: `lock_depth`, or 0 in
      the control.
    terms: terms of the loss, `pixel` and `latent`.
    pixel_head: latents -> pixels of their patch.
    latent_head: latents -> output of a locked layer.
    latent_heads: names of the heads of layers 1, 2 and so on; one name if all
      layers share a head.
    pixel_norm: normalisation of pixel targets, see `losses.pixel_targets`.
    target_norm: normalisation of latent targets, one of `losses.TARGET_NORMS`.
    target_layers: `newest` (the newest locked layer) or `all` locked layers.
    positions: positions of the latent loss: `all`, all `masked` ones or a
      `subset` of the masked ones.
    subset: size of the subset as a fraction of all positions.
    subset_context: tokens that the target is computed from: the `subset` alone,
      which costs almost nothing, or the `full` clip.
    latent_weight: weight of the latent term if there is also a pixel term:
      `constant` 1, or `cosine`, (1 - cos(pi * progress)) / 2.
  """

  lock_depth: int
  frozen_depth: int
  terms: tuple[Literal['pixel', 'latent'], ...]
  pixel_head: Module
  latent_head: Module
  latent_heads: tuple[str, ...] = ('latent_head',)
  pixel_norm: str = 'patch_channel'
  target_norm: str = 'ln'
  target_layers: Literal['newest', 'all'] = 'newest'
  positions: str = 'all'
  subset: float = 0.05
  subset_context: str = 'subset'
  latent_weight: str = 'constant'

  def init(self, key: Array, video: phase_lib.Video) -> phase_lib.Params:
    """Returns random parameters of the encoder, the latents and the heads."""
    encoder = self.encoder
    tokens = jnp.zeros((1, 1, encoder.width))
    t, h, w = tubelets.grid_of(video.shape, encoder.patch)

    def part_key(role: str) -> Array:
      return rngs.stream(key, f'init/{role}')

    latents = jax.nn.initializers.normal(0.02)(
      part_key('latents'), (t * h * w, encoder.width), jnp.float32
    )
    heads = {'pixel_head': self.pixel_head}
    heads |= dict.fromkeys(self.latent_heads, self.latent_head)
    return {
      'encoder': encoder.init(part_key('encoder'), video)['params'],
      'latents': {'tokens': latents},
      **{
        name: head.init(part_key(name), tokens)['params']
        for name, head in heads.items()
      },
    }

  def loss(
    self,
    params: phase_lib.Params,
    teachers: Mapping[str, Any],
    batch: batch_lib.Batch,
    rng: rngs.Rng,
  ) -> tuple[Float[Array, ''], phase_lib.Aux]:
    """Returns the mean squared error to pixels, to locked layers, or both."""
    del teachers  # targets come from the same network
    video = batch.video
    grid = tubelets.grid_of(video.shape, self.encoder.patch)
    mask, metrics = self.masks[0].draw(rng, batch, grid)
    metrics = {f'mask/{name}': x for name, x in metrics.items()}
    decoded = self._decode(params, video, mask, rng)
    total = jnp.zeros(())
    if 'pixel' in self.terms:
      target = losses.pixel_targets(
        tubelets.to_unit(video), self.encoder.patch, self.pixel_norm
      )
      predicted = self._head(params, 'pixel_head', decoded)
      metrics['loss/pixel'] = losses.mse(predicted, target)
      total += metrics['loss/pixel']
    if 'latent' in self.terms:
      positions = self._chosen(rng, batch, mask, decoded.shape[1])
      if positions is not None:
        decoded = sampling.gather(decoded, positions)
      terms = []
      for name, target in self._latent_targets(params, video, positions):
        predicted = self._head(params, name, decoded)
        normed = losses.TARGET_NORMS[self.target_norm](target)
        terms.append(losses.mse(predicted, normed))
      metrics['loss/latent'] = jnp.mean(jnp.stack(terms))
      metrics |= _spread(target)  # of the newest layer
      total += self._weight(batch) * metrics['loss/latent']
    metrics['prediction/std'] = jnp.std(predicted)
    metrics['lock_depth'] = jnp.float32(self.lock_depth)
    return total, phase_lib.Aux(metrics)

  def _decode(
    self,
    params: phase_lib.Params,
    video: phase_lib.Video,
    mask: sampling.Mask,
    rng: rngs.Rng | None = None,
  ) -> Float[Array, 'B N D']:
    """Returns the output of the decoder blocks at every position."""
    return self.encoder.apply(
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
    batch: batch_lib.Batch,
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

  def num_positions(self, grid: tubelets.Grid) -> int:
    """Returns the number of positions of the latent loss."""
    if self.positions == 'subset':
      return self._subset(math.prod(grid))
    return (
      math.prod(grid)
      if self.positions == 'all'
      else (self.masks[0].counts(grid)[1])
    )

  def _subset(self, tokens: int) -> int:
    return max(int(self.subset * tokens + 1e-9), 1)

  def _latent_targets(
    self,
    params: phase_lib.Params,
    video: phase_lib.Video,
    chosen: Int[Array, 'B P'] | None,
  ) -> list[tuple[str, Float[Array, 'B P D']]]:
    """Returns (name of a head, target) pairs, without gradients."""
    subset_only = self.subset_only
    features = self.encoder.apply(
      {'params': params['encoder']},
      video,
      chosen if subset_only else None,
      upto=self.lock_depth,
      features=True,
    )
    newest = self.lock_depth
    depths = (
      [newest] if self.target_layers == 'newest' else range(1, newest + 1)
    )
    targets = []
    for k in depths:
      target = jax.lax.stop_gradient(features[k])
      if chosen is not None and not subset_only:
        target = sampling.gather(target, chosen)
      name = self.latent_heads[min(k, len(self.latent_heads)) - 1]
      targets.append((name, target))
    return targets

  @property
  def subset_only(self) -> bool:
    """Returns whether targets are computed from the subset's tokens alone."""
    return self.positions == 'subset' and self.subset_context == 'subset'

  def _weight(self, batch: batch_lib.Batch) -> Array:
    if 'pixel' not in self.terms or self.latent_weight == 'constant':
      return jnp.ones(())
    return (1 - jnp.cos(jnp.pi * jnp.asarray(batch.progress))) / 2

  def reconstruct(
    self,
    params: phase_lib.Params,
    batch: batch_lib.Batch,
    rng: rngs.Rng,
  ) -> Mapping[str, phase_lib.Reconstruction]:
    """Returns predicted pixels of the masked patches, in a pixel phase."""
    if 'pixel' not in self.terms:
      return {}
    video = batch.video
    grid = tubelets.grid_of(video.shape, self.encoder.patch)
    mask, _ = self.masks[0].draw(rng, batch, grid)
    decoded = self._decode(params, video, mask)
    predicted = self._head(
      params, 'pixel_head', sampling.gather(decoded, mask.masked)
    )
    return {
      self.masks[0].name: phase_lib.Reconstruction(
        mask, predicted, self.pixel_norm
      )
    }

  def cost(self, video: tuple[int, ...]) -> cost_lib.Cost:
    """Returns FLOPs per clip from the actual token counts."""
    return cost_lib.layerlock(self, video)


def _spread(target: Float[Array, 'B P D']) -> dict[str, Array]:
  """Returns the standard deviation and token variance of a raw target."""
  target = target.astype(jnp.float32)
  return {
    'target/std': jnp.std(target),
    'target/token_variance': jnp.mean(jnp.var(target, axis=1)),
  }
