"""Checkpoints that survive kills and rot; the only module that uses Orbax.

    <workdir>/checkpoints/00001200/        whole train state, by leaf name
    <workdir>/checkpoints/00001200.json    its manifest, written last
    <workdir>/params/<phase>/              parameters at a phase's end
    <workdir>/params/<phase>.json

A checkpoint is whole if and only if its manifest exists: the manifest is
renamed into place after every file is on disk, and removed before any file
is. It holds a hash of each file, checked before a restore, and a sum over the
bits of each leaf, computed on the device at save and again after restore, on
whatever mesh.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import threading
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import xxhash
from absl import logging
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt32

from vssl_jax import trees


class CheckpointError(RuntimeError):
  """A checkpoint that cannot be used; the message says which and why."""


class RottenError(CheckpointError):
  """The values read are not those that were saved."""


@dataclasses.dataclass(frozen=True)
class Saved:
  """One whole checkpoint.

  Attributes:
    path: folder of its arrays.
    manifest: step, phase, files, leaves and whatever was given to `save`.
  """

  path: pathlib.Path
  manifest: Mapping[str, Any]

  @property
  def step(self) -> int:
    """Steps done over the whole run."""
    return self.manifest['step']

  @property
  def phase(self) -> str:
    """Name of the phase the state belongs to."""
    return self.manifest['phase']

  def shapes(self, subtree: str = '') -> Any:
    """Returns the tree of shapes and dtypes it holds, as nested dicts."""
    leaves = {
      name: jax.ShapeDtypeStruct(tuple(leaf['shape']), leaf['dtype'])
      for name, leaf in self.manifest['leaves'].items()
    }
    return trees.subtree(nest(leaves), subtree)


class Checkpoints:
  """Saves and finds the checkpoints of one run.

  Args:
    workdir: the run's folder.
    keep: whole states to keep.
  """

  def __init__(self, workdir: str | os.PathLike[str], keep: int = 2) -> None:
    self.folder = pathlib.Path(workdir).absolute() / 'checkpoints'
    self.params_folder = pathlib.Path(workdir).absolute() / 'params'
    self._keep = max(keep, 1)
    self._saver = ocp.StandardCheckpointer()
    self._committer: threading.Thread | None = None
    self._error: BaseException | None = None
    if jax.process_index() == 0:
      for folder in (self.folder, self.params_folder):
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
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

  def save_params(self, tree: Any, step: int, phase: str) -> None:
    """Saves the parameters at a phase's end, and waits until it is whole."""
    self.finish()
    path = self.params_folder / phase
    self._start(path, tree, {'step': step, 'phase': phase})
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
      f'saving under {self.folder} failed: {error!r}; free disk space or mend '
      'the file system and start again: the run resumes from the newest whole '
      'checkpoint'
    )

  def _start(
    self, path: pathlib.Path, tree: Any, manifest: dict[str, Any]
  ) -> None:
    leaves = dict(trees.named_leaves(tree))
    sums = jax.device_get(_sums(leaves))
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
        _manifest_path(path).unlink(missing_ok=True)
      self._saver.save(path, nest(leaves), force=True)
    except Exception as error:
      raise self._failed(error) from error
    self._committer = threading.Thread(
      target=self._commit, args=(path, manifest), daemon=True
    )
    self._committer.start()

  def _commit(self, path: pathlib.Path, manifest: dict[str, Any]) -> None:
    try:
      self._saver.wait_until_finished()
      if jax.process_index() == 0:
        manifest['files'] = _hash_files(path)
        _write_atomic(_manifest_path(path), manifest)
        if path.parent == self.folder:
          self._prune()
    except BaseException as error:  # raised again by finish()
      self._error = error

  def _prune(self) -> None:
    """Removes all but the newest whole states."""
    for saved in self._whole()[self._keep :]:
      _manifest_path(saved.path).unlink()
      shutil.rmtree(saved.path)

  def _whole(self) -> list[Saved]:
    """Returns the whole states, newest first."""
    found = sorted(self.folder.glob('*.json'), reverse=True)
    return [Saved(p.with_suffix(''), _read_manifest(p)) for p in found]

  def newest(self) -> Saved | None:
    """Returns the newest checkpoint whose files are as they were written.

    Those that are not are set aside under the suffix `.rotten`, loudly.

    Raises:
      CheckpointError: there are checkpoints and none is usable.
    """
    step = -1
    if jax.process_index() == 0:
      step = self._newest_sound()
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
    return Saved(path, _read_manifest(_manifest_path(path)))

  def _newest_sound(self) -> int:
    """Returns the step of the newest sound one; -1: none, -2: all damaged."""
    whole = self._whole()
    for saved in whole:
      wrong = damage(saved)
      if not wrong:
        return saved.step
      self.set_aside(saved, wrong)
    return -2 if whole else -1

  def set_aside(self, saved: Saved, why: str) -> None:
    """Renames a damaged checkpoint so that it is never read again."""
    logging.error(
      'checkpoint %s is damaged: %s. It is kept as %s.rotten and the one '
      'before it is taken.',
      saved.path,
      why,
      saved.path,
    )
    if jax.process_index() == 0:
      aside = saved.path.with_suffix('.rotten')
      shutil.rmtree(aside, ignore_errors=True)
      manifest = _manifest_path(saved.path)
      manifest.replace(manifest.with_suffix('.json.rotten'))
      if saved.path.exists():
        saved.path.rename(aside)

  def params_of(self, phase: str) -> Saved | None:
    """Returns the parameters kept at the end of a phase, if any."""
    manifest = self.params_folder / f'{phase}.json'
    if not manifest.exists():
      return None
    return Saved(manifest.with_suffix(''), _read_manifest(manifest))


def restore(saved: Saved, target: Any, subtree: str = '') -> Any:
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
  differing = trees.difference(saved.shapes(subtree), nest(wanted))
  if differing:
    raise CheckpointError(
      f'checkpoint {saved.path} does not fit this config:\n{differing}\n'
      'resume with the config it was made with, or give a new --config.workdir'
    )
  prefix = f'{subtree}/' if subtree else ''
  read = read_leaves(saved, {prefix + n: x for n, x in wanted.items()})
  return trees.map_named(lambda name, _: read[prefix + name], target)


def read_leaves(
  saved: Saved, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, Array]:
  """Reads some leaves by name and holds their values against the manifest.

  Args:
    saved: what to read.
    wanted: name -> shape, dtype and sharding.

  Raises:
    CheckpointError: they cannot be read.
    RottenError: they are not what was saved.
  """
  target = nest(wanted)
  try:
    with ocp.PyTreeCheckpointer() as reader:
      read = reader.restore(
        saved.path,
        args=ocp.args.PyTreeRestore(
          item=target,
          restore_args=ocp.checkpoint_utils.construct_restore_args(target),
          partial_restore=True,
        ),
      )
  except Exception as error:
    raise CheckpointError(
      f'checkpoint {saved.path} cannot be read: {error}'
    ) from error
  leaves = dict(trees.named_leaves(read))
  sums = jax.device_get(_sums(leaves))
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


def damage(saved: Saved) -> str:
  """Returns what is wrong with the files of a checkpoint, or ''."""
  files = saved.manifest.get('files', {})
  present = _list_files(saved.path)
  for name in sorted(set(files) - set(present)):
    return f'{name} is missing'
  for name in sorted(set(present) - set(files)):
    return f'{name} is not in the manifest'
  for name, (size, digest) in files.items():
    path = saved.path / name
    if path.stat().st_size != size:
      return f'{name} has {path.stat().st_size} bytes, wanted {size}'
    if _hash_file(path) != digest:
      return f'the hash of {name} is not that of what was written'
  return ''


def nest(named: Mapping[str, Any]) -> dict[str, Any]:
  """Returns nested dicts from leaves with slash-separated names."""
  out: dict[str, Any] = {}
  for name, leaf in named.items():
    *parents, last = name.split('/')
    node = out
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return out


@jax.jit
def _sums(leaves: Mapping[str, Array]) -> dict[str, UInt32[Array, '2']]:
  return {name: bit_sum(x) for name, x in leaves.items()}


def bit_sum(x: Array) -> UInt32[Array, '2']:
  """Returns a 64-bit sum of an array's bits, each word weighted by its place.

  Sums modulo 2^32 do not depend on their order, so neither on the mesh. The
  weights are odd: a single flipped bit always changes both halves.
  """
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
  bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis in range(x.ndim):
    place = place * jnp.uint32(x.shape[axis]) + jax.lax.broadcasted_iota(
      jnp.uint32, x.shape, axis
    )
  one = jnp.uint32(1)
  mixed = (place * jnp.uint32(0x9E3779B1)) ^ (place >> 15)
  return jnp.stack(
    [
      jnp.sum(bits * (place * jnp.uint32(2) + one), dtype=jnp.uint32),
      jnp.sum(bits * (mixed | one), dtype=jnp.uint32),
    ]
  )


def _manifest_path(path: pathlib.Path) -> pathlib.Path:
  return path.parent / (path.name + '.json')


def _read_manifest(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as error:
    # Unreadable is damaged: `damage` finds files that no manifest lists.
    logging.error('manifest %s cannot be read: %s', path, error)
    step = int(path.stem) if path.stem.isdigit() else -1
    return {'step': step, 'phase': '', 'files': {}, 'leaves': {}}


def _write_atomic(path: pathlib.Path, tree: Any) -> None:
  """Writes JSON so that the file is there whole or not at all."""
  partial = path.with_suffix('.partial')
  with partial.open('w') as f:
    json.dump(tree, f)
    f.flush()
    os.fsync(f.fileno())
  partial.replace(path)


def _remove_leftovers(folder: pathlib.Path) -> None:
  """Removes what a killed process left: anything without a manifest."""
  for path in folder.iterdir():
    if path.suffix == '.partial':
      path.unlink()
    elif path.is_dir() and path.suffix != '.rotten':
      if not _manifest_path(path).exists():
        logging.warning('removing the unfinished checkpoint %s', path)
        shutil.rmtree(path)


def _list_files(folder: pathlib.Path) -> list[str]:
  return [str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file()]


def _hash_files(folder: pathlib.Path) -> dict[str, tuple[int, str]]:
  return {
    name: ((folder / name).stat().st_size, _hash_file(folder / name))
    for name in _list_files(folder)
  }


def _hash_file(path: pathlib.Path) -> str:
  digest = xxhash.xxh3_64()
  with path.open('rb') as f:
    while block := f.read(1 << 22):
      digest.update(block)
  return digest.hexdigest()


def _barrier(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def listing(workdir: str | os.PathLike[str]) -> list[Saved]:
  """Returns all whole checkpoints of a run, phase parameters included.

  Reads only; safe while the run is going on.
  """
  root = pathlib.Path(workdir).absolute()
  manifests = [*root.glob('checkpoints/*.json'), *root.glob('params/*.json')]
  return [Saved(p.with_suffix(''), _read_manifest(p)) for p in manifests]
