"""Matrix FLOPs of a model, by closed form.

Conventions: 2 FLOPs per multiply-add; matrix products only; full attention;
backward = 2x the forward of what is trained; rematerialisation not counted.
The compiler's own count differs by elementwise work, and counts the body of a
loop once, so it is compared with unrolled blocks only.
"""

import math
from collections.abc import Iterable

import flax.linen as nn

from vssl_jax.models import (
  decoder,
  framewise,
  hiera,
  hiera_cost,
  hiera_mae,
  layers,
  predictor,
  vit,
)

Head = predictor.Predictor | decoder.VideoMaeDecoder | hiera_mae.Decoder
FRAMEWISE = framewise.Framewise | framewise.FramewiseDecoder


def forward(
  module: nn.Module,
  grid: layers.Grid,
  tokens: int | tuple[int, int] | None = None,
  in_width: int | None = None,
  depth: int | None = None,
) -> float:
  """Returns the FLOPs of one clip's forward pass.

  Args:
    module: an encoder, predictor or decoder.
    grid: tokens of the whole clip along (time, height, width).
    tokens: for an encoder the visible tokens (None for all), of Hiera those
      of the last stage; for a predictor or decoder (visible, masked).
    in_width: width of the tokens that enter a predictor or decoder.
    depth: blocks of an encoder that run; None for all that encode.

  Raises:
    TypeError: another kind of module, or a predictor without its counts.
  """
  if isinstance(module, FRAMEWISE):
    inner, share = _of_one_frame(module, grid, tokens)
    frame = (1, *grid[1:])
    return grid[0] * forward(inner, frame, share, in_width, depth)
  if isinstance(module, vit.Vit):
    n = math.prod(grid) if tokens is None else tokens
    depth = module.encoder_depth if depth is None else depth
    return embedding(module, n) + depth * block(module, n)
  if isinstance(module, hiera.Hiera):
    n = math.prod(grid) if tokens is None else tokens
    count = hiera_cost.units(module, n)
    return hiera_cost.embedding(module, count) + sum(
      hiera_cost.block(step, count) for step in module.plan()[:depth]
    )
  if isinstance(module, Head):
    if not isinstance(tokens, tuple) or in_width is None:
      raise TypeError(
        f'FLOPs of a {type(module).__name__} need tokens=(visible, masked) '
        f'and in_width; found tokens={tokens}, in_width={in_width}'
      )
    visible, masked = tokens
    ends = 2.0 * (visible * in_width + masked * module.out_width) * module.width
    if isinstance(module, hiera_mae.Decoder):
      ends += hiera_cost.fusion(visible, in_width)
    return ends + module.depth * block(module, visible + masked)
  raise TypeError(
    f'no FLOP count for {type(module).__name__}; known are Vit, Hiera, '
    'Predictor, VideoMaeDecoder, the Decoder of Hiera-MAE and, on frames, '
    'Framewise and FramewiseDecoder'
  )


def _of_one_frame(
  module: framewise.Framewise | framewise.FramewiseDecoder,
  grid: layers.Grid,
  tokens: int | tuple[int, int] | None,
) -> tuple[nn.Module, int | tuple[int, int] | None]:
  """Returns the model of images and its share of a clip's tokens."""
  if isinstance(module, framewise.Framewise):
    return module.image, None if tokens is None else tokens // grid[0]
  if tokens is not None:
    tokens = (tokens[0] // grid[0], tokens[1] // grid[0])
  return module.decoder, tokens


def train(
  module: nn.Module,
  grid: layers.Grid,
  tokens: int | tuple[int, int] | None = None,
  in_width: int | None = None,
  frozen: int = 0,
) -> float:
  """Returns the FLOPs of one clip's forward and backward pass.

  Three times the forward pass, but for the gradient of the pixels, which
  nobody needs, and for the embedding and the first `frozen` blocks of an
  encoder that is frozen so far. Other arguments and errors as in `forward`.
  """
  if isinstance(module, FRAMEWISE):
    inner, share = _of_one_frame(module, grid, tokens)
    return grid[0] * train(inner, (1, *grid[1:]), share, in_width, frozen)
  total = 3.0 * forward(module, grid, tokens, in_width)
  if isinstance(module, vit.Vit):
    n = math.prod(grid) if tokens is None else tokens
    total -= embedding(module, n) * (2 if frozen else 1)
    total -= 2 * frozen * block(module, n)
  if isinstance(module, hiera.Hiera):
    n = math.prod(grid) if tokens is None else tokens
    count = hiera_cost.units(module, n)
    total -= hiera_cost.embedding(module, count) * (2 if frozen else 1)
    total -= 2 * sum(
      hiera_cost.block(step, count) for step in module.plan()[:frozen]
    )
  return total


def activations(
  module: nn.Module, tokens: int, count: int | None = None
) -> float:
  """Returns an estimate of the bytes that one clip's backward pass keeps.

  Per token and block, in the activations' type: two norms' inputs and
  outputs, q, k, v and attention's output (8 D) and two MLP-wide arrays; with
  rematerialisation `dots` 6 D + one of those, with `full` the block's input
  alone, and one block at a time in whole. The weights of attention are not
  counted: fused attention does not keep them, unfused attention adds
  heads x tokens^2 values of 4 bytes.

  Args:
    module: an encoder, predictor or decoder.
    tokens: that go through its blocks.
    count: blocks that the backward pass goes through; None for all.
  """
  if isinstance(module, FRAMEWISE):
    inner, _ = _of_one_frame(module, (1, 1, 1), None)
    return activations(inner, tokens, count)
  count = module.depth if count is None else count
  size = 2 if module.dtype == 'bfloat16' else 4
  if isinstance(module, hiera.Hiera):
    steps = module.plan()[module.depth - count :]
    both = [hiera_cost.kept(step, module.remat) for step in steps]
    more = max((whole - part for whole, part in both), default=0)
    total = sum(part for _, part in both) + more
    return float(size * hiera_cost.units(module, tokens) * total)
  mlp = module.mlp_width or 4 * module.width
  whole = 8 * module.width + 2 * mlp
  kept = {
    'none': whole,
    'dots': 6 * module.width + mlp,
    'full': module.width,
  }[module.remat]
  return float(size * tokens * (count * kept + whole - kept))


def embedding(encoder: vit.Vit, tokens: int) -> float:
  """Returns the forward FLOPs of embedding `tokens` patches."""
  pixels = math.prod(encoder.patch) * len(encoder.mean)
  return 2.0 * tokens * pixels * encoder.width


def rule_of_six(
  trained: Iterable[tuple[float | int, float | int]],
  frozen: Iterable[tuple[float | int, float | int]] = (),
) -> float:
  """Returns the FLOPs of the papers' rule, 6ND trained and 2ND frozen.

  It counts parameters and not attention, and is printed beside the true count.

  Args:
    trained: (parameters, tokens) of each network that is trained.
    frozen: the same for networks that only run forward.

  Source: SALT, arXiv 2509.24317, FLOPs accounting.
  """
  return 6.0 * sum(n * d for n, d in trained) + 2.0 * sum(
    n * d for n, d in frozen
  )


def block(module: vit.Vit | Head, tokens: int) -> float:
  """Returns the forward FLOPs of one block over `tokens`.

  A class token and registers, where there are any, come on top of them.
  """
  tokens += getattr(module, 'prefix', 0)
  width, mlp = module.width, module.mlp_width or 4 * module.width
  layers_of_mlp = 3 if getattr(module, 'mlp', 'gelu') == 'swiglu' else 2
  weights = 4 * width**2 + layers_of_mlp * width * mlp
  return 2.0 * (tokens * weights + 2 * tokens**2 * width)
