"""Compares phases of runs: time, memory and FLOPs as ratios to the first.

    python -m vssl_jax.planning.bench --config=configs/layerlock_2b.py:L \
      --sweep=phases \
      --config.method.schedule='((0, 1), (6, 1), (12, 1), (18, 1))' \
      --config.method.total=4 --out=locks.json
    python -m vssl_jax.planning.bench --config=configs/pmd_k400.py:B \
      --sweep=phases --against=configs/mvd_k400.py:B

If the states of all phases fit into memory together, the phases alternate step
by step, so that other load on the machine slows all of them alike. The measure
is wall time; on a busy CPU, processor time is more reliable.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from vssl_jax import encoder, methods, sharding, trees
from vssl_jax.checkpoint import provenance
from vssl_jax.data import options
from vssl_jax.planning import memory, timing
from vssl_jax.train import freezing, phase_setup
from vssl_jax.train import run as run_lib
from vssl_jax.utils import config_io

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
    label: name of its row.
    config: config of the run.
    span: the phase.
    video: (T, H, W, C) of a clip.
  """

  label: str
  config: ml_collections.ConfigDict
  span: run_lib.Span
  video: tuple[int, ...]

  def build(self) -> phase_setup.PhaseSetup:
    """Returns the setup of the phase, as shapes."""
    return phase_setup.build(self.config, self.span, self.video)


def entries(config: ml_collections.ConfigDict, label: str = '') -> list[Entry]:
  """Returns every phase of a run.

  Args:
    config: a resolved config.
    label: prefix of the phases' names.
  """
  video = options.spec(config.data.to_dict()).shape
  phases = methods.build(
    config.method, video, encoder.module_of, options.colours_of(config.data)
  )
  return [
    Entry(f'{label}{span.phase.name}', config, span, video)
    for span in run_lib.spans(phases)
  ]


def phases(
  compared: Sequence[Entry],
  *,
  steps: int = 30,
  say: Callable[[str], None] = print,
) -> dict[str, Any]:
  """Measures phases at the batch size of their config.

  Args:
    compared: phases from `entries`, of one config or of several with the same
      mesh and batch size.
    steps: number of timed steps of each phase.
    say: called with each line of the table.

  Returns:
    The dict that `--out` writes; `results` has one entry per phase, with
    `ratios` to the first.

  Raises:
    ValueError: batch sizes or meshes differ.
  """
  config = compared[0].config
  for entry in compared:
    for key, *values in (
      ('batch_size', config.batch_size, entry.config.batch_size),
      ('mesh', config.mesh.to_dict(), entry.config.mesh.to_dict()),
    ):
      if values[0] != values[1]:
        raise ValueError(
          f'{entry.label}: {key} is {values[1]}, and {values[0]} in the '
          f'reference; set --config.{key} for both'
        )
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  setups = [entry.build() for entry in compared]
  together = _fit_together(setups, mesh)
  groups = [list(compared)] if together else [[entry] for entry in compared]
  rows = [row for group in groups for row in _timed(group, mesh, steps)]
  for row, entry, setup in zip(rows, compared, setups, strict=True):
    row.update(_counted(entry, setup, mesh))
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
    'provenance': provenance.describe(config_io.to_json(config)),
  }


def _fit_together(
  setups: Sequence[phase_setup.PhaseSetup], mesh: jax.sharding.Mesh
) -> bool:
  """Returns whether the states of all phases leave half of a device free."""
  stats = mesh.devices.flat[0].memory_stats() or {}
  size = stats.get('bytes_limit', float('inf'))
  need = sum(trees.nbytes(o.state) + trees.nbytes(o.teachers) for o in setups)
  return need / mesh.size < size / 2


def _timed(
  group: Sequence[Entry], mesh: jax.sharding.Mesh, steps: int
) -> list[dict[str, Any]]:
  """Returns step times and compiler figures of alternating phases."""
  size = group[0].config.batch_size
  with jax.set_mesh(mesh):
    prepared = [
      timing.prepare(e.config, e.span, size, e.video, mesh) for e in group
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
    analysis = p.compiled.memory_analysis()
    nbytes = analysis.argument_size_in_bytes - analysis.alias_size_in_bytes
    nbytes += analysis.output_size_in_bytes + analysis.temp_size_in_bytes
    rows.append(
      {
        'step_seconds': float(np.median(wall[:, j])),
        'step_seconds_quartiles': np.percentile(wall[:, j], (25, 75)).tolist(),
        'processor_seconds': float(np.median(processor[:, j])),
        'compile_seconds': p.compile_seconds,
        'compiled_flops_per_clip': (
          p.compiled.cost_analysis()['flops'] * mesh.size / size
        ),
        'memory_bytes': nbytes,
        'memory_source': 'compiler of these devices',
      }
    )
  return rows


def _counted(
  entry: Entry, setup: phase_setup.PhaseSetup, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
  """Returns the figures that follow from shapes and closed forms."""
  config, video = entry.config, entry.video
  _, frozen = freezing.split(setup.state.params, setup.labels)
  cost = setup.span.phase.cost(video)
  needs = memory.per_device(
    config, setup, video, mesh.shape['data'], mesh.shape['fsdp']
  )
  return {
    'phase': entry.label,
    'frozen_parameters': trees.count(frozen),
    'parameters': trees.count(setup.state.params),
    'flops_per_clip': cost.total,
    'target_flops_per_clip': cost.frozen,
    'parameter_bytes': needs['parameters'],
    'gradient_bytes': needs['gradients'],
    'optimizer_bytes': needs['optimizer'],
    'activation_bytes': needs.get('activations', 0.0),
  }


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
  """Returns the table of ratios to the first phase, as lines."""
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
