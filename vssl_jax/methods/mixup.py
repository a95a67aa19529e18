"""Mixup and CutMix of clips, and their soft targets.

A batch is mixed with itself in reverse order, with one share for the whole
batch. This is timm's batch mode, which VideoMAE and MVD use for fine-tuning.
JAX augmentation libraries (PIX, Augmax) transform single images without
targets, so mixup and CutMix are implemented here. Label smoothing and the
cross-entropy of soft targets are optax's.

Sources: mixup, arXiv 1710.09412; CutMix, arXiv 1905.04899; smoothing,
arXiv 1512.00567.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, Num, Scalar

from vssl_jax.masks import tubelets


@dataclasses.dataclass(frozen=True)
class Mix:
  """Options of mixup, CutMix and label smoothing.

  Attributes:
    mixup: both parameters of the Beta distribution of the mixup share; 0
      disables mixup.
    cutmix: the same for CutMix.
    probability: probability that a batch is mixed.
    switch: probability of CutMix if both are enabled.
    smoothing: fraction of a target that is spread evenly over all classes.
  """

  mixup: float = 0.8
  cutmix: float = 1.0
  probability: float = 1.0
  switch: float = 0.5
  smoothing: float = 0.1

  def __post_init__(self) -> None:
    for name in ('mixup', 'cutmix'):
      if getattr(self, name) < 0:
        raise ValueError(
          f'method.{name}: found {getattr(self, name)}, wanted 0 or more'
        )
    for name in ('probability', 'switch', 'smoothing'):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(
          f'method.{name}: found {getattr(self, name)}, wanted 0 to 1'
        )


class Drawn(NamedTuple):
  """Random mixing parameters of a batch.

  Attributes:
    share: weight of a clip's own label in its target; the partner's label has
      weight 1 - share.
    fade: weight of a clip's own pixels outside the box.
    box: top, left, bottom, right of the box that is copied from the partner, in
      pixels.
  """

  share: Float[Scalar, '']
  fade: Float[Scalar, '']
  box: Int[Array, '4']


def draw(mix: Mix, key: Key[Array, ''], height: int, width: int) -> Drawn:
  """Draws the mixing share of a batch, and the box of CutMix.

  The box covers a fraction 1 - share of the frame. Its centre is uniform over
  the frame. It is clipped at the edges, and the share is recomputed from the
  clipped area.

  Args:
    mix: mixing options.
    key: random key of this batch.
    height: H of the frames, in pixels.
    width: W of the frames, in pixels.
  """
  if not (mix.mixup or mix.cutmix) or not mix.probability:
    return Drawn(jnp.float32(1), jnp.float32(1), jnp.zeros(4, jnp.int32))
  on_key, switch_key, mixup_key, cutmix_key, row_key, column_key = (
    jax.random.split(key, 6)
  )
  switch = mix.switch if mix.mixup and mix.cutmix else float(not mix.mixup)
  cut = jax.random.bernoulli(switch_key, switch)
  # A disabled parameter is never selected; its replacement 1.0 has no effect.
  share = jnp.where(
    cut,
    jax.random.beta(cutmix_key, *(mix.cutmix or 1.0,) * 2),
    jax.random.beta(mixup_key, *(mix.mixup or 1.0,) * 2),
  )
  share = jnp.where(jax.random.bernoulli(on_key, mix.probability), share, 1.0)
  y = jax.random.randint(row_key, (), 0, height)
  x = jax.random.randint(column_key, (), 0, width)
  box = _box(share, y, x, height, width) * cut
  area = (box[2] - box[0]) * (box[3] - box[1])
  remaining = 1 - area.astype(jnp.float32) / (height * width)
  return Drawn(
    jnp.where(cut, remaining, share), jnp.where(cut, 1.0, share), box
  )


def _box(
  share: Float[Scalar, ''],
  y: Int[Scalar, ''],
  x: Int[Scalar, ''],
  height: int,
  width: int,
) -> Int[Array, '4']:
  """Returns the box around (y, x), clipped at the edges."""
  side = jnp.sqrt(1 - share)
  half_h = (height * side).astype(jnp.int32) // 2
  half_w = (width * side).astype(jnp.int32) // 2
  edges = jnp.stack([y - half_h, x - half_w, y + half_h, x + half_w])
  size = jnp.array([height, width, height, width], jnp.int32)
  return jnp.clip(edges, 0, size)


def blend(
  video: Num[Array, 'B T H W C'], drawn: Drawn
) -> Float[Array, 'B T H W C']:
  """Returns clips mixed with the clips of the batch in reverse order.

  Args:
    video: uint8, or floats in [0, 1].
    drawn: mixing parameters of this batch.

  Returns:
    Floats in [0, 1]. All frames have the same box.
  """
  top, left, bottom, right = drawn.box
  rows, columns = jnp.arange(video.shape[2]), jnp.arange(video.shape[3])
  inside = ((rows >= top) & (rows < bottom))[:, None]
  inside &= ((columns >= left) & (columns < right))[None, :]
  inside = inside[None, None, :, :, None]
  # Reversed before conversion: uint8 takes a quarter of the memory of float32.
  partner = video[::-1]
  video = tubelets.to_unit(jnp.where(inside, partner, video))
  return drawn.fade * video + (1 - drawn.fade) * tubelets.to_unit(partner)


def targets(
  label: Int[Array, 'B'], classes: int, smoothing: float, drawn: Drawn
) -> Float[Array, 'B K']:
  """Returns soft targets: the probability of each class for each clip.

  Args:
    label: class indices. Targets do not sum to 1 if the label of the clip or of
      its partner is below 0; exclude these clips with `known`.
    classes: number of classes, K.
    smoothing: fraction of a target that is spread evenly over all classes.
    drawn: mixing parameters of this batch.
  """
  hot = jax.nn.one_hot(label, classes, dtype=jnp.float32)
  hot = optax.smooth_labels(hot, smoothing)
  return drawn.share * hot + (1 - drawn.share) * hot[::-1]


def known(label: Int[Array, 'B'], drawn: Drawn) -> Float[Array, 'B']:
  """Returns 1 for clips whose own label and partner's label are known, else 0.

  If the batch is not mixed, the partner's label is not required.

  Args:
    label: class indices; below 0 for unknown.
    drawn: mixing parameters of this batch.
  """
  has_label = label >= 0
  partner = has_label[::-1] | (drawn.share == 1)
  return (has_label & partner).astype(jnp.float32)
