"""What a step was given and what came out, written down to be compared.

    <workdir>/probes/00012001.json    step 12,001: its clips, and sums over the
                                      bits of the state before, of the batch
                                      and of the state after

The sums are of `manifests.bit_sums`: computed on the device, the same on any
mesh. `replay` takes such a step again.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging

from vssl_jax import sharding, trees
from vssl_jax.train import manifests, provenance
from vssl_jax.train.run import Run, Span


def folder_of(workdir: pathlib.Path) -> pathlib.Path:
  """Returns where the records of a run are."""
  return workdir / 'probes'


def paths(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Returns the files of the records of a run, by step."""
  files = sorted(folder_of(workdir).glob('*.json'))
  return [path for path in files if path.stem.isdigit()]


def listing(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the records of a run, by step; those that are intact."""
  records = []
  for path in paths(workdir):
    try:
      records.append(manifests.load(path))
    except manifests.CorruptError as error:
      logging.warning('passing over a recorded step: %s', error)
  return records


def sums(tree: Any) -> dict[str, list[int]]:
  """Returns name -> sum over the bits of every leaf, once it is there."""
  found = manifests.bit_sums(dict(trees.named_leaves(tree)))
  return {k: [int(x) for x in v] for k, v in jax.device_get(found).items()}


class Probes:
  """Records a step of a phase now and then.

  Each part is waited for. Programs that several processes share must not run
  side by side: on CPUs they then wait for each other for ever.

  Args:
    run: the run; `config.checkpoint.probe_every` says how often.
    span: the phase.
  """

  def __init__(self, run: Run, span: Span) -> None:
    self._run, self._span = run, span
    self._every = run.config.checkpoint.probe_every
    self._begun: dict[str, Any] | None = None

  def before(self, done: int, state: Any, batch: Mapping[str, Any]) -> None:
    """Looks at what a step is given, if it is to be recorded.

    Args:
      done: steps done. That of a multiple of the interval is recorded: its
        state may have a checkpoint. That of a phase's start has none.
      state: before the step; it may be donated afterwards.
      batch: of the step.
    """
    if not self._every or done % self._every or done == self._span.start:
      return
    whole = sharding.replicated(self._run.mesh)
    self._begun = {
      'step': done + 1,
      'phase': self._span.phase.name,
      'before': sums(state),  # first: it waits for the step that is under way
      'batch': sums(batch),
      'index': jax.device_get(
        jax.jit(lambda x: x, out_shardings=whole)(batch['index'])
      ).tolist(),
    }

  def after(self, state: Any) -> None:
    """Looks at what came out of a step that is recorded, and writes it."""
    if self._begun is None:
      return
    machine = provenance.machine() | {'mesh': dict(self._run.mesh.shape)}
    record = self._begun | {'after': sums(state), 'machine': machine}
    self._begun = None
    if jax.process_index():
      return
    folder = folder_of(self._run.workdir)
    folder.mkdir(exist_ok=True)
    manifests.write_atomic(folder / f'{record["step"]:08d}.json', record)
    self._prune()

  def _prune(self) -> None:
    """Removes records from before the oldest state that is kept."""
    kept = [s.step for s in self._run.checkpoints.whole()]
    for path in paths(self._run.workdir):
      if kept and int(path.stem) <= min(kept):
        path.unlink()
