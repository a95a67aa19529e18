"""Memory per device of a phase's train step, and the devices it fits on.

All parts but activations are exact: they follow from shapes and shardings, and
no device is needed. Activations are a closed-form estimate that includes
neither the compiler's scratch space nor gathered weights.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import ml_collections

from vssl_jax import sharding, trees
from vssl_jax.target_cache import store
from vssl_jax.train import freezing, phase_setup

GIB = 2**30

# Bytes as stated by the vendors, 1 GB = 1e9 bytes: 4 to 7 % less than the
# devices have. The difference is left to the runtime.
DEVICES = {
  '4090 24 GB': 24e9,
  'H100 80 GB': 80e9,
  'H200 141 GB': 141e9,
  'TPU v5p 95 GB': 95e9,
  'TPU v6e 32 GB': 32e9,
}
MESHES = (1, 8, 64, 256)
EXACT = ('parameters', 'gradients', 'optimizer')
COLUMNS = (*EXACT, 'other', 'activations', 'total')


def per_device(
  config: ml_collections.ConfigDict,
  setup: phase_setup.PhaseSetup,
  video: tuple[int, ...],
  data: int,
  fsdp: int,
) -> dict[str, float]:
  """Returns bytes per device by purpose, without purposes of 0 bytes.

  Args:
    config: a resolved config.
    setup: setup of the phase.
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

  # Names within the whole state: sharding overrides match these names.
  leaves = trees.named_leaves(setup.state)

  def part(name: str) -> float:
    return share(leaf for leaf in leaves if leaf[0].startswith(f'{name}/'))

  is_trained = [x == freezing.TRAIN for x in jax.tree.leaves(setup.labels)]
  params = [leaf for leaf in leaves if leaf[0].startswith('params/')]
  local = config.batch_size / (data * fsdp)
  activations = setup.span.phase.cost(video).activations
  cached = setup.cached
  target_nbytes = store.row_nbytes(cached.stored) if cached else 0
  needs = {
    'parameters': share(params),
    'gradients': share(itertools.compress(params, is_trained)),
    'optimizer': part('opt'),
    'averages': part('ema'),
    'teachers': share(trees.named_leaves(setup.teachers)),
    'example_memory': part('example_memory'),
    # Two batches: one in use, the next one in transfer.
    'batch': 2 * local * (math.prod(video) + target_nbytes),
    'activations': local / config.optim.accumulate * activations,
  }
  return {k: v for k, v in needs.items() if v}


def _pieces(spec: Any, axes: Mapping[str, int]) -> int:
  """Returns the number of devices that a leaf is sharded over."""
  names = [n for part in spec for n in _names(part)]
  return math.prod(axes[n] for n in names)


def _names(part: Any) -> tuple[str, ...]:
  if part is None:
    return ()
  return (part,) if isinstance(part, str) else tuple(part)


def fits(
  config: ml_collections.ConfigDict,
  setups: Sequence[phase_setup.PhaseSetup],
  video: tuple[int, ...],
) -> list[str]:
  """Returns the table of devices that the run fits on, as lines.

  Args:
    config: a resolved config; its batch size is used, its mesh is not.
    setups: phases in the table.
    video: (T, H, W, C) of a clip.
  """
  width = max(len(o.span.phase.name) for o in setups)
  lines = [
    f'fits, in GiB per device at batch {config.batch_size}: parameters, '
    'gradients, optimizer and other are exact (shapes and shardings),',
    'activations an estimate by formula, not a figure of a compiler; '
    'other is averages, teachers, example memory and two batches with '
    'their stored targets; yes or no, with the GiB that are left or missing',
    _row('data x fsdp', 'phase', width, COLUMNS, DEVICES),
  ]
  for devices in MESHES:
    if config.batch_size % (devices * config.optim.accumulate):
      lines.append(
        f'{devices}: batch {config.batch_size} does not divide over '
        f'{devices} x {config.optim.accumulate} micro-batches'
      )
      continue
    data, needs = _best(config, setups, video, devices)
    for setup, need in zip(setups, needs, strict=True):
      lines.append(
        _row(
          f'{data} x {devices // data}',
          setup.span.phase.name,
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
  setups: Sequence[phase_setup.PhaseSetup],
  video: tuple[int, ...],
  devices: int,
) -> tuple[int, list[tuple[float, ...]]]:
  """Returns the size of `data` that needs the least memory, and its bytes.

  The bytes are one table row per phase. The size exceeds 1 where a width has no
  divisor as large as the mesh: 1,664 channels split over 128 devices and not
  over 256.
  """
  needs = {
    data: [_needs(config, o, video, data, devices // data) for o in setups]
    for data in (1, 2, 4)
    if data <= devices
  }
  data = min(needs, key=lambda d: max(need[-1] for need in needs[d]))
  return data, needs[data]


def _needs(
  config: ml_collections.ConfigDict,
  setup: phase_setup.PhaseSetup,
  video: tuple[int, ...],
  data: int,
  fsdp: int,
) -> tuple[float, ...]:
  """Returns one table row of bytes, in the order of `COLUMNS`."""
  needs = per_device(config, setup, video, data, fsdp)
  exact = [needs.get(k, 0.0) for k in EXACT]
  total, activations = sum(needs.values()), needs.get('activations', 0.0)
  return (*exact, total - sum(exact) - activations, activations, total)


def _verdict(size: float, need: float) -> str:
  free = (size - need) / GIB
  return f'{"yes" if free >= 0 else "no"} {free:+.1f}'


def _micro_batches(
  config: ml_collections.ConfigDict,
  needs: Sequence[tuple[float, ...]],
  devices: int,
) -> list[str]:
  """Returns a line with the micro-batches needed to fit on small devices."""
  entries = []
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
    entries.append(f'{name} {f"with {fitting[0]}" if fitting else "with none"}')
  if not entries:
    return []
  return [
    f'{"":13}micro-batches that fit (--config.optim.accumulate): '
    + ', '.join(entries)
  ]


def _powers(local: int) -> list[int]:
  """Returns the powers of two that divide the clips of a device."""
  return [2**i for i in range(local.bit_length()) if local % 2**i == 0]
