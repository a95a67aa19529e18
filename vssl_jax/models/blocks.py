"""Transformer blocks: pre-norm attention and MLP, one named block per layer.

Parameters are named by block, so that each block can be frozen, read out,
counted or given a learning rate separately. Blocks are unrolled by default. A
range of blocks can run as a loop over weights that are stacked inside the
step, which compiles faster and does not change parameter names.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vssl_jax.models import attention, layers, positions

REMAT = {
  # Stores the results of matrix products with weights, recomputes the rest.
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  # Stores only the input of each block.
  'full': jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Spec:
  """Options shared by all blocks of a stack.

  Attributes:
    num_heads: attention heads.
    mlp_width: hidden channels of the MLP.
    qkv_bias: `full`, or `qv` for a key projection without bias.
    gelu: `exact` (erf) or `tanh`.
    norm_eps: added to the variance in layer norms.
    init: family of initial values, see `layers.kernel_init`.
    dtype: dtype of activations and matrix products; parameters are float32.
    remat: rematerialisation in the backward pass: `none`, `dots` or `full`.
    attention: implementation, see `attention.choose`.
    drop_path: drop rate of the last block; it rises linearly from 0.
    rope_on: tensors that are rotated: `qk`, queries and keys per head; `norm`,
      the output of the first norm.
    layer_scale: whether each branch is multiplied by learned gains, one per
      channel, as in DINOv2.
    mlp: `gelu` or `swiglu`, see `Mlp`.
    products: dtype of matrix products with weights: `same` as `dtype`, or
      `float8` for networks that are not trained, see `fp8_matmul`.
  """

  num_heads: int
  mlp_width: int
  qkv_bias: str = 'full'
  gelu: str = 'exact'
  norm_eps: float = 1e-6
  init: str = 'vjepa'
  dtype: str = 'bfloat16'
  remat: str = 'none'
  attention: str = 'auto'
  drop_path: float = 0.0
  rope_on: str = 'qk'
  layer_scale: bool = False
  mlp: str = 'gelu'
  products: str = 'same'

  def __post_init__(self) -> None:
    allowed = {
      'qkv_bias': ('full', 'qv'),
      'gelu': ('exact', 'tanh'),
      'remat': ('none', *REMAT),
      'dtype': ('bfloat16', 'float32'),
      'rope_on': ('qk', 'norm'),
      'mlp': ('gelu', 'swiglu'),
      'products': tuple(layers.PRODUCTS),
    }
    for field, values in allowed.items():
      if getattr(self, field) not in values:
        raise ValueError(
          f'{field} is {getattr(self, field)!r}, wanted one of {values}'
        )


def dense(
  spec: Spec,
  features: int,
  name: str,
  kernel: layers.Initializer,
  use_bias: bool = True,
) -> nn.Dense:
  """Returns a linear layer of a block."""
  return layers.dense(
    features,
    name,
    kernel=kernel,
    dtype=spec.dtype,
    use_bias=use_bias,
    products=spec.products,
    bias=layers.bias_init(spec.init),
  )


class Attention(nn.Module):
  """Self-attention with separate q, k, v projections and an output layer.

  Attributes:
    spec: options shared by all blocks.
    index: index of the block, from 0.
  """

  spec: Spec
  index: int

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B N D'],
    rope: positions.Rope | None,
    asking: tuple[int, int] | None = None,
  ) -> Float[Array, 'B N D'] | Float[Array, 'B N']:
    """Returns attended tokens, or attention weights with `asking`.

    Args:
      x: tokens.
      rope: rotation of queries and keys, if any.
      asking: range (start, stop) of query tokens. If given, return the mean
        attention [B, N] that each token receives from them, see
        `attention.received`.
    """
    spec, width = self.spec, x.shape[-1]
    if width % spec.num_heads:
      raise ValueError(
        f'num_heads: found {spec.num_heads} for a width of {width}, wanted a '
        'number that divides it; set num_heads or width of that section'
      )
    heads = (*x.shape[:2], spec.num_heads, width // spec.num_heads)
    kernel = layers.kernel_init(spec.init, 'qkv')

    def project(name: str, use_bias: bool = True) -> Array:
      layer = dense(spec, width, name, kernel, use_bias)
      return layer(x).reshape(heads)

    q = project('q')
    k = project('k', use_bias=spec.qkv_bias == 'full')
    if rope is not None:
      q, k = positions.rotate(q, rope), positions.rotate(k, rope)
    if asking:
      return attention.received(q[:, slice(*asking)], k)
    v = project('v')
    y = attention.attend(q, k, v, spec.attention).reshape(x.shape)
    kernel = layers.kernel_init(spec.init, 'out', self.index + 1)
    return dense(spec, width, 'out', kernel)(y)


class Mlp(nn.Module):
  """Two linear layers with a GELU between them, or SwiGLU.

  SwiGLU is fc2(silu(gate(x)) * fc1(x)).

  Attributes:
    spec: options shared by all blocks.
    index: index of the block, from 0.
  """

  spec: Spec
  index: int

  @nn.compact
  def __call__(self, x: Float[Array, 'B N D']) -> Float[Array, 'B N D']:
    """Returns tokens of the same width."""
    spec = self.spec
    kernel = layers.kernel_init(spec.init, 'fc1')
    y = dense(spec, spec.mlp_width, 'fc1', kernel)(x)
    if spec.mlp == 'swiglu':
      y = y * nn.silu(dense(spec, spec.mlp_width, 'gate', kernel)(x))
    else:
      y = nn.gelu(y, approximate=spec.gelu == 'tanh')
    kernel = layers.kernel_init(spec.init, 'fc2', self.index + 1)
    return dense(spec, x.shape[-1], 'fc2', kernel)(y)


class Block(nn.Module):
  """x += attention(norm(x)); x += mlp(norm(x)).

  Attributes:
    spec: options shared by all blocks.
    index: index of the block, from 0.
    drop_path: probability of dropping each branch, per example.
  """

  spec: Spec
  index: int
  drop_path: float = 0.0

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B N D'],
    rope: positions.Rope | None,
    asking: tuple[int, int] | None = None,
  ) -> Float[Array, 'B N D'] | Float[Array, 'B N']:
    """Returns tokens of the same shape and dtype.

    With `asking`, returns only the attention [B, N] that tokens receive from
    the tokens of this range; the rest of the block is not computed.
    """
    spec = self.spec
    y = layers.layer_norm('norm_1', spec.norm_eps, spec.dtype)(x)
    if rope is not None and spec.rope_on == 'norm':
      y, rope = positions.rotate(y[:, :, None, :], rope)[:, :, 0], None
    y = Attention(spec, self.index, name='attn')(y, rope, asking)
    if asking:
      return y
    x = x + drop(self, self._gain('gain_1', y), self.drop_path)
    y = layers.layer_norm('norm_2', spec.norm_eps, spec.dtype)(x)
    y = self._gain('gain_2', Mlp(spec, self.index, name='mlp')(y))
    return x + drop(self, y, self.drop_path)

  def _gain(self, name: str, x: Float[Array, 'B N D']) -> Float[Array, 'B N D']:
    if not self.spec.layer_scale:
      return x
    # Source of the value: DINOv2, arXiv 2304.07193, released configs.
    init = nn.initializers.constant(1e-5)
    gain = self.param(name, init, (x.shape[-1],), jnp.float32)
    return x * jnp.asarray(gain, x.dtype).reshape(1, 1, -1)


def drop(
  block: nn.Module, x: Float[Array, 'B N D'], rate: float
) -> Float[Array, 'B N D']:
  """Applies drop path: zeroes a branch for some examples, scales the others."""
  if not rate:
    return x
  keep_rate = 1 - rate
  shape = (x.shape[0], 1, 1)
  is_kept = jax.random.bernoulli(block.make_rng('dropout'), keep_rate, shape)
  return jnp.where(
    is_kept, x / jnp.asarray(keep_rate, x.dtype), jnp.zeros_like(x)
  )


def run(
  spec: Spec,
  depth: int,
  x: Float[Array, 'B N D'],
  rope: positions.Rope | None,
  *,
  start: int = 0,
  upto: int | None = None,
  deterministic: bool = True,
  loops: tuple[int, ...] = (),
  params: Mapping[str, Any] | None = None,
) -> tuple[Float[Array, 'B N D'], ...]:
  """Runs a stack of blocks as submodules of the calling module.

  The submodules are named `block_00`, `block_01` and so on.

  Args:
    spec: options shared by the blocks.
    depth: number of blocks in the stack.
    x: tokens.
    rope: rotation, if any; applied as in `spec.rope_on`.
    start: first block to run.
    upto: run only blocks before this one; None for all.
    deterministic: no drop path.
    loops: blocks at which loops begin; () unrolls every block. A loop ends
      where the next loop begins.
    params: parameters of the calling module; required for loops.

  Returns:
    The input, then the output of every block that ran; entry k is the output
    of k blocks. The compiler removes outputs that are not used.

  Raises:
    ValueError: loops with drop path, whose rate differs by block.
  """
  stop = depth if upto is None else upto
  outputs = [x.astype(jnp.dtype(spec.dtype))]
  if loops and params is not None:
    if spec.drop_path and not deterministic:
      raise ValueError(
        f'drop_path is {spec.drop_path} and the blocks run in loops from '
        f'{loops}; set drop_path=0, or unroll the blocks'
      )
    edges = sorted({start, stop, *(i for i in loops if start < i < stop)})
    for first, last in itertools.pairwise(edges):
      outputs += _loop(spec, range(first, last), outputs[-1], rope, params)
    return tuple(outputs)
  cls = Block
  if spec.remat != 'none':
    cls = nn.remat(Block, policy=REMAT[spec.remat])
  for i in range(start, stop):
    rate = 0.0 if deterministic else spec.drop_path * i / max(depth - 1, 1)
    block = cls(spec, i, rate, name=f'block_{i:02d}')
    outputs.append(block(outputs[-1], rope))
  return tuple(outputs)


def _loop(
  spec: Spec,
  stretch: range,
  x: Float[Array, 'B N D'],
  rope: positions.Rope | None,
  params: Mapping[str, Any],
) -> list[Float[Array, 'B N D']]:
  """Runs a range of blocks as one loop; returns the output of each block."""
  block = Block(spec, stretch.start, parent=None)

  def body(x: Array, params: Any) -> tuple[Array, Array]:
    x = block.apply({'params': params}, x, rope)
    return x, x

  if spec.remat != 'none':
    body = jax.checkpoint(body, policy=REMAT[spec.remat])
  stacked = jax.tree.map(
    lambda *leaves: jnp.stack(leaves),
    *(params[f'block_{i:02d}'] for i in stretch),
  )
  last, outputs = jax.lax.scan(body, x, stacked)
  return [*(outputs[i] for i in range(len(stretch) - 1)), last]
