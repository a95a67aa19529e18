"""Records checksums of the inputs and outputs of steps, for `replay`.

    <workdir>/step_records/00012001.json    step 12,001: its clips, and sums
                                            over the bits of the state before,
                                            of the batch and of the state after

The sums are computed on the device by `integrity.bit_sums` and are the same on
any mesh. `replay` runs such a step again.
"""

import pathlib
from typing import Any

import jax
from absl import logging

from vssl_jax import sharding, trees
from vssl_jax.checkpoint import integrity, provenance
from vssl_jax.data import batch as batch_lib
from vssl_jax.train.run import Run, Span


def folder_of(workdir: pathlib.Path) -> pathlib.Path:
  """Returns the folder of the step records of a run."""
  return workdir / 'step_records'


def paths(workdir: pathlib.Path) -> list[pathlib.Path]:
  """Returns the record files of a run, sorted by step."""
  files = sorted(folder_of(workdir).glob('*.json'))
  return [path for path in files if path.stem.isdigit()]


def listing(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Loads the records of a run, sorted by step; skips corrupt ones."""
  records = []
  for path in paths(workdir):
    try:
      records.append(integrity.load(path))
    except integrity.CorruptError as error:
      logging.warning('skipping a recorded step: %s', error)
  return records


def sums(tree: Any) -> dict[str, list[int]]:
  """Returns name -> sum over the bits of every leaf; waits for the arrays."""
  device_sums = integrity.bit_sums(dict(trees.named_leaves(tree)))
  return {
    k: [int(x) for x in v] for k, v in jax.device_get(device_sums).items()
  }


class StepRecorder:
  """Records the steps of a phase at a fixed interval.

  Every part of a record is waited for: programs that several processes share
  must not run concurrently, as they can deadlock on CPUs.

  Args:
    run: the run; `config.checkpoint.record_every` is the interval in steps.
    span: the phase.
  """

  def __init__(self, run: Run, span: Span) -> None:
    self._run, self._span = run, span
    self._every = run.config.checkpoint.record_every
    self._begun: dict[str, Any] | None = None

  def before(self, done: int, state: Any, batch: batch_lib.Batch) -> None:
    """Computes the sums of a step's inputs if the step is to be recorded.

    Args:
      done: completed steps. Multiples of the interval are recorded, because
        their state may have a checkpoint. The start of a phase has none.
      state: state before the step; it may be donated afterwards.
      batch: batch of the step.
    """
    if not self._every or done % self._every or done == self._span.start:
      return
    replicated = sharding.replicated(self._run.mesh)
    self._begun = {
      'step': done + 1,
      'phase': self._span.phase.name,
      'before': sums(state),  # first: it waits for the running step
      'batch': sums(batch),
      'index': jax.device_get(
        jax.jit(lambda x: x, out_shardings=replicated)(batch.index)
      ).tolist(),
    }

  def after(self, state: Any) -> None:
    """Computes the sums of the new state and writes the record, if any."""
    if self._begun is None:
      return
    machine = provenance.machine() | {'mesh': dict(self._run.mesh.shape)}
    record = self._begun | {'after': sums(state), 'machine': machine}
    self._begun = None
    if jax.process_index():
      return
    folder = folder_of(self._run.workdir)
    folder.mkdir(exist_ok=True)
    integrity.write_atomic(folder / f'{record["step"]:08d}.json', record)
    self._prune()

  def _prune(self) -> None:
    """Removes records that have no kept checkpoint before them."""
    steps = [s.step for s in self._run.checkpoints.whole()]
    for path in paths(self._run.workdir):
      if steps and int(path.stem) <= min(steps):
        path.unlink()
