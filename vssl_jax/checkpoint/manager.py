"""Saves, verifies and restores checkpoints; the only module that uses Orbax.

    <workdir>/checkpoints/00001200/        whole train state, by leaf name
    <workdir>/checkpoints/00001200.json    its manifest, written last
    <workdir>/params/<phase>/              parameters at a phase's end
    <workdir>/params/<phase>.json
    <workdir>/params/best/                 best parameters in validation, if any
    <workdir>/params/best.json

A checkpoint is complete if and only if its manifest exists: the manifest is
renamed into place after all files are on disk, and removed before any file.
It holds a hash of each file, verified before a restore, and a sum over the bits
of each leaf, computed on the device at save and again after a restore, on any
mesh.
"""

import contextlib
import os
import pathlib
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from jaxtyping import Array

from vssl_jax import trees
from vssl_jax.checkpoint import integrity

# Paths that Orbax and TensorStore use unchanged. They treat brackets and stars
# as patterns and a backslash as a slash.
_PLAIN = re.compile(r'(?!//)[\w/ .,=+@-]{,2000}')
_OWN_FILES = '/proc/self/fd'  # Linux: open files of this process, by number
MIN_SLICE_BYTES = 2**20  # smallest slice of a leaf that one replica writes
BEST = 'best'  # name of the parameters that are best in validation


class CheckpointError(RuntimeError):
  """A checkpoint cannot be used; the message gives its path and the reason."""


class CorruptCheckpointError(CheckpointError):
  """The values read are not those that were saved."""


class Checkpoints:
  """Saves, finds and verifies the checkpoints of a run.

  Args:
    workdir: the run folder.
    keep: number of train states to keep.
    keep_every: states at multiples of this number of steps are also kept; 0 for
      none.
    read_only: create no folders and leave unfinished checkpoints in place.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    keep: int = 2,
    keep_every: int = 0,
    *,
    read_only: bool = False,
  ) -> None:
    self.folder = pathlib.Path(workdir).absolute() / 'checkpoints'
    self.params_folder = pathlib.Path(workdir).absolute() / 'params'
    self._keep, self._keep_every = max(keep, 1), keep_every
    self._saver = _async_checkpointer()
    self._committer: threading.Thread | None = None
    self._error: BaseException | None = None
    if jax.process_index() == 0 and not read_only:
      for folder in (self.folder, self.params_folder):
        folder.mkdir(parents=True, exist_ok=True)
        integrity.remove_leftovers(folder)
        with _plain(folder):
          pass
    _barrier('checkpoint folders')

  def save(
    self, state: Any, step: int, phase: str, extra: Mapping[str, Any] = {}
  ) -> None:
    """Starts an asynchronous save of the train state.

    The arrays are copied to the host before this returns, so the state may be
    donated. Waits for an earlier save that is still running.

    Args:
      state: the train state.
      step: completed steps of the run.
      phase: name of the phase that the state belongs to.
      extra: further entries of the manifest.

    Raises:
      CheckpointError: the earlier save failed.
    """
    self.finish()
    path = self.folder / f'{step:08d}'
    self._start(path, state, dict(extra, step=step, phase=phase))

  def save_params(
    self,
    tree: Any,
    step: int,
    phase: str,
    name: str = '',
    extra: Mapping[str, Any] = {},
  ) -> None:
    """Saves parameters and waits until the save is complete.

    Args:
      tree: the parameters.
      step: completed steps of the run.
      phase: name of the phase that they belong to.
      name: name to save under; '' for `phase`, the parameters at its end.
      extra: further entries of the manifest.
    """
    self.finish()
    path = self.params_folder / (name or phase)
    self._start(path, tree, dict(extra, step=step, phase=phase))
    self.finish()

  def finish(self) -> None:
    """Waits until the last save is complete.

    Raises:
      CheckpointError: the save failed.
    """
    if self._committer is not None:
      self._committer.join()
      self._committer = None
    if self._error is not None:
      error, self._error = self._error, None
      raise self._failed(error) from error

  def _failed(self, error: BaseException) -> CheckpointError:
    return CheckpointError(
      f'saving under {self.folder} failed: {_short(error)}. If another process '
      'ended before, its message has the reason; otherwise free disk space or '
      'repair the file system. Start again: the run resumes from the newest '
      'intact checkpoint'
    )

  def _start(
    self, path: pathlib.Path, tree: Any, manifest: dict[str, Any]
  ) -> None:
    if not path.parent.exists():  # Orbax would create it again, empty
      raise CheckpointError(
        f'{path.parent} was removed or moved during the run. Put the folder '
        'back and start again: the run resumes from its newest checkpoint'
      )
    leaves = dict(trees.named_leaves(tree))
    sums = jax.device_get(integrity.bit_sums(leaves))
    manifest['leaves'] = {
      name: {
        'shape': list(x.shape),
        'dtype': str(x.dtype),
        'sum': [int(s) for s in sums[name]],
      }
      for name, x in leaves.items()
    }
    try:
      if jax.process_index() == 0:
        # A checkpoint of the same name is overwritten: remove its manifest.
        integrity.path_of(path).unlink(missing_ok=True)
      stack = contextlib.ExitStack()
      plain_path = stack.enter_context(_plain(path.parent)) / path.name
      self._saver.save(
        plain_path, args=ocp.args.PyTreeSave(trees.nest(leaves)), force=True
      )
    except Exception as error:
      raise self._failed(error) from error
    self._committer = threading.Thread(
      target=self._commit, args=(path, manifest, stack), daemon=True
    )
    self._committer.start()

  def _commit(
    self,
    path: pathlib.Path,
    manifest: dict[str, Any],
    place: contextlib.ExitStack,
  ) -> None:
    try:
      with place:
        self._saver.wait_until_finished()
      if jax.process_index() == 0:
        manifest['files'] = integrity.hash_files(path)
        integrity.write_atomic(integrity.path_of(path), manifest)
        if path.parent == self.folder:
          self._prune()
    except BaseException as error:  # raised again by finish()
      self._error = error

  def _prune(self) -> None:
    """Removes all states but the newest `keep` and those of `keep_every`."""
    for saved in self.whole()[self._keep :]:
      if self._keep_every and saved.step % self._keep_every == 0:
        continue
      integrity.path_of(saved.path).unlink()
      # Files that another process has open may remain; the next start removes
      # them.
      shutil.rmtree(saved.path, ignore_errors=True)

  def whole(self) -> list[integrity.Saved]:
    """Returns the complete train states, newest first."""
    paths = filter(integrity.is_state, integrity.paths_in(self.folder))
    return [
      integrity.Saved(p.with_suffix(''), integrity.read(p))
      for p in sorted(paths, key=lambda p: int(p.stem), reverse=True)
    ]

  def newest(self, limit: int | None = None) -> integrity.Saved | None:
    """Returns the newest intact checkpoint; None if there are none.

    Corrupt checkpoints are renamed with the suffix `.corrupt`, and an error is
    logged.

    Args:
      limit: highest step to return; None for any.

    Raises:
      CheckpointError: there are checkpoints, but all are corrupt.
    """
    step = -1
    if jax.process_index() == 0:
      step = self._newest_sound(limit)
    if jax.process_count() > 1:
      step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
    if step == -2:
      raise CheckpointError(
        f'every checkpoint under {self.folder} is damaged (see the messages '
        'above); restore the folder from a copy, or give a new --config.workdir'
      )
    if step < 0:
      return None
    path = self.folder / f'{step:08d}'
    return integrity.Saved(path, integrity.read(integrity.path_of(path)))

  def _newest_sound(self, limit: int | None) -> int:
    """Returns the step of the newest intact one; -1: none, -2: all corrupt."""
    states = [s for s in self.whole() if limit is None or s.step <= limit]
    for saved in states:
      problem = integrity.damage(saved)
      if not problem:
        return saved.step
      self.set_aside(saved, problem)
    return -2 if states else -1

  def set_aside(self, saved: integrity.Saved, why: str) -> None:
    """Renames a corrupt checkpoint so that it is never read again."""
    manifest = integrity.path_of(saved.path)
    suffix, count = '.corrupt', 1
    while any(
      os.path.lexists(f'{path}{suffix}') for path in (saved.path, manifest)
    ):
      suffix, count = f'.corrupt{count}', count + 1
    logging.error(
      'checkpoint %s is damaged: %s. It is renamed to %s%s, and the previous '
      'one is used.',
      saved.path,
      why,
      saved.path,
      suffix,
    )
    if jax.process_index() == 0:
      manifest.rename(f'{manifest}{suffix}')
      if saved.path.exists():
        saved.path.rename(f'{saved.path}{suffix}')

  def move_later(self, step: int, place: pathlib.Path) -> list[str]:
    """Moves all checkpoints saved after a step to a folder, newest first.

    Args:
      step: step of the checkpoint that becomes the newest.
      place: target folder; created if needed.

    Returns:
      Names of the moved checkpoints, relative to `place`.
    """
    states = [s for s in self.whole() if s.step > step]
    params = [
      s
      for s in integrity.listing(self.params_folder.parent, ('params',))
      if s.step > step
    ]
    if jax.process_index() == 0:
      for saved in [*states, *sorted(params, key=lambda s: -s.step)]:
        folder = place / saved.path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        # The manifest last: without it the folder would be removed as an
        # unfinished save.
        for path in (saved.path, integrity.path_of(saved.path)):
          if path.exists():
            path.rename(folder / path.name)
    _barrier('checkpoints moved')
    return [f'{s.path.parent.name}/{s.path.name}' for s in [*states, *params]]

  def params_of(self, name: str) -> integrity.Saved | None:
    """Returns the parameters saved for a phase or under a name, if any."""
    manifest = self.params_folder / f'{name}.json'
    if not manifest.exists():
      return None
    return integrity.Saved(manifest.with_suffix(''), integrity.read(manifest))


def _async_checkpointer() -> ocp.AsyncCheckpointer:
  """Returns a checkpointer that splits only large leaves into replica slices.

  By default Orbax splits a leaf that is replicated on N devices into N slices
  and each device writes one. For a leaf of a few kB that costs N slicing
  operations and gains nothing.
  """
  arrays = ocp.type_handlers.ArrayHandler(
    min_slice_bytes_for_replica_parallel=MIN_SLICE_BYTES
  )
  registry = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
  )
  handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
  return ocp.AsyncCheckpointer(handler)


def _short(error: BaseException) -> str:
  """Returns an error as one short line; TensorStore's contain whole specs."""
  text = ' '.join(str(error).split())
  return f'{type(error).__name__}: {text[:300]}'


def restore(saved: integrity.Saved, target: Any, subtree: str = '') -> Any:
  """Restores a checkpoint, or a part of it, into the shardings of `target`.

  Args:
    saved: the checkpoint.
    target: tree of `ShapeDtypeStruct` with shardings, of any node types.
    subtree: part of the checkpoint that `target` describes.

  Raises:
    CheckpointError: the checkpoint cannot be read, its values are corrupt, or
      its names, shapes and dtypes differ from `target`.
  """
  leaves = dict(trees.named_leaves(target))
  differing = trees.difference(saved.shapes(subtree), trees.nest(leaves))
  if differing:
    raise CheckpointError(
      f'checkpoint {saved.path} does not fit this config:\n{differing}\n'
      'resume with the config it was made with, or give a new --config.workdir'
    )
  prefix = f'{subtree}/' if subtree else ''
  values = read_leaves(saved, {prefix + n: x for n, x in leaves.items()})
  return trees.map_named(lambda name, _: values[prefix + name], target)


def read_leaves(
  saved: integrity.Saved, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, Array]:
  """Reads leaves by name and verifies their values against the manifest.

  Args:
    saved: the checkpoint.
    wanted: name -> shape, dtype and sharding.

  Raises:
    CheckpointError: the leaves cannot be read.
    CorruptCheckpointError: the values are not those that were saved.
  """
  target = trees.nest(wanted)
  try:
    with ocp.PyTreeCheckpointer() as reader, _plain(saved.path) as path:
      restored = reader.restore(
        path,
        args=ocp.args.PyTreeRestore(
          item=target,
          restore_args=ocp.checkpoint_utils.construct_restore_args(target),
          partial_restore=True,
        ),
      )
  except Exception as error:
    raise CheckpointError(
      f'checkpoint {saved.path} cannot be read: {_short(error)}'
    ) from error
  leaves = dict(trees.named_leaves(restored))
  sums = jax.device_get(integrity.bit_sums(leaves))
  corrupt = [
    name
    for name, pair in sums.items()
    if [int(s) for s in pair] != saved.manifest['leaves'][name]['sum']
  ]
  if corrupt:
    raise CorruptCheckpointError(
      f'checkpoint {saved.path}: the values of {corrupt[:3]} are not those '
      'that were saved'
    )
  return leaves


@contextlib.contextmanager
def _plain(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a path to a folder that has no special characters.

  Raises:
    CheckpointError: this system cannot provide such a path.
  """
  if _PLAIN.fullmatch(str(folder)):
    yield folder
    return
  if not os.path.isdir(_OWN_FILES):
    raise CheckpointError(
      f'{folder}: checkpoints cannot be saved below this path on this system; '
      'give a --config.workdir of letters, digits and any of " /.,=+@_-", '
      'fewer than 2,000 characters'
    )
  descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
  try:
    yield pathlib.Path(_OWN_FILES, str(descriptor))
  finally:
    os.close(descriptor)


def _barrier(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
