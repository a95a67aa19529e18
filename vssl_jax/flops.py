"""FLOPs of matrix products and activation memory, by program or closed form.

Conventions: 2 FLOPs per multiply-add; matrix products only; full attention;
backward = 2x the forward of the trained part; rematerialisation not counted.
The compiler's count includes elementwise work and counts the body of a loop
once, so compare it with unrolled blocks only.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from vssl_jax.masks import tubelets
from vssl_jax.models import Module, decoder, framewise, predictor, vit
from vssl_jax.models.hiera import cost
from vssl_jax.models.hiera import decoder as hiera_decoder
from vssl_jax.models.hiera import encoder as encoder_lib

Head = predictor.Predictor | decoder.VideoMaeDecoder | hiera_decoder.Decoder
FRAMEWISE = framewise.Framewise | framewise.FramewiseDecoder


def count(program: Any) -> float:
  """Counts the FLOPs of the matrix products and convolutions of a program.

  The body of a loop counts as often as it runs (`while` loops: once), and of a
  conditional the most expensive branch.

  Args:
    program: from `jax.make_jaxpr`, or its `jaxpr`.

  Example:
    >>> count(jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 4))))
    48.0
  """
  total = 0.0
  for equation in getattr(program, 'jaxpr', program).eqns:
    name, params = equation.primitive.name, equation.params
    values = sum(math.prod(x.aval.shape) for x in equation.outvars[:1])
    if name == 'dot_general':
      (contracted, _), _ = params['dimension_numbers']
      shape = equation.invars[0].aval.shape
      total += 2.0 * values * math.prod(shape[i] for i in contracted)
    elif name == 'conv_general_dilated':
      shape = equation.invars[1].aval.shape
      outputs = shape[params['dimension_numbers'].rhs_spec[0]]
      total += 2.0 * values * math.prod(shape) / outputs
    inner = [count(x) for x in _programs_in(params)]
    if name == 'cond':
      total += max(inner)
    else:
      total += sum(inner) * (params['length'] if name == 'scan' else 1)
  return total


def _programs_in(params: Mapping[str, Any]) -> list[Any]:
  """Returns the programs in the parameters of an equation."""
  values = []
  for value in params.values():
    values += value if isinstance(value, tuple | list) else [value]
  return [x for x in values if hasattr(x, 'jaxpr') or hasattr(x, 'eqns')]


def forward(
  module: Module,
  grid: tubelets.Grid,
  tokens: int | tuple[int, int] | None = None,
  in_width: int | None = None,
  depth: int | None = None,
) -> float:
  """Returns the FLOPs of one clip's forward pass.

  Args:
    module: an encoder, predictor or decoder.
    grid: tokens of the whole clip along (time, height, width).
    tokens: for an encoder the number of visible tokens (None for all), for
      Hiera counted at the last stage; for a predictor or decoder the numbers
      (visible, masked).
    in_width: width of the tokens that enter a predictor or decoder.
    depth: number of encoder blocks to run; None for `encoder_depth`.

  Raises:
    TypeError: the type of the module is not supported, or `tokens` or
      `in_width` of a predictor or decoder is missing.
  """
  if isinstance(module, FRAMEWISE):
    inner, share = _of_one_frame(module, grid, tokens)
    frame = (1, *grid[1:])
    return grid[0] * forward(inner, frame, share, in_width, depth)
  if isinstance(module, vit.Vit):
    n = math.prod(grid) if tokens is None else tokens
    depth = module.encoder_depth if depth is None else depth
    return embedding(module, n) + depth * block(module, n)
  if isinstance(module, encoder_lib.Hiera):
    n = math.prod(grid) if tokens is None else tokens
    count = cost.units(module, n)
    return cost.embedding(module, count) + sum(
      cost.block(step, count) for step in module.plan()[:depth]
    )
  if isinstance(module, Head):
    if not isinstance(tokens, tuple) or in_width is None:
      raise TypeError(
        f'FLOPs of a {type(module).__name__} need tokens=(visible, masked) '
        f'and in_width; found tokens={tokens}, in_width={in_width}'
      )
    visible, masked = tokens
    ends = 2.0 * (visible * in_width + masked * module.out_width) * module.width
    if isinstance(module, hiera_decoder.Decoder):
      ends += cost.fusion(visible, in_width)
    return ends + module.depth * block(module, visible + masked)
  raise TypeError(
    f'no FLOP count for {type(module).__name__}; known are Vit, Hiera, '
    'Predictor, VideoMaeDecoder, the Decoder of Hiera-MAE and, on frames, '
    'Framewise and FramewiseDecoder'
  )


def _of_one_frame(
  module: framewise.Framewise | framewise.FramewiseDecoder,
  grid: tubelets.Grid,
  tokens: int | tuple[int, int] | None,
) -> tuple[Module, int | tuple[int, int] | None]:
  """Returns the image model and its tokens per frame."""
  if isinstance(module, framewise.Framewise):
    return module.image, None if tokens is None else tokens // grid[0]
  if tokens is not None:
    tokens = (tokens[0] // grid[0], tokens[1] // grid[0])
  return module.decoder, tokens


def train(
  module: Module,
  grid: tubelets.Grid,
  tokens: int | tuple[int, int] | None = None,
  in_width: int | None = None,
  frozen: int = 0,
) -> float:
  """Returns the FLOPs of one clip's forward and backward pass.

  This is three times the forward pass, without the gradient of the pixels,
  which is not computed. If the first `frozen` blocks of an encoder are frozen,
  they and the embedding have no backward pass. Other arguments and errors as
  in `forward`.
  """
  if isinstance(module, FRAMEWISE):
    inner, share = _of_one_frame(module, grid, tokens)
    return grid[0] * train(inner, (1, *grid[1:]), share, in_width, frozen)
  total = 3.0 * forward(module, grid, tokens, in_width)
  if isinstance(module, vit.Vit):
    n = math.prod(grid) if tokens is None else tokens
    total -= embedding(module, n) * (2 if frozen else 1)
    total -= 2 * frozen * block(module, n)
  if isinstance(module, encoder_lib.Hiera):
    n = math.prod(grid) if tokens is None else tokens
    count = cost.units(module, n)
    total -= cost.embedding(module, count) * (2 if frozen else 1)
    total -= 2 * sum(cost.block(step, count) for step in module.plan()[:frozen])
  return total


def activations(module: Module, tokens: int, count: int | None = None) -> float:
  """Estimates the bytes of activations stored for one clip's backward pass.

  Values per token and block, in the activations' dtype: 8 D (inputs and outputs
  of two norms; q, k, v; the output of attention) and two arrays of MLP width.
  Rematerialisation `dots` stores 6 D and one array of MLP width, `full` only
  the block's input; both store the values of one block at a time in full.
  Attention weights are not counted: fused attention does not store them,
  unfused attention adds heads x tokens^2 values of 4 bytes.

  Args:
    module: an encoder, predictor or decoder.
    tokens: number of tokens in its blocks.
    count: number of blocks in the backward pass; None for all.
  """
  if isinstance(module, FRAMEWISE):
    inner, _ = _of_one_frame(module, (1, 1, 1), None)
    return activations(inner, tokens, count)
  count = module.depth if count is None else count
  size = 2 if module.dtype == 'bfloat16' else 4
  if isinstance(module, encoder_lib.Hiera):
    steps = module.plan()[module.depth - count :]
    sizes = [cost.kept(step, module.remat) for step in steps]
    extra = max(
      (full - stored_values for full, stored_values in sizes), default=0
    )
    total = sum(stored_values for _, stored_values in sizes) + extra
    return float(size * cost.units(module, tokens) * total)
  mlp = module.mlp_width or 4 * module.width
  full = 8 * module.width + 2 * mlp
  stored = {
    'none': full,
    'dots': 6 * module.width + mlp,
    'full': module.width,
  }[module.remat]
  return float(size * tokens * (count * stored + full - stored))


def embedding(encoder: vit.Vit, tokens: int) -> float:
  """Returns the forward FLOPs of embedding `tokens` patches."""
  pixels = math.prod(encoder.patch) * len(encoder.mean)
  return 2.0 * tokens * pixels * encoder.width


def rule_of_six(
  trained: Iterable[tuple[float | int, float | int]],
  frozen: Iterable[tuple[float | int, float | int]] = (),
) -> float:
  """Returns FLOPs by the rule of the papers: 6ND trained, 2ND frozen.

  The rule counts parameters and ignores attention. It is printed beside the
  count of matrix products.

  Args:
    trained: (parameters, tokens) of each trained network.
    frozen: (parameters, tokens) of each network that only runs forward.

  Source: SALT, arXiv 2509.24317, FLOPs accounting.
  """
  return 6.0 * sum(n * d for n, d in trained) + 2.0 * sum(
    n * d for n, d in frozen
  )


def block(module: vit.Vit | Head, tokens: int) -> float:
  """Returns the forward FLOPs of one block over `tokens`.

  A class token and registers, if any, are counted in addition.
  """
  tokens += getattr(module, 'prefix', 0)
  width, mlp = module.width, module.mlp_width or 4 * module.width
  mlp_layers = 3 if getattr(module, 'mlp', 'gelu') == 'swiglu' else 2
  weights = 4 * width**2 + mlp_layers * width * mlp
  return 2.0 * (tokens * weights + 2 * tokens**2 * width)
