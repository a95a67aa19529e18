"""Hiera here and in the package `hiera-transformer`, on the same machine.

    python -m tests.benchmarks.hiera_peer --size=B --batch=8 --out=peer.json

Run by hand where the package is installed, see launch/parity.txt. Both do, in
turn and a few times:

    dense/forward    all units, three poolings, the mean over tokens
    dense/step       that under a mean square, its gradient, AdamW
    masked/forward   the units that --mask_ratio keeps, the ends of all stages
    masked/step      Hiera-MAE: that, its decoder and loss, gradient, AdamW

Ratios are their seconds over ours: above 1 we are faster. Parameters are
float32, products bfloat16 (--float32: both float32); torch by autocast, with
torch.compile unless --no-compile; input on the device; no remat. Bound to one
core (`taskset -c 0`) processor seconds are taken, else wall seconds. That both
compute the same is for tests/weights/test_hiera_parity.py to say.
"""

import argparse
import functools
import json
import os
import pathlib
import sys
import time

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from tests.weights import published_hiera
from vssl_jax import flops, losses
from vssl_jax.checkpoint import provenance
from vssl_jax.masks import hiera_units, sampling, tubelets
from vssl_jax.models.hiera import decoder as decoder_lib
from vssl_jax.models.hiera import encoder as encoder_lib

WARM_UP = 2
# Of one core that others use too, processor seconds are what can be compared.
ONE_CORE = len(os.sched_getaffinity(0)) == 1 and not torch.cuda.is_available()
CLOCK = time.process_time if ONE_CORE else time.perf_counter
CASES = ('dense/forward', 'dense/step', 'masked/forward', 'masked/step')
COLOURS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def shape_of(size):
  """Returns channels, depths and heads; `tiny` is for trying this script."""
  if size == 'tiny':
    return dict(channels=32, depths=(1, 1, 2, 1), num_heads=1)
  return encoder_lib.SIZES[size]


def visible(args, grid):
  """Returns the kept units of each clip, the same for both."""
  units = int(np.prod(grid))
  kept, _ = sampling.counts(units, args.mask_ratio, 'visible_floor')
  rng = np.random.default_rng(0)
  rows = [rng.permutation(units)[:kept] for _ in range(args.batch)]
  return np.sort(np.stack(rows), axis=1).astype(np.int32)


def ours(args, case, video):
  """Returns what runs the case once and waits for it, and its FLOPs."""
  which, what = case.split('/')
  encoder = encoder_lib.make(
    shape_of(args.size),
    q_pool=3 if which == 'dense' else 2,
    dtype='float32' if args.float32 else 'bfloat16',
  )
  clips, key = jnp.asarray(video), jax.random.key(0)
  params = {'encoder': jax.jit(encoder.init)(key, clips)['params']}
  grid = encoder.unit_grid(video.shape)
  mask = sampling.partition(
    jnp.asarray(visible(args, grid)), int(np.prod(grid))
  )
  decoder = decoder_lib.Decoder(768, dtype=encoder.dtype)

  def forward(params, clips):
    variables = {'params': params['encoder']}
    if which == 'dense':
      return jnp.mean(encoder.apply(variables, clips), axis=1)
    return encoder.apply(variables, clips, mask.visible, features=True)

  def loss(params, clips):
    found = forward(params, clips)
    if which == 'dense':
      return jnp.mean(jnp.square(found))
    found = decoder.apply({'params': params['decoder']}, found, mask, grid)
    at = hiera_units.expand_units(mask.masked, grid)
    return losses.mse(
      found, sampling.gather(decoder_lib.targets(clips, encoder), at)
    )

  tokens = tubelets.grid_of(video.shape, encoder.patch)
  seen, hidden = (4 * x.shape[1] for x in mask)
  count = None if which == 'dense' else seen
  if what == 'forward':
    run = jax.jit(forward)
    cost = flops.forward(encoder, tokens, count)
    return lambda: jax.block_until_ready(run(params, clips)), cost
  cost = flops.train(encoder, tokens, count)
  if which == 'masked':
    ends = jax.jit(forward)(params, clips)
    init = jax.jit(lambda x: decoder.init(key, x, mask, grid))
    params['decoder'] = init(ends)['params']
    cost += flops.train(decoder, tokens, (seen, hidden), encoder.width)
  tx = optax.adamw(1e-4, weight_decay=0.05)

  @functools.partial(jax.jit, donate_argnums=0)
  def update(state, clips):
    params, opt = state
    value, grads = jax.value_and_grad(loss)(params, clips)
    updates, opt = tx.update(grads, opt, params)
    return (optax.apply_updates(params, updates), opt), value

  state = [(params, jax.jit(tx.init)(params))]

  def step():
    state[0], value = update(state[0], clips)
    jax.block_until_ready(value)

  return step, cost


def theirs(args, case, video):
  """Returns what runs the case once and waits for it, in torch."""
  which, what = case.split('/')
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  shape = shape_of(args.size)
  fields = dict(
    input_size=video.shape[1:4], embed_dim=shape['channels'],
    num_heads=shape['num_heads'], stages=shape['depths'], q_stride=(1, 2, 2),
    mask_unit_size=(1, 8, 8), patch_kernel=(3, 7, 7), patch_stride=(2, 4, 4),
    patch_padding=(1, 3, 3), sep_pos_embed=True,
  )  # fmt: skip
  package = published_hiera.load()
  torch.manual_seed(0)
  if which == 'dense':
    model = package.Hiera(q_pool=3, **fields)
    model.norm = model.head = torch.nn.Identity()
  else:
    model = package.MaskedAutoencoderHiera(
      q_pool=2, decoder_num_heads=8, **fields
    )
  model = model.to(device).train()
  pixels = torch.tensor(video.transpose(0, 4, 1, 2, 3), device=device)
  mean, std = (
    torch.tensor(x, device=device).reshape(1, 3, 1, 1, 1) for x in COLOURS
  )
  grid = encoder_lib.make(shape).unit_grid(video.shape)
  mask = torch.zeros(args.batch, int(np.prod(grid)), dtype=torch.bool)
  mask.scatter_(1, torch.tensor(visible(args, grid)).long(), True)
  mask = mask.to(device)

  def run(clips):
    if which == 'dense':
      return model(clips)
    if what == 'step':
      return model(clips, mask=mask)[0]
    return package.Hiera.forward(model, clips, mask, True)[1]

  compiled = torch.compile(run) if args.compile else run
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=1e-4, weight_decay=0.05, fused=True
  )

  def once():
    clips = (pixels.float() / 255 - mean) / std
    kind = dict(dtype=torch.bfloat16, enabled=not args.float32)
    with torch.set_grad_enabled(what == 'step'):
      with torch.autocast(device, **kind):
        found = compiled(clips)
      if what == 'step':
        loss = found if which == 'masked' else found.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if device == 'cuda':
      torch.cuda.synchronize()

  return once


def seconds(run, steps):
  """Returns how long each of a few runs takes."""
  found = []
  for _ in range(steps):
    start = CLOCK()
    run()
    found.append(CLOCK() - start)
  return found


def measure(args, case, video):
  """Returns the figures of one case, ours and theirs in turn."""
  mine, cost = ours(args, case, video)
  runs = {'ours': mine, 'theirs': theirs(args, case, video)}
  first = {name: seconds(run, 1)[0] for name, run in runs.items()}
  for run in runs.values():
    seconds(run, WARM_UP)
  taken = {name: [] for name in runs}
  for _ in range(args.rounds):
    for name, run in runs.items():
      taken[name] += seconds(run, args.steps)
  median = {name: float(np.median(x)) for name, x in taken.items()}
  return {
    'case': case,
    'ratio': median['theirs'] / median['ours'],
    'seconds': median,
    'quartiles': {
      name: np.percentile(x, (25, 75)).tolist() for name, x in taken.items()
    },
    'first_seconds': first,
    'clips_per_s': {name: args.batch / x for name, x in median.items()},
    'flops_per_clip': cost,
    'flops_per_s': cost * args.batch / median['ours'],
  }


def flags():
  """Returns the command line."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument(
    '--size', choices=['tiny', *encoder_lib.SIZES], default='B'
  )
  parser.add_argument('--frames', type=int, default=16)
  parser.add_argument('--side', type=int, default=224)
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--mask_ratio', type=float, default=0.9)
  parser.add_argument('--steps', type=int, default=10, help='of a round')
  parser.add_argument('--rounds', type=int, default=3, help='of both in turn')
  parser.add_argument('--cases', default=','.join(CASES))
  parser.add_argument('--no-compile', dest='compile', action='store_false')
  parser.add_argument('--float32', action='store_true', help='no bfloat16')
  parser.add_argument('--out', default='')
  return parser.parse_args()


def write(args, shape, results):
  """Writes what there is so far."""
  record = provenance.describe(vars(args))
  record['clock'] = CLOCK.__name__
  record['versions'] |= {'torch': torch.__version__}
  record['versions'] |= {'hiera-transformer': published_hiera.version()}
  if torch.cuda.is_available():
    record['device'] = torch.cuda.get_device_name()
  report = {'video': shape, 'results': results, 'provenance': record}
  if args.out:
    out = pathlib.Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + '\n')


def main():
  """Prints and writes the result, case by case."""
  args = flags()
  shape = (args.batch, args.frames, args.side, args.side, 3)
  video = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  results = []
  for case in args.cases.split(','):
    results.append(measure(args, case, video))
    taken = results[-1]['seconds']
    print(
      f'{case:15} ours {1e3 * taken["ours"]:9.1f} ms  theirs '
      f'{1e3 * taken["theirs"]:9.1f} ms  ratio {results[-1]["ratio"]:.2f}',
      flush=True,
    )
    write(args, shape, results)
  return 0


if __name__ == '__main__':
  sys.exit(main())
