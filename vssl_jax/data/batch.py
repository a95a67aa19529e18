"""The batch of a train step."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
  """The batch of a train step: B clips of T frames of H x W pixels.

  It is a tree for JAX: its leaves may also be shapes or shardings. A field that
  a batch does not have is None.

  Attributes:
    video: uint8, or float in [0, 1]: [B, T, H, W, C].
    index: int32 [B], number of each example; the number of all examples for a
      substitute clip.
    repeat: int32 [B], distinguishes several clips of one example.
    label: int32 [B], class of each clip; -1 if unknown.
    substituted: bool [B], whether the clip replaces one that could not be read.
    crop: float32 [B, 4]: top, left, bottom, right of the clip, as fractions of
      the frame.
    flip: bool [B], whether the crop was mirrored.
    progress: float32 [], completed steps of the run, as a fraction.
    targets: name -> [B, ...], outputs of frozen teachers, see `Phase.targets`.
      The train step computes them, unless they were read from the cache.
    example_memory: name -> float32 [B, ...], see `phase.MemorySpec`.

  Example:
    >>> batch = Batch(
    ...   video=np.zeros((2, 4, 16, 16, 3), np.uint8), index=np.arange(2)
    ... )
    >>> batch.video.shape, batch.label
    ((2, 4, 16, 16, 3), None)
  """

  video: Any
  index: Any
  repeat: Any = None
  label: Any = None
  substituted: Any = None
  crop: Any = None
  flip: Any = None
  progress: Any = 0.0
  targets: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  example_memory: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def shapes(
  size: int, video: tuple[int, ...], examples: Any, whole: Any
) -> Batch:
  """Returns the shapes of a batch from the pipeline, without targets.

  Args:
    size: number of clips in the global batch.
    video: (T, H, W, C) of a clip.
    examples: sharding of arrays with an axis of examples.
    whole: sharding of scalars.
  """

  def shape(dtype: Any, *rest: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size, *rest), dtype, sharding=examples)

  return Batch(
    video=shape(jnp.uint8, *video),
    index=shape(jnp.int32),
    label=shape(jnp.int32),
    repeat=shape(jnp.int32),
    substituted=shape(jnp.bool_),
    crop=shape(jnp.float32, 4),
    flip=shape(jnp.bool_),
    progress=jax.ShapeDtypeStruct((), jnp.float32, sharding=whole),
  )
