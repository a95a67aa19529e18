"""The phases of runs side by side: what each saves or costs, as ratios.

    python -m vssl_jax.bench --config=configs/layerlock_2b.py:L --sweep=phases \
      --config.method.schedule='((0, 1), (6, 1), (12, 1), (18, 1))' \
      --config.method.total=4 --out=locks.json
    python -m vssl_jax.bench --config=configs/pmd_k400.py:B --sweep=phases \
      --against=configs/mvd_k400.py:B

Where the states of all phases fit beside each other, the phases take turns
step by step, so that a neighbour on the machine slows all of them alike. Wall
time is what counts; on a busy CPU processor time says more.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from vssl_jax import config as config_lib
from vssl_jax import encoders, methods, sharding, timing, trees
from vssl_jax.data import options
from vssl_jax.methods import base
from vssl_jax.train import ahead, freezing, memory, provenance
from vssl_jax.train import run as run_lib

GIB = 2**30
# Column -> key of a row; each is shown as a ratio to the first phase.
RATIOS = {
  'FLOPs': 'flops_per_clip',
  'compiled': 'compiled_flops_per_clip',
  'step': 'step_seconds',
  'processor': 'processor_seconds',
  'memory': 'memory_bytes',
  'activations': 'activation_bytes',
  'optimizer': 'optimizer_bytes',
  'gradients': 'gradient_bytes',
}


@dataclasses.dataclass(frozen=True)
class Entry:
  """One phase of one run.

  Attributes:
    label: what its row is called.
    config: of the run.
    method: of the run.
    span: the phase.
    video: (T, H, W, C) of a clip.
  """

  label: str
  config: ml_collections.ConfigDict
  method: base.Method
  span: run_lib.Span
  video: tuple[int, ...]

  def outline(self) -> ahead.Outline:
    """Returns the phase in shapes."""
    return ahead.outline(self.config, self.method, self.span, self.video)


def entries(config: ml_collections.ConfigDict, label: str = '') -> list[Entry]:
  """Returns every phase of a run.

  Args:
    config: a resolved config.
    label: put before the phases' names.
  """
  video = options.spec(config.data.to_dict()).shape
  method = methods.build(
    config.method, video, encoders.module_of, options.colours_of(config.data)
  )
  return [
    Entry(f'{label}{span.phase.name}', config, method, span, video)
    for span in run_lib.spans(method)
  ]


def phases(
  compared: Sequence[Entry],
  *,
  steps: int = 30,
  say: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Measures phases at the batch size of their config.

  Args:
    compared: of `entries`, of one config or of several with the same mesh and
      batch size.
    steps: timed steps of each phase.
    say: takes the table, line by line.

  Returns:
    What `--out` writes; `results` has one entry per phase, with `ratios` to
    the first.

  Raises:
    ValueError: their batch sizes or meshes differ.
  """
  config = compared[0].config
  for entry in compared:
    for key, *two in (
      ('batch_size', config.batch_size, entry.config.batch_size),
      ('mesh', config.mesh.to_dict(), entry.config.mesh.to_dict()),
    ):
      if two[0] != two[1]:
        raise ValueError(
          f'{entry.label}: {key} is {two[1]}, and {two[0]} in what it is '
          f'compared with; set --config.{key} for both'
        )
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  outlines = [entry.outline() for entry in compared]
  together = _fit_together(outlines, mesh)
  groups = [list(compared)] if together else [[entry] for entry in compared]
  rows = [row for group in groups for row in _timed(group, mesh, steps)]
  for row, entry, shapes in zip(rows, compared, outlines, strict=True):
    row.update(_counted(entry, shapes, mesh))
    row['ratios'] = {
      name: row[key] / rows[0][key] if rows[0][key] else float('nan')
      for name, key in RATIOS.items()
    }
  for line in table(rows):
    say(line)
  return {
    'devices': mesh.size,
    'batch_size': config.batch_size,
    'video': list(compared[0].video),
    'steps': steps,
    'taking_turns': together,
    'results': rows,
    'provenance': provenance.describe(config_lib.to_json(config)),
  }


def _fit_together(
  outlines: Sequence[ahead.Outline], mesh: jax.sharding.Mesh
) -> bool:
  """Returns whether the states of all phases leave half of a device free."""
  stats = mesh.devices.flat[0].memory_stats() or {}
  size = stats.get('bytes_limit', float('inf'))
  need = sum(trees.nbytes(o.state) + trees.nbytes(o.teachers) for o in outlines)
  return need / mesh.size < size / 2


def _timed(
  group: Sequence[Entry], mesh: jax.sharding.Mesh, steps: int
) -> list[dict[str, Any]]:
  """Returns times and the compiler's figures of phases that take turns."""
  size = group[0].config.batch_size
  with jax.set_mesh(mesh):
    prepared = [
      timing.prepare(e.config, e.method, e.span, size, e.video, mesh)
      for e in group
    ]
  states = [p.state for p in prepared]
  wall = np.zeros((steps, len(prepared)))
  processor = np.zeros_like(wall)
  for i in range(-timing.WARM_UP, steps):
    for j, p in enumerate(prepared):
      start, cpu = time.perf_counter(), time.process_time()
      states[j], values = p.compiled(states[j], p.teachers, p.batch)
      jax.block_until_ready((states[j], values))
      if i >= 0:
        wall[i, j] = time.perf_counter() - start
        processor[i, j] = time.process_time() - cpu
  rows = []
  for j, p in enumerate(prepared):
    found = p.compiled.memory_analysis()
    kept = found.argument_size_in_bytes - found.alias_size_in_bytes
    kept += found.output_size_in_bytes + found.temp_size_in_bytes
    rows.append(
      {
        'step_seconds': float(np.median(wall[:, j])),
        'step_seconds_quartiles': np.percentile(wall[:, j], (25, 75)).tolist(),
        'processor_seconds': float(np.median(processor[:, j])),
        'compile_seconds': p.compile_seconds,
        'compiled_flops_per_clip': (
          p.compiled.cost_analysis()['flops'] * mesh.size / size
        ),
        'memory_bytes': kept,
        'memory_source': 'compiler of these devices',
      }
    )
  return rows


def _counted(
  entry: Entry, shapes: ahead.Outline, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
  """Returns what follows from shapes and closed forms."""
  config, method, video = entry.config, entry.method, entry.video
  _, frozen = freezing.split(shapes.state.params, shapes.labels)
  cost = method.cost(shapes.span.phase, video)
  need = memory.per_device(
    config, method, shapes, video, mesh.shape['data'], mesh.shape['fsdp']
  )
  return {
    'phase': entry.label,
    'frozen_parameters': trees.count(frozen),
    'parameters': trees.count(shapes.state.params),
    'flops_per_clip': cost.total,
    'target_flops_per_clip': cost.frozen,
    'parameter_bytes': need['parameters'],
    'gradient_bytes': need['gradients'],
    'optimizer_bytes': need['optimizer'],
    'activation_bytes': need.get('activations', 0.0),
  }


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
  """Returns the ratios to the first phase as lines."""
  width = max(len(row['phase']) for row in rows)
  lines = [
    f'{"phase":{width}} {"frozen":>7} '
    + ' '.join(f'{name:>11}' for name in RATIOS)
  ]
  for row in rows:
    share = row['frozen_parameters'] / row['parameters']
    lines.append(
      f'{row["phase"]:{width}} {share:7.0%} '
      + ' '.join(f'{row["ratios"][name]:11.3f}' for name in RATIOS)
    )
  first = rows[0]
  lines.append(
    f'1 is: {first["flops_per_clip"] / 1e12:.3g} TF per clip, '
    f'{first["compiled_flops_per_clip"] / 1e12:.3g} by the compiler (loops '
    f'counted once), {first["step_seconds"]:.3g} s, '
    f'{first["processor_seconds"]:.3g} processor seconds, '
    f'{first["memory_bytes"] / GIB:.3g} GiB ({first["memory_source"]}), '
    f'{first["activation_bytes"] / GIB:.3g} GiB of activations by formula, '
    f'{first["optimizer_bytes"] / GIB:.3g} GiB of optimizer and '
    f'{first["gradient_bytes"] / GIB:.3g} GiB of gradients'
  )
  return lines
