"""Bytes per device that a phase's step needs, and what it fits on.

All but activations is exact: it follows from shapes and shardings, of which
no device is needed. Activations are a closed form that knows neither the
compiler's scratch space nor the weights that it gathers.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import ml_collections

from vssl_jax import sharding, trees
from vssl_jax.methods import base
from vssl_jax.train import ahead, freezing, target_store

GIB = 2**30

# Bytes as the vendors print them, 1 GB = 1e9: 4 to 7 % less than the devices
# have, which leaves the runtime its share.
DEVICES = {
  '4090 24 GB': 24e9,
  'H100 80 GB': 80e9,
  'H200 141 GB': 141e9,
  'TPU v5p 95 GB': 95e9,
  'TPU v6e 32 GB': 32e9,
}
MESHES = (1, 8, 64, 256)
EXACT = ('parameters', 'gradients', 'optimizer')
COLUMNS = (*EXACT, 'other', 'activations', 'in all')


def per_device(
  config: ml_collections.ConfigDict,
  method: base.Method,
  shapes: ahead.Outline,
  video: tuple[int, ...],
  data: int,
  fsdp: int,
) -> dict[str, float]:
  """Returns bytes per device by what they are for; only what there is.

  Args:
    config: a resolved config.
    method: its method.
    shapes: of the phase.
    video: (T, H, W, C) of a clip.
    data: size of the mesh's axis `data`.
    fsdp: size of the mesh's axis `fsdp`.
  """
  axes = {'data': data, 'fsdp': fsdp}
  overrides = dict(config.mesh.overrides)

  def share(named: Iterable[tuple[str, Any]]) -> float:
    return math.fsum(
      math.prod(x.shape)
      * x.dtype.itemsize
      / _pieces(sharding.spec(name, x.shape, axes, overrides), axes)
      for name, x in named
    )

  # By the names that the whole state gives its leaves: overrides see those.
  leaves = trees.named_leaves(shapes.state)

  def part(name: str) -> float:
    return share(leaf for leaf in leaves if leaf[0].startswith(f'{name}/'))

  is_trained = [x == freezing.TRAIN for x in jax.tree.leaves(shapes.labels)]
  params = [leaf for leaf in leaves if leaf[0].startswith('params/')]
  local = config.batch_size / (data * fsdp)
  activations = method.cost(shapes.span.phase, video).activations
  cached = shapes.cached
  kept = target_store.row_nbytes(cached.stored) if cached else 0
  found = {
    'parameters': share(params),
    'gradients': share(itertools.compress(params, is_trained)),
    'optimizer': part('opt'),
    'averages': part('ema'),
    'teachers': share(trees.named_leaves(shapes.teachers)),
    'rows': part('rows'),
    # One in use and the next one on its way.
    'batch': 2 * local * (math.prod(video) + kept),
    'activations': local / config.optim.accumulate * activations,
  }
  return {k: v for k, v in found.items() if v}


def _pieces(spec: Any, axes: Mapping[str, int]) -> int:
  """Returns over how many devices a leaf is split."""
  names = [n for part in spec for n in _names(part)]
  return math.prod(axes[n] for n in names)


def _names(part: Any) -> tuple[str, ...]:
  if part is None:
    return ()
  return (part,) if isinstance(part, str) else tuple(part)


def fits(
  config: ml_collections.ConfigDict,
  method: base.Method,
  outlines: Sequence[ahead.Outline],
  video: tuple[int, ...],
) -> list[str]:
  """Returns the table of what fits where, as lines.

  Args:
    config: a resolved config; its batch size is kept, its mesh is not.
    method: its method.
    outlines: the phases to show.
    video: (T, H, W, C) of a clip.
  """
  width = max(len(o.span.phase.name) for o in outlines)
  lines = [
    f'fits, in GiB per device at batch {config.batch_size}: parameters, '
    'gradients, optimizer and other are exact (shapes and shardings),',
    'activations an estimate by formula, none of it the figure of a compiler; '
    'other is averages, teachers, rows and two batches with what is kept of '
    'their targets; yes or no, with the GiB that are left or missing',
    _row('data x fsdp', 'phase', width, COLUMNS, DEVICES),
  ]
  for devices in MESHES:
    if config.batch_size % (devices * config.optim.accumulate):
      lines.append(
        f'{devices}: batch {config.batch_size} does not divide over '
        f'{devices} x {config.optim.accumulate} micro-batches'
      )
      continue
    data, needs = _best(config, method, outlines, video, devices)
    for shapes, need in zip(outlines, needs, strict=True):
      lines.append(
        _row(
          f'{data} x {devices // data}',
          shapes.span.phase.name,
          width,
          [f'{v / GIB:.2f}' for v in need],
          [_verdict(size, need[-1]) for size in DEVICES.values()],
        )
      )
    lines += _micro_batches(config, needs, devices)
  return lines


def _row(
  mesh: str, phase: str, width: int, needs: Iterable[str], ends: Iterable[str]
) -> str:
  return (
    f'{mesh:>11}  {phase:{width}}  '
    + ' '.join(f'{x:>11}' for x in needs)
    + '  '
    + ' '.join(f'{x:>13}' for x in ends)
  )


def _best(
  config: ml_collections.ConfigDict,
  method: base.Method,
  outlines: Sequence[ahead.Outline],
  video: tuple[int, ...],
  devices: int,
) -> tuple[int, list[tuple[float, ...]]]:
  """Returns the replicas that need the least memory, and the rows' bytes.

  More than one where a width has no divisor as large as the mesh: 1,664
  channels split over 128 devices and not over 256.
  """
  found = {
    data: [
      _needs(config, method, o, video, data, devices // data) for o in outlines
    ]
    for data in (1, 2, 4)
    if data <= devices
  }
  data = min(found, key=lambda d: max(need[-1] for need in found[d]))
  return data, found[data]


def _needs(
  config: ml_collections.ConfigDict,
  method: base.Method,
  shapes: ahead.Outline,
  video: tuple[int, ...],
  data: int,
  fsdp: int,
) -> tuple[float, ...]:
  """Returns the bytes of a row of the table."""
  found = per_device(config, method, shapes, video, data, fsdp)
  exact = [found.get(k, 0.0) for k in EXACT]
  total, activations = sum(found.values()), found.get('activations', 0.0)
  return (*exact, total - sum(exact) - activations, activations, total)


def _verdict(size: float, need: float) -> str:
  left = (size - need) / GIB
  return f'{"yes" if left >= 0 else "no"} {left:+.1f}'


def _micro_batches(
  config: ml_collections.ConfigDict,
  needs: Sequence[tuple[float, ...]],
  devices: int,
) -> list[str]:
  """Returns how many micro-batches make the tight devices fit."""
  answers = []
  for name, size in DEVICES.items():
    if all(need[-1] <= size for need in needs):
      continue
    fitting = [
      n
      for n in _powers(config.batch_size // devices)
      if n > config.optim.accumulate
      and all(
        need[-1] - need[-2] * (1 - config.optim.accumulate / n) <= size
        for need in needs
      )
    ]
    answers.append(f'{name} {f"with {fitting[0]}" if fitting else "with none"}')
  if not answers:
    return []
  return [
    f'{"":13}micro-batches that fit (--config.optim.accumulate): '
    + ', '.join(answers)
  ]


def _powers(local: int) -> list[int]:
  """Returns the powers of two that divide the clips of a device."""
  return [2**i for i in range(local.bit_length()) if local % 2**i == 0]
