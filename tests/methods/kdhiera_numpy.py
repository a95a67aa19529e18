"""KDHiera written out in numpy, float64: scores, masks, heads and loss.

An independent reference: nothing of the package is used. The encoder's stages
are given; teachers are those of `pmd_numpy`, which has blocks and patches.
"""

import math

import numpy as np
import scipy.special

from tests.methods import pmd_numpy as vits


def image_teacher(net, video, patch, heads):
  """Returns the stream of all patches, and what the class token looks at."""
  frames = video[:, :: patch[0]]
  b, t = frames.shape[:2]
  x = vits.patches(frames.reshape(b * t, 1, *frames.shape[2:]), (1, *patch[1:]))
  grid = tuple(n // p for n, p in zip(video.shape[2:4], patch[1:], strict=True))
  width = net['embed']['bias'].size
  x = vits.linear(net['embed'], x) + vits.image_table((1, *grid), width)
  first = np.broadcast_to(net['class_token'], (b * t, 1, width))
  stream = vits.blocks(net, np.concatenate([first, x], 1), heads)
  last = net[max(name for name in net if name.startswith('block_'))]
  rows = attention(last, stream[-2], heads)[:, :, 0, 1:].mean(1)
  return [x[:, 1:].reshape(b, -1, width) for x in stream], rows.reshape(b, -1)


def attention(layer, x, heads):
  """Returns weights [B, heads, N, N] of a block."""
  y = vits.layer_norm(layer['norm_1'], x)

  def split(name):
    out = vits.linear(layer['attn'][name], y)
    return out.reshape(*out.shape[:2], heads, -1).swapaxes(1, 2)

  q, k = split('q'), split('k')
  logits = q @ k.swapaxes(2, 3) / math.sqrt(q.shape[-1])
  return scipy.special.softmax(logits, -1)


def cells(tokens, units):
  """Returns [B, U, 4, ...]: the 2 x 2 tokens of every unit, by coordinates."""
  t, h, w = units
  x = tokens.reshape(len(tokens), t, 2 * h, 2 * w, *tokens.shape[2:])
  return np.stack(
    [
      np.stack(
        [x[:, i, 2 * y + a, 2 * z + c] for a in (0, 1) for c in (0, 1)], 1
      )
      for i in range(t)
      for y in range(h)
      for z in range(w)
    ],
    1,
  )


def chosen(scores, noise, visible, units):
  """Returns the visible units [B, K]: the first by log score plus noise."""
  t, h, w = units
  p = cells(scores, units).mean(2).reshape(len(scores), t, h * w)
  rank = np.log(p / p.sum(-1, keepdims=True)) + noise
  found = np.sort(np.argsort(-rank, -1)[..., :visible], -1)
  return (found + h * w * np.arange(t)[:, None]).reshape(len(scores), -1), p


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def place(end, seen, units):
  """Returns MVD's positions [B, K, 1, h, w, C] of the tokens of units."""
  t, rows, columns = units
  h, w, width = end.shape[3:]
  table = vits.student_table((t, rows * h, columns * w), width)
  table = table.reshape(t, rows * h, columns * w, width)
  found = np.zeros(end.shape)
  for b, one in enumerate(seen):
    for k, index in enumerate(one):
      step, y, x = np.unravel_index(index, units)
      found[b, k, 0] = table[step, y * h : y * h + h, x * w : x * w + w]
  return found


def head(net, name, end, added):
  """Returns [B, K, 4, D]: a stage's 2 x 2 quarters of a unit, each projected.

  Args:
    net: of the heads.
    name: of this one.
    end: [B, K, 1, h, w, C].
    added: to the normed tokens.
  """
  x = vits.layer_norm(net[f'{name}_in'], np.asarray(end, np.float64)) + added
  half = x.shape[3] // 2
  parts = [
    x[:, :, 0, a * half : (a + 1) * half, c * half : (c + 1) * half]
    for a in (0, 1)
    for c in (0, 1)
  ]
  flat = np.stack([p.reshape(*p.shape[:2], -1) for p in parts], 2)
  return vits.layer_norm(net[f'{name}_out'], vits.linear(net[name], flat))


def term(predicted, target, loss, norm):
  """Returns the distance and the cosine of tokens, both means."""
  target = vits.normed(target) if norm == 'ln' else target
  angle = (unit(predicted) * unit(target)).sum(-1)
  if loss == 'cosine':
    distance = ((unit(predicted) - unit(target)) ** 2).sum(-1)
  else:
    distance = vits.distance(predicted, target, loss)
  return distance.mean(), angle.mean()


def whole(
  params, views, teachers, units, pairs, loss='cosine', norm='ln', pos=False
):
  """Returns loss and metrics.

  Args:
    params: roles `heads_<teacher>`.
    views: of each mask the ends of the stages and the visible units.
    teachers: teacher -> (stream, weight).
    units: unit grid.
    pairs: (name of the head, stage, layer, weight), weights summing to 1.
    loss: kind.
    norm: of targets.
    pos: whether positions are added in front of the heads.
  """
  total, metrics = 0.0, {}
  for teacher, (stream, share) in teachers.items():
    for name, stage, layer, weight in pairs:
      target = cells(stream[layer], units)
      found = [
        term(
          head(
            params[f'heads_{teacher}'],
            name,
            ends[stage - 1],
            place(ends[stage - 1], seen, units) if pos else 0.0,
          ),
          np.stack([x[k] for x, k in zip(target, seen, strict=True)]),
          loss,
          norm,
        )
        for ends, seen in views
      ]
      distance, angle = np.mean(found, 0)
      metrics[f'loss/{teacher}/{name}'] = distance
      metrics[f'cosine/{teacher}/{name}'] = angle
      total += share * weight * distance
  return total, metrics
