"""LayerLock written out in numpy, float64, from a tree of parameters.

An independent reference: nothing of the package is used. Positions are
`rope_post_norm`, with the learned table added where there is one.
"""

import math

import numpy as np

HEADS, EPS = 2, 1e-6


def patches(video, patch):
  """Returns [B, N, P, C] pixels of every patch in [0, 1], time first."""
  b, frames, height, width, c = video.shape
  pt, py, px = patch
  t, h, w = frames // pt, height // py, width // px
  x = np.asarray(video, np.float64) / 255
  x = x.reshape(b, t, pt, h, py, w, px, c).transpose(0, 1, 3, 5, 2, 4, 6, 7)
  return x.reshape(b, t * h * w, pt * py * px, c)


def pixel_targets(video, patch, kind='patch_channel'):
  """Returns what the pixel head has to predict."""
  x = patches(video, patch)
  if kind == 'patch_channel':
    x = x - x.mean(2, keepdims=True)
    x = x / (x.std(2, ddof=1, keepdims=True) + 1e-6)
  return x.reshape(*x.shape[:2], -1)


def linear(layer, x):
  return x @ layer['kernel'] + layer['bias']


def normed(x):
  """Layer norm without parameters."""
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)


def layer_norm(layer, x):
  return normed(x) * layer['scale'] + layer['bias']


def gelu(x):
  return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def turn(x, where, grid):
  """Turns 10, 25 and 25 % of the channels by time, row and column."""
  _, h, w = grid
  axes = (where // (h * w), where // w % h, where % w)
  out, at = np.array(x), 0
  for share, position in zip((0.1, 0.25, 0.25), axes, strict=True):
    pairs = round(share * x.shape[-1] / 2)
    for i in range(pairs):
      angle = position * 10000.0 ** (-i / pairs)
      a, b = x[..., at], x[..., at + 1]
      out[..., at] = a * np.cos(angle) - b * np.sin(angle)
      out[..., at + 1] = b * np.cos(angle) + a * np.sin(angle)
      at += 2
  return out


def attend(layer, x):
  """Multi-head self-attention."""
  b, n, d = x.shape

  def split(name):
    return linear(layer[name], x).reshape(b, n, HEADS, -1).swapaxes(1, 2)

  q, k, v = split('q'), split('k'), split('v')
  logits = q @ k.swapaxes(2, 3) / math.sqrt(d // HEADS)
  logits = np.exp(logits - logits.max(-1, keepdims=True))
  y = logits / logits.sum(-1, keepdims=True) @ v
  return linear(layer['out'], y.swapaxes(1, 2).reshape(b, n, d))


def block(layer, x, where, grid):
  """One block: normed tokens are turned before the projections."""
  x = x + attend(
    layer['attn'], turn(layer_norm(layer['norm_1'], x), where, grid)
  )
  hidden = gelu(linear(layer['mlp']['fc1'], layer_norm(layer['norm_2'], x)))
  return x + linear(layer['mlp']['fc2'], hidden)


def prefix(encoder, video, patch, visible, depth):
  """Returns the embedded tokens and the outputs of the first blocks."""
  t, h, w = (n // p for n, p in zip(video.shape[1:4], patch, strict=True))
  x = patches(video, patch)
  x = linear(encoder['embed'], x.reshape(*x.shape[:2], -1))
  if 'positions' in encoder:
    x = x + encoder['positions'].reshape(1, -1, x.shape[-1])
  x = np.take_along_axis(x, visible[..., None], 1)
  out = [x]
  for i in range(depth):
    out.append(block(encoder[f'block_{i:02d}'], out[-1], visible, (t, h, w)))
  return out


def decode(params, video, patch, visible, decoder_blocks):
  """Returns what becomes of the learned latent of every position."""
  encoder = params['encoder']
  grid = tuple(n // p for n, p in zip(video.shape[1:4], patch, strict=True))
  depth = sum(name.startswith('block_') for name in encoder)
  x = prefix(encoder, video, patch, visible, depth - decoder_blocks)[-1]
  latents = params['latents']['tokens']
  count = len(latents)
  x = np.concatenate([x, np.repeat(latents[None], len(x), 0)], 1)
  where = np.repeat(np.arange(count)[None], len(x), 0)
  where = np.concatenate([visible, where], 1)
  for i in range(depth - decoder_blocks, depth):
    x = block(encoder[f'block_{i:02d}'], x, where, grid)
  return x[:, -count:]


def pixel_loss(params, video, patch, visible, decoder_blocks, kind):
  """Mean squared error of the pixel head over all positions."""
  decoded = decode(params, video, patch, visible, decoder_blocks)
  predicted = linear(params['pixel_head'], decoded)
  return np.mean((predicted - pixel_targets(video, patch, kind)) ** 2)


def latent_loss(
  params, locked, video, patch, visible, decoder_blocks, layers, chosen=None,
  context=None, norm=normed,
):  # fmt: skip
  """Mean squared error to locked layers, {head: layer}.

  `locked` is the encoder that makes the targets; `chosen` are the positions
  of the loss and `context` those that the targets are made of, all for None.
  """
  decoded = decode(params, video, patch, visible, decoder_blocks)
  every = np.repeat(np.arange(decoded.shape[1])[None], len(decoded), 0)
  chosen = every if chosen is None else chosen
  context = every if context is None else context
  made = prefix(locked, video, patch, context, max(layers.values()))
  at = np.stack(
    [
      [list(c).index(i) for i in row]
      for c, row in zip(context, chosen, strict=True)
    ]
  )
  tokens = np.take_along_axis(decoded, chosen[..., None], 1)
  terms = []
  for head, layer in layers.items():
    target = norm(np.take_along_axis(made[layer], at[..., None], 1))
    terms.append(np.mean((linear(params[head], tokens) - target) ** 2))
  return np.mean(terms)
