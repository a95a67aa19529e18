"""PMD written out in numpy, float64: networks, loss terms and memory.

An independent reference: nothing of the package is used. Losses are functions
of what the networks say about all patches of a clip, in raster order; networks
are functions of trees of parameters. MVD is `base` alone.
"""

import math

import numpy as np
import scipy.special

EPS = 1e-6
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KNOBS = dict(
  lambda_base=1.0,
  lambda_pg=0.05,
  lambda_df=1.0,
  lambda_al=1.0,
  feature_loss='mse',
  target_norm='none',
  alpha=0.95,
  tau=0.5,
  dare='both',
  df_extra_mean=False,
  pg_positions='masked',
  align_norm='none',
  memory_shape='patch',
)

# --- networks


def patches(video, patch):
  """Returns [B, N, PC] normalised pixels of every patch, time first."""
  b, frames, height, width, c = video.shape
  pt, py, px = patch
  t, h, w = frames // pt, height // py, width // px
  x = (np.asarray(video, np.float64) / 255 - MEAN) / STD
  x = x.reshape(b, t, pt, h, py, w, px, c).transpose(0, 1, 3, 5, 2, 4, 6, 7)
  return x.reshape(b, t * h * w, pt * py * px * c)


def sines(position, size):
  """Returns a block of sines and a block of cosines of each position."""
  angle = np.outer(position, 10000.0 ** (-np.arange(size // 2) / (size / 2)))
  return np.concatenate([np.sin(angle), np.cos(angle)], 1)


def student_table(grid, width):
  """Returns MVD's positions: a quarter time, the rest columns, then rows."""
  t, y, x = (axis.ravel() for axis in np.indices(grid))
  space = 3 * width // 4
  parts = [sines(t, width // 4), sines(x, space // 2), sines(y, space // 2)]
  return np.concatenate(parts, 1)


def image_table(grid, width):
  """Returns MAE's positions: half columns, half rows."""
  _, y, x = (axis.ravel() for axis in np.indices(grid))
  return np.concatenate([sines(x, width // 2), sines(y, width // 2)], 1)


def video_table(grid, width):
  """Returns VideoMAE's positions: sines and cosines in turn, by flat index."""
  table = np.zeros((math.prod(grid), width))
  for j in range(width):
    angle = np.arange(len(table)) / 10000.0 ** (2 * (j // 2) / width)
    table[:, j] = np.cos(angle) if j % 2 else np.sin(angle)
  return table


def linear(layer, x):
  return x @ layer['kernel'] + layer.get('bias', 0.0)


def normed(x):
  """Layer norm without parameters."""
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)


def layer_norm(layer, x):
  return normed(x) * layer['scale'] + layer['bias']


def gelu(x):
  return 0.5 * x * (1 + scipy.special.erf(x / math.sqrt(2)))


def attend(layer, x, heads):
  """Multi-head self-attention; keys may have no bias."""
  b, n, d = x.shape

  def split(name):
    return linear(layer[name], x).reshape(b, n, heads, -1).swapaxes(1, 2)

  q, k, v = split('q'), split('k'), split('v')
  logits = q @ k.swapaxes(2, 3) / math.sqrt(d // heads)
  weights = scipy.special.softmax(logits, -1)
  return linear(layer['out'], (weights @ v).swapaxes(1, 2).reshape(b, n, d))


def blocks(net, x, heads):
  """Returns the residual stream: what enters, then the output of each block."""
  out = [x]
  for name in sorted(name for name in net if name.startswith('block_')):
    layer = net[name]
    x = x + attend(layer['attn'], layer_norm(layer['norm_1'], x), heads)
    y = linear(layer['mlp']['fc1'], layer_norm(layer['norm_2'], x))
    x = x + linear(layer['mlp']['fc2'], gelu(y))
    out.append(x)
  return out


def at(x, index):
  """Returns the tokens of each clip at its indices."""
  return np.take_along_axis(np.asarray(x), np.asarray(index)[..., None], 1)


def stream(net, video, patch, heads, table, visible=None):
  """Returns the residual stream of an encoder, without the final norm."""
  x = linear(net['embed'], patches(video, patch)) + table
  return blocks(net, x if visible is None else at(x, visible), heads)


def image_stream(net, video, patch, heads, table):
  """Returns that of an image model on the first frame of every tubelet."""
  frames = video[:, :: patch[0]]
  b, t = frames.shape[:2]
  frames = frames.reshape(b * t, 1, *frames.shape[2:])
  found = stream(net, frames, (1, *patch[1:]), heads, table)
  return [x.reshape(b, -1, x.shape[-1]) for x in found]


def decode(net, tokens, visible, table, heads):
  """Returns MVD's decoder's features of every position."""
  x = np.repeat(net['mask_token'][None], len(tokens), 0)
  x = np.repeat(x, len(table), 1)
  for row, seen, z in zip(
    x, visible, linear(net['embed'], tokens), strict=True
  ):
    row[seen] = z
  x = blocks(net, x + table, heads)[-1]
  return linear(net['head'], layer_norm(net['norm'], x))


def student(params, video, patch, heads, visible):
  """Returns the residual stream, and {teacher: features of all patches}."""
  grid = tuple(n // p for n, p in zip(video.shape[1:4], patch, strict=True))
  net = params['encoder']
  table = student_table(grid, net['embed']['bias'].size)
  found = stream(net, video, patch, heads, table, visible)
  tokens = layer_norm(net['norm'], found[-1])
  predicted = {}
  for role, head in params.items():
    if role.startswith('decoder_'):
      table = student_table(grid, head['embed']['bias'].size)
      predicted[role[8:]] = decode(head, tokens, visible, table, heads)
  return found, predicted


# --- losses


def distance(x, target, kind):
  """Returns the mean over channels of square or smooth L1."""
  d = np.abs(x - target)
  if kind == 'smooth_l1':
    return np.where(d < 1, d**2 / 2, d - 0.5).mean(-1)
  return (d**2).mean(-1)


def smoothed_and_weights(loss, value, window, alpha, tau):
  """Returns DARE's Lhat and w of the masked patches of one clip."""
  score = np.exp(window / tau - np.max(window / tau))
  return alpha * loss + (1 - alpha) * value, score / score.sum()


def dare(views, target, name, value, window, knobs):
  """Returns DARE of one teacher: per clip, new value and weights [B, N]."""
  terms, new, weights = [], value.copy(), np.zeros(value.shape)
  for b in range(len(value)):
    found = {}
    for view in views:
      masked = view['masked'][b]
      losses = distance(
        view['predicted'][name][b][masked],
        target[b][masked],
        knobs['feature_loss'],
      )
      for p, one in zip(masked, losses, strict=True):
        found.setdefault(int(p), []).append(one)
    cells = sorted(found)
    loss = np.array([np.mean(found[p]) for p in cells])
    lhat, w = smoothed_and_weights(
      loss, value[b, cells], window[b, cells], knobs['alpha'], knobs['tau']
    )
    if knobs['dare'] == 'smooth':
      w = np.full(len(cells), 1 / len(cells))
    term = (w * (loss if knobs['dare'] == 'weights' else lhat)).sum()
    terms.append(term / len(cells) if knobs['df_extra_mean'] else term)
    new[b, cells], weights[b, cells] = lhat, w
  return np.array(terms), new, weights


def third(depth, number):
  """Returns the layers, from 1, of the shallow, middle or deep third."""
  return range(number * depth // 3 + 1, (number + 1) * depth // 3 + 1)


def alignment(view, maps, layers, norm, pairs):
  """Returns CLFA of one teacher, over visible patches.

  With `pairs` the published mean over all pairs of layers; else to the mean
  of the teacher's layers.
  """
  total = 0.0
  for group in (0, 1):
    wanted = [
      norm(at(layers[m], view['visible']))
      for m in third(len(layers) - 1, group + 1)
    ]
    wanted = wanted if pairs else [np.mean(wanted, 0)]
    for_layers = []
    for n in third(len(view['features']) - 1, group):
      mapped = linear(maps[f'layer_{n:02d}'], norm(view['features'][n]))
      for_layers.append([((mapped - x) ** 2).mean() for x in wanted])
    total += np.mean(for_layers)
  return total


def progressive(view, name, hidden_before):
  """Returns PSD of one teacher by patch: hidden from the guide too, or not.

  `hidden_before` True, False or None for all of the masked patches.
  """
  found = []
  for b, masked in enumerate(view['masked']):
    before = np.isin(masked, view['before'][b])
    some = masked[before == hidden_before] if hidden_before is not None else (
      masked
    )  # fmt: skip
    found.append(
      distance(view['predicted'][name][b], view['guide'][name][b], 'mse')[some]
    )
  found = np.concatenate(found)
  return found.mean() if found.size else 0.0


def whole(views, maps, teachers, rows, substituted, grid, **knobs):
  """Returns loss, metrics and new rows.

  Args:
    views: of each mask `visible`, `masked`, `features`, `predicted`, and where
      a student guides `guide` and what is `before` masked for it.
    maps: teacher -> CLFA's linear maps; empty without.
    teachers: teacher -> residual stream.
    rows: teacher -> (value, window); empty without.
    substituted: [B].
    grid: tokens along (time, height, width).
    **knobs: that differ from `KNOBS`.
  """
  knobs = KNOBS | knobs
  t = grid[0]
  norm = normed if knobs['align_norm'] == 'ln' else lambda x: x
  out, new, metrics = 0.0, {}, {}
  guided = 'guide' in views[0]
  for name, layers in teachers.items():
    target = normed(layers[-1]) if knobs['target_norm'] == 'ln' else layers[-1]
    metrics[f'target/std/{name}'] = layers[-1].std()
    base = np.mean(
      [
        distance(
          at(v['predicted'][name], v['masked']),
          at(target, v['masked']),
          knobs['feature_loss'],
        ).mean()
        for v in views
      ]
    )
    metrics[f'loss/base/{name}'] = base
    out += knobs['lambda_base'] * base
    if name in rows:
      value, window = rows[name]
      if knobs['memory_shape'] == 'tube':
        value, window = (np.tile(x, (1, t)) for x in (value, window))
      terms, after, w = dare(views, target, name, value, window, knobs)
      metrics[f'loss/difficulty/{name}'] = np.mean(terms * ~substituted)
      out += knobs['lambda_df'] * metrics[f'loss/difficulty/{name}']
      entropy = -scipy.special.xlogy(w, w).sum(1) / np.log((w > 0).sum(1))
      metrics[f'dare/entropy/{name}'] = entropy.mean()
      metrics[f'dare/max_weight/{name}'] = w.max()
      metrics[f'example_memory/filled/{name}'] = (
        (rows[name][0] != 0).any(1).mean()
      )
      if knobs['memory_shape'] == 'tube':
        # Of the masked time steps of a position; an unmasked one keeps it.
        by_time = np.ma.masked_array(after, w == 0).reshape(len(w), t, -1)
        after = by_time.mean(1).filled(rows[name][0])
      new[name] = after
    if name in maps:
      means, pairs = (
        np.mean([alignment(v, maps[name], layers, norm, p) for v in views])
        for p in (False, True)
      )
      metrics[f'loss/alignment/{name}'] = pairs
      out += knobs['lambda_al'] * means
  if guided:
    by_place = {
      place: np.mean(
        [sum(progressive(v, name, place) for name in teachers) for v in views]
      )
      for place in (None, True, False)
    }
    place = None if knobs['pg_positions'] == 'masked' else True
    metrics['loss/progressive'] = by_place[place]
    metrics['pg/both_masked'] = by_place[True]
    metrics['pg/visible_to_previous'] = by_place[False]
    out += knobs['lambda_pg'] * by_place[place]
  return out, metrics, new
