"""Checkpoints that survive kills and rot; the only module that uses Orbax.

    <workdir>/checkpoints/00001200/        whole train state, by leaf name
    <workdir>/checkpoints/00001200.json    its manifest, written last
    <workdir>/params/<phase>/              parameters at a phase's end
    <workdir>/params/<phase>.json
    <workdir>/params/best/                 where a job validates: the best
    <workdir>/params/best.json

A checkpoint is whole if and only if its manifest exists: the manifest is
renamed into place after every file is on disk, and removed before any file
is. It holds a hash of each file, checked before a restore, and a sum over the
bits of each leaf, computed on the device at save and again after restore, on
whatever mesh.
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
from vssl_jax.train import manifests

# Paths that Orbax and TensorStore take as they are. Brackets and stars are
# patterns to them, a backslash is a slash.
_PLAIN = re.compile(r'(?!//)[\w/ .,=+@-]{,2000}')
_OWN_FILES = '/proc/self/fd'  # Linux: open files of this process, by number
MIN_SLICE_BYTES = 2**20  # of a leaf, written by one of its replicas
BEST = 'best'  # name of the parameters that did best in validation


class CheckpointError(RuntimeError):
  """A checkpoint that cannot be used; the message says which and why."""


class RottenError(CheckpointError):
  """The values read are not those that were saved."""


class Checkpoints:
  """Saves and finds the checkpoints of one run.

  Args:
    workdir: the run's folder.
    keep: whole states to keep.
    keep_every: states after a multiple of so many steps are kept besides; 0
      for none.
    read_only: leave what another process may be writing.
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
        manifests.remove_leftovers(folder)
        with _plain(folder):
          pass
    _barrier('checkpoint folders')

  def save(
    self, state: Any, step: int, phase: str, extra: Mapping[str, Any] = {}
  ) -> None:
    """Starts an asynchronous save of the whole state.

    The arrays are copied to the host before this returns, so the state may be
    donated. Waits for an earlier save that is still under way.

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
    """Saves parameters and waits until they are whole.

    Args:
      tree: the parameters.
      step: steps done.
      phase: that they belong to.
      name: they are saved under; '' for the phase's own, those at its end.
      extra: more for the manifest.
    """
    self.finish()
    path = self.params_folder / (name or phase)
    self._start(path, tree, dict(extra, step=step, phase=phase))
    self.finish()

  def finish(self) -> None:
    """Waits until the last save is whole.

    Raises:
      CheckpointError: it failed.
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
      'ended before, its message says why; else free disk space, or mend the '
      'file system. Start again: the run resumes from the newest whole '
      'checkpoint'
    )

  def _start(
    self, path: pathlib.Path, tree: Any, manifest: dict[str, Any]
  ) -> None:
    if not path.parent.exists():  # Orbax would make it again, alone
      raise CheckpointError(
        f'{path.parent} was removed or moved while the run went on. Put the '
        'folder back and start again: the run resumes from its newest '
        'checkpoint'
      )
    leaves = dict(trees.named_leaves(tree))
    sums = jax.device_get(manifests.bit_sums(leaves))
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
        # Writing again over an old or unreadable one of the same name.
        manifests.path_of(path).unlink(missing_ok=True)
      place = contextlib.ExitStack()
      plain = place.enter_context(_plain(path.parent)) / path.name
      self._saver.save(
        plain, args=ocp.args.PyTreeSave(trees.nest(leaves)), force=True
      )
    except Exception as error:
      raise self._failed(error) from error
    self._committer = threading.Thread(
      target=self._commit, args=(path, manifest, place), daemon=True
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
        manifest['files'] = manifests.hash_files(path)
        manifests.write_atomic(manifests.path_of(path), manifest)
        if path.parent == self.folder:
          self._prune()
    except BaseException as error:  # raised again by finish()
      self._error = error

  def _prune(self) -> None:
    """Removes all but the newest whole states and those kept for good."""
    for saved in self.whole()[self._keep :]:
      if self._keep_every and saved.step % self._keep_every == 0:
        continue
      manifests.path_of(saved.path).unlink()
      # What another process has open may not go yet; the next start removes
      # the rest.
      shutil.rmtree(saved.path, ignore_errors=True)

  def whole(self) -> list[manifests.Saved]:
    """Returns the whole states, newest first."""
    paths = filter(manifests.is_state, manifests.paths_in(self.folder))
    return [
      manifests.Saved(p.with_suffix(''), manifests.read(p))
      for p in sorted(paths, key=lambda p: int(p.stem), reverse=True)
    ]

  def newest(self, limit: int | None = None) -> manifests.Saved | None:
    """Returns the newest checkpoint whose files are as they were written.

    Those that are not are set aside under the suffix `.rotten`, loudly.

    Args:
      limit: of at most so many steps; None for any.

    Raises:
      CheckpointError: there are checkpoints and none is usable.
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
    return manifests.Saved(path, manifests.read(manifests.path_of(path)))

  def _newest_sound(self, limit: int | None) -> int:
    """Returns the step of the newest sound one; -1: none, -2: all damaged."""
    whole = [s for s in self.whole() if limit is None or s.step <= limit]
    for saved in whole:
      wrong = manifests.damage(saved)
      if not wrong:
        return saved.step
      self.set_aside(saved, wrong)
    return -2 if whole else -1

  def set_aside(self, saved: manifests.Saved, why: str) -> None:
    """Renames a damaged checkpoint so that it is never read again."""
    manifest = manifests.path_of(saved.path)
    aside, count = '.rotten', 1
    while any(
      os.path.lexists(f'{path}{aside}') for path in (saved.path, manifest)
    ):
      aside, count = f'.rotten{count}', count + 1
    logging.error(
      'checkpoint %s is damaged: %s. It is kept as %s%s and the one before it '
      'is taken.',
      saved.path,
      why,
      saved.path,
      aside,
    )
    if jax.process_index() == 0:
      manifest.rename(f'{manifest}{aside}')
      if saved.path.exists():
        saved.path.rename(f'{saved.path}{aside}')

  def move_later(self, step: int, place: pathlib.Path) -> list[str]:
    """Moves everything that was saved after a step, the newest first.

    Args:
      step: of the checkpoint that becomes the newest.
      place: folder that the others go to; made where it is needed.

    Returns:
      Names of what was moved, below `place`.
    """
    states = [s for s in self.whole() if s.step > step]
    params = [
      s
      for s in manifests.listing(self.params_folder.parent, ('params',))
      if s.step > step
    ]
    if jax.process_index() == 0:
      for saved in [*states, *sorted(params, key=lambda s: -s.step)]:
        folder = place / saved.path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        # The manifest last: a folder without one would be taken for the rest
        # of a save that was killed, and removed.
        for path in (saved.path, manifests.path_of(saved.path)):
          if path.exists():
            path.rename(folder / path.name)
    _barrier('checkpoints moved')
    return [f'{s.path.parent.name}/{s.path.name}' for s in [*states, *params]]

  def params_of(self, name: str) -> manifests.Saved | None:
    """Returns the parameters kept of a phase, or under a name, if any."""
    manifest = self.params_folder / f'{name}.json'
    if not manifest.exists():
      return None
    return manifests.Saved(manifest.with_suffix(''), manifests.read(manifest))


def _async_checkpointer() -> ocp.AsyncCheckpointer:
  """Returns a checkpointer that cuts only large leaves into replica slices.

  Orbax writes a leaf that N devices hold in N slices, one by each. Of a leaf
  of a few kB that costs N slicing operations and gains nothing.
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
  """Returns an error in a line; those of TensorStore hold whole specs."""
  text = ' '.join(str(error).split())
  return f'{type(error).__name__}: {text[:300]}'


def restore(saved: manifests.Saved, target: Any, subtree: str = '') -> Any:
  """Reads a checkpoint, or a part of it, into the shardings of `target`.

  Args:
    saved: what to read.
    target: tree of `ShapeDtypeStruct` with shardings, of any node types.
    subtree: part of the checkpoint that `target` describes.

  Raises:
    CheckpointError: the files or the values are not those that were saved, or
      the names, shapes and dtypes are not those of `target`.
  """
  wanted = dict(trees.named_leaves(target))
  differing = trees.difference(saved.shapes(subtree), trees.nest(wanted))
  if differing:
    raise CheckpointError(
      f'checkpoint {saved.path} does not fit this config:\n{differing}\n'
      'resume with the config it was made with, or give a new --config.workdir'
    )
  prefix = f'{subtree}/' if subtree else ''
  read = read_leaves(saved, {prefix + n: x for n, x in wanted.items()})
  return trees.map_named(lambda name, _: read[prefix + name], target)


def read_leaves(
  saved: manifests.Saved, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, Array]:
  """Reads some leaves by name and holds their values against the manifest.

  Args:
    saved: what to read.
    wanted: name -> shape, dtype and sharding.

  Raises:
    CheckpointError: they cannot be read.
    RottenError: they are not what was saved.
  """
  target = trees.nest(wanted)
  try:
    with ocp.PyTreeCheckpointer() as reader, _plain(saved.path) as path:
      read = reader.restore(
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
  leaves = dict(trees.named_leaves(read))
  sums = jax.device_get(manifests.bit_sums(leaves))
  rotten = [
    name
    for name, pair in sums.items()
    if [int(s) for s in pair] != saved.manifest['leaves'][name]['sum']
  ]
  if rotten:
    raise RottenError(
      f'checkpoint {saved.path}: the values of {rotten[:3]} are not those that '
      'were saved'
    )
  return leaves


@contextlib.contextmanager
def _plain(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Opens a folder and yields a path to it without special letters.

  Raises:
    CheckpointError: this system has no such path.
  """
  if _PLAIN.fullmatch(str(folder)):
    yield folder
    return
  if not os.path.isdir(_OWN_FILES):
    raise CheckpointError(
      f'{folder}: checkpoints cannot be saved below this path on this system; '
      'give a --config.workdir of letters, digits and any of " /.,=+@_-", '
      'below 2,000 letters'
    )
  number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
  try:
    yield pathlib.Path(_OWN_FILES, str(number))
  finally:
    os.close(number)


def _barrier(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
