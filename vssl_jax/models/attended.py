"""How much attention of a block each token gets: what the kernels hide."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from vssl_jax.models import blocks, positions

KINDS = ('cls', 'column_mean')


def scores(
  encoder: Any,
  index: int,
  x: Float[Array, 'B N D'],
  rope: positions.Rope | None,
  kind: str,
) -> Float[Array, 'B S']:
  """Returns the attention that each token of a clip gets, float32.

  The block's queries and keys are computed once more; compiled, they are the
  same as the block's own. Rows of attention sum to 1 over the tokens and, if
  there are any, the class token and registers, which are not in the result.

  Args:
    encoder: a bound `vit.Vit`.
    index: of the block.
    x: what enters that block, the class token and registers first if there
      are any.
    rope: rotation, if any.
    kind: `cls`: from the class token; `column_mean`: from the tokens of the
      clip, the mean over them. Both are means over heads.

  Raises:
    ValueError: an unknown kind, or a class token that is not there.
  """
  first = encoder.prefix
  if kind not in KINDS or (kind == 'cls' and not encoder.class_token):
    raise ValueError(
      f'scores: found {kind!r}, wanted one of {KINDS}'
      + ('' if first else "; without a class token 'column_mean'")
    )
  asking = (0, 1) if kind == 'cls' else (first, x.shape[1])
  own = {'params': encoder.variables['params'][f'block_{index:02d}']}
  block = blocks.Block(encoder.block_spec, index, parent=None)
  return jnp.asarray(block.apply(own, x, rope, asking))[:, first:]
