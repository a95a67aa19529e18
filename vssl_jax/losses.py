"""Parts of losses: distances, pixel targets and target normalisations.

All of them compute in float32, whatever the dtype of the models.
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

from vssl_jax.masks import tubelets

Distance = Callable[[Array, Array], Float[Array, '']]


def l1(
  prediction: Float[Array, '*shape'], target: Float[Array, '*shape']
) -> Float[Array, '']:
  """Returns the mean absolute difference (SALT Eq. 2.1; V-JEPA).

  Example:
    >>> float(l1(jnp.array([1.0, 4.0]), jnp.array([0.0, 2.0])))
    1.5
  """
  return jnp.mean(jnp.abs(_difference(prediction, target)))


def mse(
  prediction: Float[Array, '*shape'], target: Float[Array, '*shape']
) -> Float[Array, '']:
  """Returns the mean squared difference (VideoMAE).

  Example:
    >>> float(mse(jnp.array([1.0, 4.0]), jnp.array([0.0, 2.0])))
    2.5
  """
  return jnp.mean(jnp.square(_difference(prediction, target)))


def smooth_l1(
  prediction: Float[Array, '*shape'], target: Float[Array, '*shape']
) -> Float[Array, '']:
  """Returns the mean of d^2/2 where |d| < 1 and of |d| - 1/2 elsewhere.

  Example:
    >>> float(smooth_l1(jnp.array([0.5, 4.0]), jnp.array([0.0, 2.0])))
    0.8125
  """
  return jnp.mean(_smooth(_difference(prediction, target)))


def _smooth(difference: Array) -> Array:
  size = jnp.abs(difference)
  return jnp.where(size < 1, 0.5 * jnp.square(size), size - 0.5)


def per_token(
  prediction: Float[Array, 'B K D'], target: Float[Array, 'B K D'], kind: str
) -> Float[Array, 'B K']:
  """Returns the distance of each token, averaged over its channels.

  Args:
    prediction: predicted features.
    target: target features.
    kind: `mse` or `smooth_l1`.

  Raises:
    ValueError: `kind` is unknown.

  Example:
    >>> x, y = jnp.ones((1, 2, 4)), jnp.zeros((1, 2, 4))
    >>> per_token(x, y, 'mse').tolist()
    [[1.0, 1.0]]
  """
  if kind not in TOKEN_DISTANCES:
    raise ValueError(
      f'feature_loss: found {kind!r}, wanted one of {sorted(TOKEN_DISTANCES)}'
    )
  terms = TOKEN_DISTANCES[kind](_difference(prediction, target))
  return jnp.mean(terms, axis=-1)


def _difference(prediction: Array, target: Array) -> Array:
  return prediction.astype(jnp.float32) - target.astype(jnp.float32)


def cosine(
  prediction: Float[Array, 'B K D'], target: Float[Array, 'B K D']
) -> Float[Array, 'B K']:
  """Returns the cosine of the angle between each token and its target.

  2 - 2 * cosine is the squared distance between the two tokens, each scaled
  to length 1 (UMT, arXiv 2303.16058).

  Example:
    >>> x = jnp.array([[[3.0, 0.0], [0.0, 2.0]]])
    >>> y = jnp.array([[[1.0, 0.0], [0.0, -1.0]]])
    >>> cosine(x, y).tolist()
    [[1.0, -1.0]]
  """
  return jnp.sum(_unit_length(prediction) * _unit_length(target), axis=-1)


def _unit_length(x: Array) -> Array:
  x = x.astype(jnp.float32)
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x / jnp.sqrt(jnp.maximum(square, 1e-12))


def layer_norm0(
  x: Float[Array, '*batch D'], eps: float = 1e-6
) -> Float[Array, '*batch D']:
  """Applies a layer norm without parameters: mean 0, variance 1 per token.

  Args:
    x: features; the last axis is normalised, its variance has divisor D.
    eps: added to the variance.

  Example:
    >>> layer_norm0(jnp.array([1.0, 3.0]), eps=0.0).tolist()
    [-1.0, 1.0]
  """
  x = x.astype(jnp.float32)
  x = x - jnp.mean(x, axis=-1, keepdims=True)
  return x / jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


def patchify(
  video: Float[Array, 'B T H W C'], patch: tuple[int, int, int]
) -> Float[Array, 'B N P C']:
  """Returns the pixels of each patch of a clip.

  Args:
    video: clip; each side is a multiple of the patch's side.
    patch: (frames, rows, columns) of a patch.

  Returns:
    Patches in raster order, time first; the P = pt * py * px pixels of a
    patch in the same order.

  Example:
    >>> patchify(jnp.zeros((2, 4, 32, 32, 3)), (2, 16, 16)).shape
    (2, 8, 512, 3)
  """
  patches = tubelets.patchify(video, patch)
  return patches.reshape(*patches.shape[:2], -1, video.shape[-1])


def pixel_targets(
  video: Float[Array, 'B T H W C'],
  patch: tuple[int, int, int],
  kind: str = 'patch_channel',
) -> Float[Array, 'B N PC']:
  """Returns the targets of a pixel decoder.

  Args:
    video: clip in [0, 1], not normalised by the mean and standard deviation
      of the data set.
    patch: (frames, rows, columns) of a patch.
    kind: `patch_channel` normalises each colour channel of each patch
      (VideoMAE), `patch` all values of a patch together (MAE), `none` leaves
      the pixels unchanged.

  Returns:
    Targets per patch, channels innermost.

  Raises:
    ValueError: `kind` is unknown, or a patch has a single value.

  Example:
    >>> video = jnp.arange(8.0).reshape(1, 1, 2, 4, 1)
    >>> pixel_targets(video, (1, 2, 2), kind='none').tolist()
    [[[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]]
  """
  if kind not in PIXEL_NORMS:
    raise ValueError(
      f'pixel_norm: found {kind!r}, wanted one of {sorted(PIXEL_NORMS)}'
    )
  x = patchify(video.astype(jnp.float32), patch)
  values = {'patch_channel': x.shape[2], 'patch': x.shape[2] * x.shape[3]}
  if values.get(kind, 2) < 2:
    raise ValueError(
      f"pixel_norm: found {kind!r} for patches of one value, wanted 'none', as "
      'one value has no deviation; set pixel_norm or a larger patch'
    )
  x = PIXEL_NORMS[kind](x)
  return x.reshape(*x.shape[:2], -1)


def _normalise_channels(x: Float[Array, 'B N P C']) -> Float[Array, 'B N P C']:
  # eps is added outside the root, as published. Both released codes divide
  # by P - 1.
  x = x - jnp.mean(x, axis=2, keepdims=True)
  variance = jnp.sum(jnp.square(x), axis=2, keepdims=True) / (x.shape[2] - 1)
  return x / (jnp.sqrt(variance) + 1e-6)


def _normalise_patches(x: Float[Array, 'B N P C']) -> Float[Array, 'B N P C']:
  size = x.shape[2] * x.shape[3]
  x = x - jnp.mean(x, axis=(2, 3), keepdims=True)
  variance = jnp.sum(jnp.square(x), axis=(2, 3), keepdims=True) / (size - 1)
  return x / jnp.sqrt(variance + 1e-6)


# Values of the option `pixel_norm`.
PIXEL_NORMS: Mapping[str, Callable[[Array], Array]] = {
  'patch_channel': _normalise_channels,
  'patch': _normalise_patches,
  'none': lambda x: x,
}

# Values of the options `pixel_loss` and `latent_loss`.
DISTANCES: Mapping[str, Distance] = {
  'l1': l1,
  'l2': mse,
  'mse': mse,
  'smooth_l1': smooth_l1,
}

# Values of the option `feature_loss`.
TOKEN_DISTANCES: Mapping[str, Callable[[Array], Array]] = {
  'mse': jnp.square,
  'smooth_l1': _smooth,
}

# Values of the option `target_norm`.
TARGET_NORMS: Mapping[str, Callable[[Array], Array]] = {
  'ln': layer_norm0,
  'none': lambda x: x.astype(jnp.float32),
}
