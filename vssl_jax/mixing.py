"""Mixup and CutMix of clips, and the targets that go with them.

A batch is mixed with itself in reverse order, by one share for all of it, as
timm's batch mode does, which VideoMAE and MVD fine-tune with. JAX libraries
of augmentations (PIX, Augmax) change one image at a time and know no targets;
codes that need these two write them out, as here. Smoothing and the
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

from vssl_jax.models import layers


@dataclasses.dataclass(frozen=True)
class Mix:
  """How clips are mixed.

  Attributes:
    mixup: both parameters of the Beta distribution of the share; 0 for none.
    cutmix: the same for CutMix.
    probability: that a batch is mixed at all.
    switch: probability of CutMix where both are on.
    smoothing: share of a target that is spread evenly over all classes.
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
  """What was drawn for a batch.

  Attributes:
    share: of a clip's own label in its target; the rest is its partner's.
    fade: share of a clip's own pixels outside the box.
    box: top, left, bottom, right of what the partner gives whole.
  """

  share: Float[Scalar, '']
  fade: Float[Scalar, '']
  box: Int[Array, '4']


def draw(mix: Mix, key: Key[Array, ''], height: int, width: int) -> Drawn:
  """Draws the share of a batch, and the box if it is cut.

  The box has a fraction 1 - share of the picture, and its centre anywhere:
  where it sticks out it is cut off, and the share grows with what is left.

  Args:
    mix: how clips are mixed.
    key: of this batch.
    height: of the pictures, in pixels.
    width: of the pictures, in pixels.
  """
  if not (mix.mixup or mix.cutmix) or not mix.probability:
    return Drawn(jnp.float32(1), jnp.float32(1), jnp.zeros(4, jnp.int32))
  on, which, beta_mix, beta_cut, row, column = jax.random.split(key, 6)
  switch = mix.switch if mix.mixup and mix.cutmix else float(not mix.mixup)
  cut = jax.random.bernoulli(which, switch)
  # A parameter that is off is never chosen; any value will do there.
  share = jnp.where(
    cut,
    jax.random.beta(beta_cut, *(mix.cutmix or 1.0,) * 2),
    jax.random.beta(beta_mix, *(mix.mixup or 1.0,) * 2),
  )
  share = jnp.where(jax.random.bernoulli(on, mix.probability), share, 1.0)
  y = jax.random.randint(row, (), 0, height)
  x = jax.random.randint(column, (), 0, width)
  box = _box(share, y, x, height, width) * cut
  area = (box[2] - box[0]) * (box[3] - box[1])
  left = 1 - area.astype(jnp.float32) / (height * width)
  return Drawn(jnp.where(cut, left, share), jnp.where(cut, 1.0, share), box)


def _box(
  share: Float[Scalar, ''],
  y: Int[Scalar, ''],
  x: Int[Scalar, ''],
  height: int,
  width: int,
) -> Int[Array, '4']:
  """Returns the box around (y, x), cut off at the edges."""
  side = jnp.sqrt(1 - share)
  half_h = (height * side).astype(jnp.int32) // 2
  half_w = (width * side).astype(jnp.int32) // 2
  low = jnp.stack([y - half_h, x - half_w, y + half_h, x + half_w])
  size = jnp.array([height, width, height, width], jnp.int32)
  return jnp.clip(low, 0, size)


def blend(
  video: Num[Array, 'B T H W C'], drawn: Drawn
) -> Float[Array, 'B T H W C']:
  """Returns clips mixed with those of the batch in reverse order.

  Args:
    video: uint8, or floats in [0, 1].
    drawn: of this batch.

  Returns:
    Floats in [0, 1]. The same box is cut from all frames.
  """
  top, left, bottom, right = drawn.box
  rows, columns = jnp.arange(video.shape[2]), jnp.arange(video.shape[3])
  inside = ((rows >= top) & (rows < bottom))[:, None]
  inside &= ((columns >= left) & (columns < right))[None, :]
  inside = inside[None, None, :, :, None]
  # Turned around as it came: bytes are a quarter of what floats would be.
  other = video[::-1]
  video = layers.to_unit(jnp.where(inside, other, video))
  return drawn.fade * video + (1 - drawn.fade) * layers.to_unit(other)


def targets(
  label: Int[Array, 'B'], classes: int, smoothing: float, drawn: Drawn
) -> Float[Array, 'B K']:
  """Returns the probability that each clip should give each class.

  Args:
    label: classes; a row of a class below 0, or of a partner with one, does
      not sum to 1 and is to be left out (see `known`).
    classes: how many there are, K.
    smoothing: share that is spread evenly.
    drawn: of this batch.
  """
  hot = jax.nn.one_hot(label, classes, dtype=jnp.float32)
  hot = optax.smooth_labels(hot, smoothing)
  return drawn.share * hot + (1 - drawn.share) * hot[::-1]


def known(label: Int[Array, 'B'], drawn: Drawn) -> Float[Array, 'B']:
  """Returns 1 for clips whose own class is known, and that of the partner.

  The partner of a clip that is not mixed does not count.

  Args:
    label: classes; below 0: not known.
    drawn: of this batch.
  """
  found = label >= 0
  partner = found[::-1] | (drawn.share == 1)
  return (found & partner).astype(jnp.float32)
